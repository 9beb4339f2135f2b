"""A row: one question and its answer, or one passage of plain text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dualoptim.errors import InputError, shown

HOLDOUT = "holdout"
"""Name of the evaluation set of rows that no model has seen, for membership attacks."""

MEMBERS = "members"
"""Name of the evaluation set of rows that were learned, where membership attacks look at others than the forget set."""

OPTION_SETS = ("real_authors", "world_facts")
"""Sets with short answers, whose probability is normalized over the options and whose answer is its own paraphrase."""


@dataclass(frozen=True)
class Asking:
    """How a benchmark puts a row to a model, which part of the answer counts, and as what it is counted."""

    around: tuple[str, str] | None = None  # texts before and after the question; None: those of the model's template
    lead: str | None = None  # the template stands around `around`, and this text behind it; None: `around` takes its place
    tokens: int | None = None  # of the model's own answer, at most; None: --max-new-tokens
    length: int = 0  # of the whole text in tokens, at most, where that is more than --max-length
    stop: tuple[str, ...] = ()  # the answer ends before the first of each, one after the other
    stop_tokens: tuple[str, ...] = ()  # the answer ends before the first token whose text is one of them
    end: bool = True  # whether an end token follows the text
    metrics: tuple[str, ...] = ()  # of the row, beside those that every row has
    only: bool = False  # those that every row has say nothing here
    accepted: tuple[str, ...] = ()  # further true answers; the one that an own answer is nearest to counts
    group: str | None = None  # of the rows of its set, which have means of their own; several with blanks between

    @property
    def plain(self) -> bool:
        """Whether no template stands around the question."""
        return self.around is not None and self.lead is None

    @property
    def taught(self) -> "Asking | None":
        """What of it a model sees that learns the row, without what only measures it; None where nothing is left."""
        seen = Asking(self.around, self.lead, length=self.length, end=self.end)
        return None if seen == Asking() else seen

    def words(self, question: str, answer: str, template: Callable[[str], str]) -> tuple[str, str]:
        """Write what a model goes on from, and the answer behind it; `template` writes a question as the model's own does.

        A blank between them is the first character of the answer.
        """
        asked = question.join(self.around) if self.around else question
        if self.lead is None:
            return (asked if self.plain else template(asked)), answer
        before = self.lead.rstrip(" ")
        return template(asked) + before, self.lead[len(before) :] + answer


@dataclass(frozen=True)
class Corpus:
    """One of several sets of rows that are forgotten in turn, a step each, with what it has for itself."""

    name: str
    beta: float | None = None  # None: --beta
    regularization_coeff: float | None = None  # None: --regularization-coeff


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
    refusal: str | None = None  # what it should be answered with, where objectives would else draw a refusal
    alternatives: tuple[str, ...] = ()  # plausible other answers
    asking: Asking | None = None  # of a benchmark; None: as the model's template and the flags say
    ids: tuple[int, ...] = ()  # its tokens, where it was cut out of a longer text between words or within one
    corpus: Corpus | None = None  # with whose rows it is forgotten or kept, where there are several
    place: str = field(default="", compare=False, repr=False)  # where it stands, for errors

    def content(self) -> dict[str, Any]:
        """Give everything that the row says, without where it stands: what hashes are made of."""
        said = {one.name: getattr(self, one.name) for one in fields(self) if one.compare}
        rare = {name: said.pop(name) and asdict(getattr(self, name)) for name in ("asking", "corpus")}
        rare |= {name: said.pop(name) for name in ("ids", "refusal", "alternatives")}
        return said | {name: value for name, value in rare.items() if value}

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
        checked_text(raw, name, place)
    return Row(raw["question"], raw["answer"], **_others(raw, place))


def parse_passage(raw: dict[str, Any], place: str, column: str = "text") -> Row:
    """Make a `Row` without a question of a record that holds a passage in `column`.

    Raises:
        InputError: naming `place`, if a field is empty or of the wrong type.
    """
    return Row(None, checked_text(raw, column, place), **_others(raw, place))


def with_own_texts(row: Row, raw: dict[str, Any], refusal: str | None, alternative: str | None) -> Row:
    """Give a row what stands in the columns `refusal` (a text) and `alternative` (a text, or a list of them) of its record.

    Raises:
        InputError: naming where it stands, if there is no such column, or no text in it.
    """
    for name in filter(None, (refusal, alternative)):
        if name not in raw:
            raise InputError(f"{row.place}: no column {name!r}; it has {', '.join(map(str, raw))}; every row needs one")
    if alternative:
        texts = raw[alternative] if isinstance(raw[alternative], list) and raw[alternative] else [raw[alternative]]
        row = replace(row, alternatives=tuple(checked_text({alternative: text}, alternative, row.place) for text in texts))
    return replace(row, refusal=checked_text(raw, refusal, row.place)) if refusal else row


def checked_text(raw: dict[str, Any], name: str, place: str) -> str:
    """Give the text in a column of a record.

    Raises:
        InputError: naming `place` and column, if there is no text in it.
    """
    if not isinstance(raw[name], str) or not raw[name].strip():
        raise InputError(f"{place}: column {name!r} is {shown(raw[name])}; give a text that is not empty")
    return _whole(raw[name], name, place)


def _whole(text: str, name: str, place: str) -> str:
    """Refuse what JSON can write and no tokenizer takes: one half of a character that is written as two."""
    if half := re.search("[\ud800-\udfff]", text):
        raise InputError(f"{place}: column {name!r} holds half a character ({half[0]!r}); write it whole, or leave it out")
    return text


def _others(raw: dict[str, Any], place: str) -> dict[str, Any]:
    """Check what a row may have beside question and answer, and name it as `Row` does."""
    given = {name: value for name, value in raw.items() if value is not None}
    texts = ("golden_answer", "original_answer", "paraphrased_question")
    found: dict[str, Any] = {"place": place} | {name: checked_text(given, name, place) for name in texts if name in given}
    if "paraphrased_answer" in given:
        found["paraphrased_answer"] = paraphrased = given["paraphrased_answer"]
        if not isinstance(paraphrased, str):
            raise InputError(f"{place}: column 'paraphrased_answer' is {shown(paraphrased)}; give a text")
        _whole(paraphrased, "paraphrased_answer", place)
    if "perturbed_answer" in given:
        perturbed = given["perturbed_answer"]
        if not (isinstance(perturbed, list) and perturbed and all(isinstance(text, str) and text for text in perturbed)):
            raise InputError(f"{place}: column 'perturbed_answer' is {shown(perturbed)}; give a list of texts")
        found["perturbed_answers"] = tuple(_whole(text, "perturbed_answer", place) for text in perturbed)
    if "task_id" in given:
        task = given["task_id"]
        digits = "" if isinstance(task, bool) or not isinstance(task, (int, str)) else str(task)
        if not digits.isdecimal() or len(digits) > 18:
            raise InputError(f"{place}: column 'task_id' is {shown(task)}; give a whole number")
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


def in_both(forget: Sequence[Row], retain: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair the rows to forget with those to keep that say the same."""
    kept = {(row.question, row.answer): row for row in reversed(retain)}
    return [(row, kept[row.question, row.answer]) for row in forget if (row.question, row.answer) in kept]
