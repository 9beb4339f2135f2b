"""Read the records of a benchmark's files, wherever they lie: in a folder, in one per target, or in a data set of the hub."""

import glob
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from dualoptim.data.declaration import RowsOf
from dualoptim.data.files import ENDINGS, kind_of, records
from dualoptim.data.hub import HubData
from dualoptim.data.splits import lists_configurations
from dualoptim.errors import InputError, shown

Placed = tuple[str, dict[str, Any]]
"""A record, after the place where it stands."""


class NoFileError(Exception):
    """Says which file is missing, and where."""


class BenchmarkFiles:
    """Finds the files of a benchmark and reads each once."""

    def __init__(self, place: str, folders: Sequence[str] = ("",)) -> None:
        """Look for files in the folder `place`, in the first of its `folders` that has them, or in the data set of that id."""
        self.place = place
        self._folders = folders or ("",)
        self._known: dict[str, list[Placed]] = {}

    def read(self, files: Sequence[str], target: str = "") -> list[Placed]:
        """Read the first of `files` that there is; `target` takes the place of {target} in the names of folders.

        A file may be `configuration:split` of a data set in the hub's layout, or of a folder that is named like one.

        Raises:
            InputError: if there is no such folder or data set, or a record is no object.
            NoFileError: if the folder has none of the files.
        """
        folder = Path(self.place).expanduser()
        is_folder = folder.is_dir()
        of_hub = [file for file in files if ":" in file and not (is_folder and not lists_configurations(folder / "README.md"))]
        if not is_folder and not of_hub:
            raise InputError(f"--data {self.place}: no such folder; give the one that has {files[0]}")
        if found := self._paths(folder, files, target) if is_folder else []:
            return [record for path in found for record in self._once(str(path), path)]
        if of_hub and not (is_folder and of_hub[0].split(":")[0] not in self._data_set().configurations()):
            return self._once(of_hub[0], None)
        raise NoFileError(f"{self.place} has no {files[0].replace(':', '/')}")

    def listing(self) -> str:
        """Say which files there are, of a folder or one within it."""
        folder = Path(self.place).expanduser()
        found = [
            path for one in ("*", "*/*") for path in sorted(folder.glob(one)) if path.is_file() and kind_of(path) in ENDINGS
        ]
        names = [str(path.relative_to(folder)) for path in found]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return f"it has {', '.join(names[:10]) or 'no such file'}{more}"

    def _paths(self, folder: Path, files: Sequence[str], target: str) -> list[Path]:
        """Find the files, of which there are several where each target has one, or a split lies in parts."""
        for within in self._folders:
            places = _folders_of(target, folder, within)
            for file in files:
                configuration, _, split = file.rpartition(":")
                names = (f"{configuration}/{split}[.-]*",) if configuration else (glob.escape(file), f"{glob.escape(file)}.gz")
                for name in names:
                    found = [Path(path) for place in places for path in glob.glob(os.path.join(glob.escape(place), name))]
                    if found := [path for path in found if path.is_file() and kind_of(path) in ENDINGS]:
                        return sorted(found, key=_natural)
        return []

    def _once(self, name: str, path: Path | None) -> list[Placed]:
        if name not in self._known:
            self._known[name] = _of_file(path) if path else self._of_data_set(*name.split(":", 1))
        return self._known[name]

    def _data_set(self) -> HubData:
        folder = Path(self.place).expanduser()
        return HubData("--data", self.place, str(folder) if folder.is_dir() else self.place)

    def _of_data_set(self, configuration: str, split: str) -> list[Placed]:
        raws = self._data_set().rows(configuration, split)
        return [(f"{self.place} {configuration}:{split}:{number}", raw) for number, raw in enumerate(raws, start=1)]


def _folders_of(target: str, folder: Path, within: str) -> list[str]:
    """Find the folders that a pattern names, with {target} those of one target, or of all if it is empty.

    A * stands for no _ beside a target's name: 1_Stephen_King is no folder of King.
    """
    found = glob.glob(os.path.join(glob.escape(str(folder)), within.replace("{target}", "*")))
    if not target or "{target}" not in within:
        return found
    pattern = _composed(within.replace("{target}", glob.escape(target.replace(" ", "_"))))
    names = {place: _composed(Path(place).relative_to(folder).as_posix()) for place in found}
    return [place for place, name in names.items() if fnmatchcase(name, pattern) and name.count("_") == pattern.count("_")]


