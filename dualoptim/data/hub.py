"""Load data sets of the hub, and folders in its layout, through the library `datasets`."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualoptim.config.waiting import waiting
from dualoptim.errors import InputError, OutOfReachError, blamed

REMEDY = "check the name and the network, or give a local folder"


@dataclass(frozen=True)
class HubData:
    """Names a data set: the flag that gives it, its name there, and where it lies (a hub id or a folder)."""

    flag: str
    name: str
    place: str

    def configurations(self) -> list[str]:
        """List the names of its configurations.

        Raises:
            InputError: if it cannot be reached.
        """
        import datasets  # takes a second to import and is needed for this layout alone

        with self._reached(), _readable(self.place) as (place, cache):
            return datasets.get_dataset_config_names(place, cache_dir=cache)

    def rows(self, configuration: str, split: str = "train") -> list[dict[str, Any]]:
        """Load all rows of one split.

        Raises:
            InputError: if it cannot be loaded.
        """
        import datasets

        what = f"configuration {configuration!r} cannot be loaded"
        with self._reached(what), _readable(self.place) as (place, cache):
            return [dict(row) for row in datasets.load_dataset(place, configuration, split=split, cache_dir=cache)]

    def only(self, configuration: str, split: str) -> list[dict[str, Any]]:
        """Load all rows of the split that is named; where a name is empty, there must be only one to choose.

        Raises:
            InputError: naming the choices, or if it cannot be loaded.
        """
        import datasets

        configuration = configuration or self._one_of("configurations", self.configurations(), self.name)
        if not split:
            with self._reached(), _readable(self.place) as (place, cache):
                splits = datasets.get_dataset_split_names(place, configuration, cache_dir=cache)
            split = self._one_of("splits", list(map(str, splits)), f"{self.place}:{configuration}")
        return self.rows(configuration, split)

    @contextmanager
    def _reached(self, what: str = "cannot be loaded") -> Iterator[None]:
        """Put a library's errors into one line, that of a data set which is out of reach if it is no folder here.

        A library asks a network that is not there again and again, half a minute long.
        """
        is_here, first = os.path.isdir(self.place), os.environ.get("RANK", "0") == "0"
        try:
            with waiting(f"asking the hub for {self.place}", first and not is_here), blamed(self.flag, self.name, REMEDY, what):
                yield
        except InputError as error:
            raise error if is_here else OutOfReachError(str(error)) from None

    def _one_of(self, what: str, names: list[str], before: str) -> str:
        if len(names) != 1:
            shown = ", ".join(names) or "none"
            raise InputError(
                f"{self.flag} {self.name}: its {what} are {shown}; give one, such as {before}:{(names or ['train'])[0]}"
            )
        return names[0]


@contextmanager
def _readable(place: str) -> Iterator[tuple[str, str | None]]:
    """Give a folder as the library can read it, and the folder of its cache, None for the usual one of data sets of the hub.

    It would leave a copy of a folder's rows in the user's home, so theirs goes when they are read. It takes brackets in a path
    for a pattern and matches nothing, so such a folder is copied.
    """
    if not os.path.isdir(place):
        yield place, None
        return
    with tempfile.TemporaryDirectory() as other:
        if glob.escape(os.path.abspath(place)) != os.path.abspath(place):
            place = str(shutil.copytree(place, Path(other) / "data"))
        yield place, str(Path(other) / "cache")
