"""Read the records of a file and where each stands: JSON Lines, a JSON array, CSV, Parquet and plain text, also as .gz."""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dualoptim.config.opening import decoded, read_bytes
from dualoptim.errors import InputError, reason

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def kind_of(path: Path) -> str:
    """Give the ending that says what a file holds: of `a.csv.gz`, .csv."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Read each record of a file, with the place where it stands: `path:line`.

    Raises:
        InputError: if the file is of no known kind, cannot be read, or holds nothing.
    """
    line, kind = 0, kind_of(path)
    if kind not in ENDINGS:
        raise InputError(f"{path}: {kind or 'no'} ending; give a .jsonl, .json, .csv, .parquet or .txt file")
    remedy = "give UTF-8 text, one JSON object a line, or a table"
    content = read_bytes(str(path), path, remedy if os.path.exists(os.path.expanduser(path)) else _one_that_is_there(path))
    try:
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        for line, record in _parquet(content) if kind == ".parquet" else _of_text(kind, decoded(str(path), content)):
            yield f"{path}:{line}", record
    except _AtLine as error:
        raise InputError(f"{path}:{error}") from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); {remedy}") from None
    if not line:
        raise InputError(f"{path}: holds no rows; write one JSON object per line")


def _one_that_is_there(path: Path) -> str:
    """Say what to give in place of a file that is missing."""
    with contextlib.suppress(OSError, ValueError):  # there is no such folder either
        if near := get_close_matches(path.name, os.listdir(path.expanduser().parent), n=1):
            return f"give one that is there; the nearest is {path.with_name(near[0])}"
    return "give one that is there"


class _AtLine(Exception):
    """Says what is wrong in a file, as `line: what; remedy`."""


def _of_text(kind: str, text: str) -> Iterator[tuple[int, Any]]:
    if kind == ".csv":
        return _table(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if kind == ".txt":
        return iter([(1, {"text": text})])
    return _array(text) if text.lstrip()[:1] == "[" else _lines(text)


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.lstrip("\ufeff")  # files with marks that were joined
        if line.strip():
            try:
                yield number, JSON.decode(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)
                raise _AtLine(f"{number}: not JSON ({why}); write one JSON object per line") from None


def _array(text: str) -> Iterator[tuple[int, Any]]:
    """Read a JSON array one element after another, because the decoder forgets at which line each stands."""
    position, number, after = text.index("[") + 1, 1 + text[: text.index("[")].count("\n"), "["
    try:
        while after != "]":
            start = _next(text, position)
            number += text.count("\n", position, start)
            if after == "[" and text[start : start + 1] == "]":
                position, after = start + 1, "]"
                break
            value, end = JSON.raw_decode(text, start)
            yield number, value
            position = _next(text, end)
            number += text.count("\n", start, position)
            after = text[position : position + 1]
            if after not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position += 1
        if text[position:].strip():
            raise json.JSONDecodeError("Extra data behind the array", text, _next(text, position))
    except (ValueError, RecursionError) as error:
        why, place = getattr(error, "msg", error), getattr(error, "lineno", number)
        raise _AtLine(f"{place}: not JSON ({why}); write one array of objects, or one object per line") from None


def _next(text: str, position: int) -> int:
    """Find the next character that is no white space."""
    return re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_no_name_twice)
"""Reads JSON in which no name stands twice in one object, where one of the values would be lost."""


def _table(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV whose rows have a cell for each column; cells that the header has no name for must be empty."""
    csv.field_size_limit(2**31 - 1)  # a passage may be longer than the module's 131,072 characters
    reader, names = csv.reader(io.StringIO(text, newline=""), strict=True), list[str]()
    try:
        for row in filter(None, reader):
            if not names:
                names = _header(row, reader.line_num)
                continue
            cells = row[: len(names)] if not any(row[len(names) :]) else row
            if len(cells) != len(names):
                remedy = "quote texts that hold commas" if len(cells) > len(names) else "leave cells empty between commas"
                cell = "cell" if len(cells) == 1 else "cells"
                raise _AtLine(f"{reader.line_num}: {len(cells)} {cell} where the header has {len(names)}; {remedy}")
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise _AtLine(f"{reader.line_num}: not CSV ({error}); quote texts, and double the quotes in them") from None


def _header(row: list[str], line: int) -> list[str]:
    """Take the names of the columns, without those at the end that have none."""
    while row and not row[-1].strip():
        row = row[:-1]
    for name in row:
        if row.count(name) > 1:
            raise _AtLine(f"{line}: two columns have the name {name!r}; rename one of them")
    return row


def _parquet(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # comes with datasets
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except Exception as error:  # it has kinds of its own, which no class has in common
        raise ValueError(reason(error)) from None
    yield from enumerate(rows, start=1)