def _composed(name: str) -> str:
    """Write a letter and its accent as one character, which some systems write as two in the names of files."""
    return unicodedata.normalize("NFC", name)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", str(path))]


def _of_file(path: Path) -> list[Placed]:
    lines = [*records(path)]
    for where, raw in lines:
        if not isinstance(raw, dict):
            raise InputError(f"{where}: not a JSON object; write one per line")
    return lines


def fits(raw: dict[str, Any], where: Mapping[str, str], place: str) -> bool:
    """Tell whether the texts of a record match the patterns of their columns, each as of a shell, or ! and several with |."""
    return all(_matches(str(cell(raw, column, place)), pattern) for column, pattern in where.items())


def _matches(text: str, pattern: str) -> bool:
    if pattern.startswith("!"):
        return not any(fnmatchcase(text, one) for one in pattern[1:].split("|"))
    return fnmatchcase(text, pattern)


def is_long(raw: dict[str, Any], entry: RowsOf, place: str) -> bool:
    """Tell whether a passage has more characters than `longer_than`, if that is said, and not blanks alone."""
    if entry.longer_than is None:
        return True
    text = str(cell(raw, entry.text or entry.answer, place))
    return len(text) > entry.longer_than and not text.isspace()


def cell(raw: dict[str, Any], column: str, place: str) -> Any:
    """Give what stands in a column; `response.1` is the second of a list, or what has the name 1, in the column response.

    Raises:
        InputError: if there is no such column.
    """
    value: Any = raw
    for part in [column] if column in raw else column.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise InputError(f"{place}: no column {column!r}; it has {', '.join(map(str, raw))}")
    return value


def question_and_answer(raw: dict[str, Any], entry: RowsOf, place: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Read a question, its answer, and the wrong answers where there are choices.

    Choices are a list, which the question goes on with, letter by letter, and of which the answer is a number, from 0; or they
    are `choices` and `labels`, of which 1 is that of the right one.
    """
    question = cell(raw, entry.question, place)
    choices = cell(raw, entry.choices, place) if entry.choices else None
    if isinstance(choices, dict) and 1 in (labels := list(choices.get("labels", ()))) and 0 in labels:
        texts = list(zip(choices.get("choices", ()), labels, strict=False))
        return (
            question,
            next(text for text, label in texts if label == 1),
            tuple(str(text) for text, label in texts if label == 0),
        )
    answer = cell(raw, entry.answer, place)
    if not entry.choices:
        return question, answer, ()
    if not (isinstance(choices, list) and isinstance(answer, int) and 0 <= answer < len(choices) <= len(ascii_uppercase)):
        remedy = f"give a list and the number of the right one as {entry.answer}, or choices and labels"
        raise InputError(f"{place}: {entry.choices} is {shown(choices)}; {remedy}")
    letters = ascii_uppercase[: len(choices)]
    asked = question + "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return asked, letters[answer], tuple(letters.replace(letters[answer], ""))


def filled(text: str, raw: dict[str, Any]) -> str:
    """Put what stands in other columns where their names stand in braces, `{task:words}` with blanks for underscores."""

    def fill(name: re.Match[str]) -> str:
        found = str(raw.get(name[1], name[0])).strip()
        return found.replace("_", " ") if name[2] else found

    return re.sub(r"\{(\w+)(:words)?\}", fill, text)


def written(example: str, raw: dict[str, Any], entry: RowsOf, place: str) -> str:
    """Write a worked example, in the words of its row."""
    if "{question}" not in example or "{answer}" not in example:
        raise InputError(f"{place}: example is {shown(example)}; write where {{question}} and {{answer}} stand")
    before, _, after = example.partition("{question}")
    question, answer, _ = map(str, question_and_answer(raw, entry, place))
    return before + question + after.replace("{answer}", answer)
