"""Where TOFU-shaped rows lie: in the package (the demo), in a folder of JSON Lines files, or on the hub.

A split is a list of rows with a name, such as `forget01` or `retain_perturbed`.
"""

import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import yaml

from dualoptim.config.args import DEMO
from dualoptim.config.opening import read_text
from dualoptim.data import demo
from dualoptim.data.hub import HubData
from dualoptim.data.readers import read_rows
from dualoptim.data.rows import Row, parse_row
from dualoptim.errors import InputError

_ENDINGS = (".json", ".jsonl")


class Splits(ABC):
    """Reads rows by the name of their split, each split once."""

    cut_from_full = False
    """Whether the tasks are row ranges of the split `full`; otherwise each row carries the number of its task."""

    real_world = False
    """Whether the split `forget` of the real-world scenario can be among them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._known: dict[str, list[Row]] = {}

    @abstractmethod
    def has(self, split: str) -> bool:
        """Say whether there is a split of this name."""

    @abstractmethod
    def read(self, split: str) -> list[Row]:
        """Read one split from where it lies.

        Raises:
            InputError: if there is none of this name, it cannot be reached, or it holds a bad row.
        """

    def rows(self, split: str) -> list[Row]:
        """Give all rows of one split, read at the first call. Errors are those of `read`."""
        if split not in self._known:
            self._known[split] = self.read(split)
        return self._known[split]

    def optional(self, split: str) -> list[Row]:
        """Give all rows of one split, none if there is no such split."""
        return self.rows(split) if self.has(split) else []


class _Demo(Splits):
    """Reads the built-in demo, `demo.splits()`."""

    def has(self, split: str) -> bool:
        return split in demo.splits()

    def read(self, split: str) -> list[Row]:
        splits = demo.splits()
        if split not in splits:
            raise InputError(f"the demo data has no split {split!r}; it has {', '.join(splits)}")
        return [parse_row(raw, f"demo {split}:{n}") for n, raw in enumerate(splits[split], start=1)]


class _Folder(Splits):
    """Reads a folder with one JSON Lines file per split: `forget01.json`, or `forget01.jsonl`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._folder = Path(name).expanduser()
        self.cut_from_full = self.has("full")
        self.real_world = not self.cut_from_full

    def has(self, split: str) -> bool:
        return self._file(split) is not None

    def read(self, split: str) -> list[Row]:
        path = self._file(split)
        if path is None:
            names = sorted(file.stem for file in self._folder.iterdir() if file.suffix in _ENDINGS)
            raise InputError(f"--data {self.name} has no {split}.json; it has {', '.join(names) or 'no .json files'}")
        return read_rows(path)

    def _file(self, split: str) -> Path | None:
        candidates = (self._folder / f"{split}{ending}" for ending in _ENDINGS)
        return next((path for path in candidates if path.is_file()), None)


class _Hub(Splits):
    """Reads configurations in the layout of `locuslab/TOFU`, of a repository on the hub or of a folder with its card."""

    cut_from_full = True

    def __init__(self, name: str, place: str) -> None:
        super().__init__(name)
        self._data = HubData("--data", name, place)

    def has(self, split: str) -> bool:
        self.rows("full")  # first, so that data that cannot be reached are an error and not an empty set
        return split in self._configurations

    def read(self, split: str) -> list[Row]:
        return [parse_row(raw, f"{self.name} {split}:{n}") for n, raw in enumerate(self._data.rows(split), start=1)]

    @cached_property
    def _configurations(self) -> list[str]:
        return self._data.configurations()


def open_splits(name: str) -> Splits:
    """Find out whether `name` is the demo, a folder or a hub id. A folder whose README lists configurations is as on the hub.

    Raises:
        InputError: if it looks like a folder and is none.
    """
    if name == DEMO:
        return _Demo(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _Hub(name, str(folder)) if lists_configurations(folder / "README.md") else _Folder(name)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise InputError(f"--data {name}: no such folder; give a folder, a hub id such as locuslab/TOFU, or demo")
    return _Hub(name, name)


def lists_configurations(card: Path) -> bool:
    """Say whether the YAML that a README begins with, between ---, lists configurations; one that cannot be read has none."""
    try:
        front = re.match(r"---\s*\n(.*?\n)---", read_text(str(card), card, "give another"), re.DOTALL)
        matter = yaml.safe_load(front[1]) if front else None
    except (InputError, yaml.YAMLError, ValueError, RecursionError):
        return False
    return isinstance(matter, dict) and bool(matter.get("configs"))
