"""Files to rows: JSON Lines, CSV, Parquet and plain text, read by one reader that knows each row's line."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualoptim.config.args import MeasureArgs
from dualoptim.data.rows import Row, parse_passage, parse_row
from dualoptim.errors import InputError, reason

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
    return [parse_row(raw, place) for place, raw in _records(path)]


def read_own(path: Path, columns: Columns) -> list[Row]:
    """Read a user's own .jsonl, .json, .csv, .parquet or .txt file, whose columns go by the names in `columns`.

    Raises:
        InputError: naming file, line or column.
    """
    if path.suffix.lower() == ".txt":
        columns = Columns()  # it has no columns that could go by other names
    return [_own_row(raw, place, columns) for place, raw in _records(path)]


def _own_row(raw: Any, place: str, columns: Columns) -> Row:
    if not isinstance(raw, dict):
        raise InputError(f"{place}: not a JSON object; write one per line")
    # a table has a cell for every column: an empty one says nothing, and none holds a list
    given = {name: raw[name] for name in _COMPARED if name in raw and raw[name] not in (None, "")}
    if "perturbed_answer" in given and isinstance(given["perturbed_answer"], str):
        del given["perturbed_answer"]
    if columns.text in raw and columns.question not in raw:
        return parse_passage({**given, columns.text: raw[columns.text]}, place, columns.text)
    for flag, column in (("--question-column", columns.question), ("--answer-column", columns.answer)):
        if column not in raw:
            raise InputError(f"{place}: no column {column!r}; it has {', '.join(map(str, raw))}; name it with {flag}")
    return parse_row({**given, "question": raw[columns.question], "answer": raw[columns.answer]}, place)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Read each record of a file, with the place where it stands: `path:line`.

    Raises:
        InputError: if the file is of no known kind, cannot be read, or holds nothing.
    """
    line = 0
    try:
        for line, record in _numbered(path):
            yield f"{path}:{line}", record
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise InputError(
            f"{path}: cannot be read ({reason(error)}); give UTF-8 text, one JSON object a line, or a table"
        ) from None
    if not line:
        raise InputError(f"{path}: holds no rows; write one JSON object per line")


def _numbered(path: Path) -> Iterator[tuple[int, Any]]:
    """Read each record of a file, with its line, or its number where the file has no lines."""
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json"):
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if text.strip():
                try:
                    yield number, json.loads(text)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: not JSON ({error.msg}); write one JSON object per line") from None
    elif kind == ".csv":
        csv.field_size_limit(2**31 - 1)  # a passage may be longer than the module's 131,072 characters
        # spreadsheets write a mark at the start, which utf-8-sig leaves out
        table = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
        for record in table:
            yield table.line_num, record
    elif kind == ".parquet":
        import pyarrow.parquet  # comes with datasets

        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    elif kind == ".txt":
        yield 1, {Columns.text: path.read_text(encoding="utf-8")}
    else:
        raise InputError(f"{path}: {kind or 'no'} ending; give a .jsonl, .json, .csv, .parquet or .txt file")
