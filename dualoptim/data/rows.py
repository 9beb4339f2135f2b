"""A row: one question and its answer, or one passage of plain text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dualoptim.errors import InputError, shown

HOLDOUT = "holdout"
"""Name of the evaluation set of rows that no model has seen, for membership attacks."""


@dataclass(frozen=True)
class Row:
    """Holds a question and its answer, with the other answers that an evaluation compares where the data has them.

    A passage of plain text has no question and is its own answer.
    """

    question: str | None
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    task: int | None = None
    golden_answer: str | None = None  # the short fact, where `answer` is the model's own long one (real-world scenario)
    original_answer: str | None = None  # a whole sentence, where `answer` is a short one (real authors, world facts)
    paraphrased_question: str | None = None
    goes_on: bool = False  # a piece of a passage that another one follows: no end token
    place: str = field(default="", compare=False, repr=False)  # where it stands, for errors

    def content(self) -> dict[str, Any]:
        """Give everything that the row says, without where it stands: what hashes are made of."""
        said = {one.name: getattr(self, one.name) for one in fields(self) if one.compare}
        return {name: value for name, value in said.items() if name != "goes_on" or value}

    def texts(self) -> list[str]:
        """List all answers: the true one, then its paraphrase if there is one, then the wrong ones."""
        return [self.answer, *([self.paraphrased_answer] if self.paraphrased_answer else []), *self.perturbed_answers]


def parse_row(raw: Any, place: str) -> Row:
    """Make a `Row` of a JSON object with question and answer; `place` says in errors where it stands.

    Raises:
        InputError: naming `place`, if a field is missing, empty or of the wrong type.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{place}: not a JSON object; each line holds one with question and answer")
    for name in ("question", "answer"):
        if name not in raw:
            raise InputError(f"{place}: no field {name!r}; every row needs question and answer")
        _text(raw, name, place)
    return Row(raw["question"], raw["answer"], **_others(raw, place))


def parse_passage(raw: dict[str, Any], place: str, column: str = "text") -> Row:
    """Make a `Row` without a question of a record that holds a passage in `column`.

    Raises:
        InputError: naming `place`, if a field is empty or of the wrong type.
    """
    return Row(None, _text(raw, column, place), **_others(raw, place))


def _text(raw: dict[str, Any], name: str, place: str) -> str:
    if not isinstance(raw[name], str) or not raw[name].strip():
        raise InputError(f"{place}: {name} is {shown(raw[name])}; give a text that is not empty")
    return _whole(raw[name], name, place)


def _whole(text: str, name: str, place: str) -> str:
    """Refuse what JSON can write and no tokenizer takes: one half of a character that is written as two."""
    if half := re.search("[\ud800-\udfff]", text):
        raise InputError(f"{place}: {name} holds half a character ({half[0]!r}); write it whole, or leave it out")
    return text


def _others(raw: dict[str, Any], place: str) -> dict[str, Any]:
    """Check what a row may have beside question and answer, and name it as `Row` does."""
    given = {name: value for name, value in raw.items() if value is not None}
    texts = ("golden_answer", "original_answer", "paraphrased_question")
    found: dict[str, Any] = {"place": place} | {name: _text(given, name, place) for name in texts if name in given}
    if "paraphrased_answer" in given:
        found["paraphrased_answer"] = paraphrased = given["paraphrased_answer"]
        if not isinstance(paraphrased, str):
            raise InputError(f"{place}: paraphrased_answer is {shown(paraphrased)}; give a text")
        _whole(paraphrased, "paraphrased_answer", place)
    if "perturbed_answer" in given:
        perturbed = given["perturbed_answer"]
        if not (isinstance(perturbed, list) and perturbed and all(isinstance(text, str) and text for text in perturbed)):
            raise InputError(f"{place}: perturbed_answer is {shown(perturbed)}; give a list of texts")
        found["perturbed_answers"] = tuple(_whole(text, "perturbed_answer", place) for text in perturbed)
    if "task_id" in given:
        task = given["task_id"]
        digits = "" if isinstance(task, bool) or not isinstance(task, (int, str)) else str(task)
        if not digits.isdecimal() or len(digits) > 18:
            raise InputError(f"{place}: task_id is {shown(task)}; give a whole number")
        found["task"] = int(digits)
    return found


def task_numbers(rows: Sequence[Row]) -> list[int]:
    """List the tasks that rows are numbered by; rows without numbers are all of task 1."""
    return sorted({row.task for row in rows if row.task is not None}) or [1]


def of_task(rows: Sequence[Row], task: int) -> list[Row]:
    """Pick the rows of one task, with those that carry no number."""
    return [row for row in rows if row.task in (None, task)]


def still_known(rows: Sequence[Row], unlearned: Sequence[int]) -> list[Row]:
    """Pick the rows of tasks that have not been unlearned yet."""
    return [row for row in rows if row.task not in (None, *unlearned)]
