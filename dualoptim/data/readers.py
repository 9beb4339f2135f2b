"""Records to rows, whatever their columns are called; `files.py` and `hub.py` read the records."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualoptim.config.args import CommonArgs
from dualoptim.data.files import ENDINGS, kind_of, records
from dualoptim.data.hub import HubData
from dualoptim.data.rows import Asking, Row, checked_text, parse_passage, parse_row, with_own_texts
from dualoptim.data.wordings import OTHER_WORDS
from dualoptim.errors import InputError
from dualoptim.method.objectives import split_objectives

_COMPARED = ("paraphrased_answer", "perturbed_answer", "paraphrased_question", "original_answer", "task_id")


@dataclass(frozen=True)
class Columns:
    """Names the columns of a user's own file: of questions and answers, or of passages."""

    question: str = "question"
    answer: str = "answer"
    text: str = "text"
    refusal: str | None = None
    alternative: str | None = None
    group: str | None = None

    @staticmethod
    def of(args: CommonArgs) -> "Columns":
        """Take the names from `--question-column` and the like, without those that rows to forget alone have."""
        return Columns(args.question_column, args.answer_column, args.text_column, group=getattr(args, "group_column", None))


def is_read(args: CommonArgs, kind: str, side: int = 0) -> bool:
    """Tell whether objectives read a kind of text of the rows to forget, or with side 1 of those to keep."""
    pairs = getattr(args, "forget_losses", ())  # an evaluation has none
    return any(objective and kind in objective.texts for objective in (split_objectives(pair)[side] for pair in pairs))


def read_rows(path: Path) -> list[Row]:
    """Read a JSON Lines file of TOFU's shape; empty lines are skipped and the last line may lack its end.

    Raises:
        InputError: naming file and line.
    """
    return [parse_row(raw, place) for place, raw in records(path)]


def read_named(flag: str, name: str, columns: Columns) -> list[Row]:
    """Read what a flag names: a user's own file, or a data set of the hub, in whose place a folder in its layout may stand.

    Raises:
        InputError: naming file, line or column, or why the data set cannot be loaded.
    """
    return _own_rows(Path(name), named_records(flag, name), columns)


def named_records(flag: str, name: str) -> Iterator[tuple[str, Any]]:
    """Read each record of what a flag names, with the place where it stands. Errors are those of `read_named`.

    A data set is `ID`, `ID:CONFIGURATION` or `ID:CONFIGURATION:SPLIT`; what is left out must be the only one of its kind.
    """
    place, configuration, split = (name, "", "") if Path(name).exists() else (*name.split(":", 2), "", "")[:3]
    is_hub_id = place.count("/") == 1 and not place.startswith((".", "/", "~")) and kind_of(Path(place)) not in ENDINGS
    if Path(place).is_dir() or (is_hub_id and not Path(place).exists()):
        raws = HubData(flag, name, place).only(configuration, split)
        return ((f"{name}:{number}", raw) for number, raw in enumerate(raws, start=1))
    return records(Path(name))


def read_own(path: Path, columns: Columns) -> list[Row]:
    """Read a user's own .jsonl, .json, .csv, .parquet or .txt file, or one as .gz, whose columns go by the names in `columns`.

    Raises:
        InputError: naming file, line or column.
    """
    return _own_rows(path, records(path), columns)


def _own_rows(path: Path, placed: Iterable[tuple[str, Any]], columns: Columns) -> list[Row]:
    if kind_of(path) == ".txt":
        plain = Columns()  # it has no columns that could go by other names
        columns = replace(columns, question=plain.question, answer=plain.answer, text=plain.text)
    return [_own_row(raw, place, columns) for place, raw in placed]


def _own_row(raw: Any, place: str, columns: Columns) -> Row:
    if not isinstance(raw, dict):
        raise InputError(f"{place}: not a JSON object; write one per line")
    row = with_own_texts(_asked(raw, place, columns), raw, columns.refusal, columns.alternative)
    group = raw.get(columns.group) if columns.group else None
    named = None if group is None or not str(group).strip() else _group_name(group, place)
    asking = Asking(group=named, end=raw.get("ends") is not False)  # another `ends` is a column of the user's
    return row if asking == Asking() else replace(row, asking=asking)


def _group_name(group: Any, place: str) -> str:
    """Make one word of a group's name, and refuse one by which an earlier task goes."""
    name = "_".join(str(group).split())
    if re.fullmatch(r"task\d+", name):
        raise InputError(f"{place}: the group {name!r} is what an earlier task is called; name it otherwise")
    if name == OTHER_WORDS.removeprefix("forget_"):
        raise InputError(f"{place}: the group {name!r} is what questions in other words are called; name it otherwise")
    return name


def _asked(raw: dict[str, Any], place: str, columns: Columns) -> Row:
    """Make a row of the columns that hold question and answer, or a passage."""
    # a table has a cell for every column: an empty one says nothing, and none holds a list
    given = {name: raw[name] for name in _COMPARED if name in raw and raw[name] not in (None, "")}
    if "perturbed_answer" in given and isinstance(given["perturbed_answer"], str):
        del given["perturbed_answer"]
    if columns.text in raw and columns.question not in raw:
        return parse_passage({**given, columns.text: raw[columns.text]}, place, columns.text)
    if columns.question not in raw and columns.answer not in raw:
        if "messages" in raw:
            raw = _one_turn(raw["messages"], place, columns)
        elif "prompt" in raw and "completion" in raw:
            prompt, completion = raw["prompt"], raw["completion"]
            if isinstance(prompt, list) and isinstance(completion, list):
                raw = _one_turn(prompt + completion, place, columns)
            else:
                raw = {columns.question: prompt, columns.answer: completion}
    for flag, column in (("--question-column", columns.question), ("--answer-column", columns.answer)):
        if column not in raw:
            named = f"{flag} names it in all files, so let all of them call it the same"
            remedy = f"name it with {flag}" if column in ("question", "answer") else named
            raise InputError(f"{place}: no column {column!r}; it has {', '.join(map(str, raw))}; {remedy}")
        checked_text(raw, column, place)
    return parse_row({**given, "question": raw[columns.question], "answer": raw[columns.answer]}, place)


def _one_turn(messages: Any, place: str, columns: Columns) -> dict[str, Any]:
    """Take question and answer from a conversation of one turn: what stands before a question would be lost.

    Raises:
        InputError: if it is anything else.
    """
    if not isinstance(messages, list) or not all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in messages):
        raise InputError(f"{place}: messages is {str(messages)[:60]!r}; give a list of objects with role and content")
    roles = [str(one["role"]) for one in messages]
    if roles != ["user", "assistant"]:
        raise InputError(
            f"{place}: messages of {', '.join(roles) or 'nobody'}; a row is one question and its answer, so give one of user "
            "and one of assistant"
        )
    question, answer = (_joined(one["content"]) for one in messages)
    return {columns.question: question, columns.answer: answer}


def _joined(content: Any) -> Any:
    """Join the parts of a text written as [{"type": "text", "text": ...}]; anything else stays, to be refused as it is."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(map(str, texts)) if parts and len(texts) == len(parts) else content
