"""Records to rows, whatever their columns are called; `files.py` and `hub.py` read the records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualoptim.config.args import MeasureArgs
from dualoptim.data.files import ENDINGS, kind_of, records
from dualoptim.data.hub import HubData
from dualoptim.data.rows import Row, parse_passage, parse_row
from dualoptim.errors import InputError

_COMPARED = ("paraphrased_answer", "perturbed_answer", "paraphrased_question", "original_answer", "task_id")


@dataclass(frozen=True)
class Columns:
    """Names the columns of a user's own file: of questions and answers, or of passages."""

    question: str = "question"
    answer: str = "answer"
    text: str = "text"

    @staticmethod
    def of(args: MeasureArgs) -> "Columns":
        """Take the names from `--question-column`, `--answer-column` and `--text-column`."""
        return Columns(args.question_column, args.answer_column, args.text_column)


def read_rows(path: Path) -> list[Row]:
    """Read a JSON Lines file of TOFU's shape; empty lines are skipped and the last line may lack its end.

    Raises:
        InputError: naming file and line.
    """
    return [parse_row(raw, place) for place, raw in records(path)]


def read_named(flag: str, name: str, columns: Columns) -> list[Row]:
    """Read what a flag names: a user's own file, or a data set of the hub, in whose place a folder in its layout may stand.

    A data set is `ID`, `ID:CONFIGURATION` or `ID:CONFIGURATION:SPLIT`; what is left out must be the only one of its kind.

    Raises:
        InputError: naming file, line or column, or why the data set cannot be loaded.
    """
    place, configuration, split = (name, "", "") if Path(name).exists() else (*name.split(":", 2), "", "")[:3]
    is_hub_id = place.count("/") == 1 and not place.startswith((".", "/", "~")) and kind_of(Path(place)) not in ENDINGS
    if Path(place).is_dir() or (is_hub_id and not Path(place).exists()):
        raws = HubData(flag, name, place).only(configuration, split)
        return [_own_row(raw, f"{name}:{number}", columns) for number, raw in enumerate(raws, start=1)]
    return read_own(Path(name), columns)


def read_own(path: Path, columns: Columns) -> list[Row]:
    """Read a user's own .jsonl, .json, .csv, .parquet or .txt file, or one as .gz, whose columns go by the names in `columns`.

    Raises:
        InputError: naming file, line or column.
    """
    if kind_of(path) == ".txt":
        columns = Columns()  # it has no columns that could go by other names
    return [_own_row(raw, place, columns) for place, raw in records(path)]


def _own_row(raw: Any, place: str, columns: Columns) -> Row:
    if not isinstance(raw, dict):
        raise InputError(f"{place}: not a JSON object; write one per line")
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
            raise InputError(f"{place}: no column {column!r}; it has {', '.join(map(str, raw))}; name it with {flag}")
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
