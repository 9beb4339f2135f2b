"""The data sets that tasks of lm-eval read: of a folder that has them as the hub has, or of the hub itself."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualoptim.data.files import ENDINGS, kind_of, records
from dualoptim.errors import InputError, reason

_KNOWN: dict[str, Any] = {}  # what has been loaded in this process, for each evaluation loads all anew


@contextlib.contextmanager
def read_from(folder: str | None) -> Iterator[None]:
    """Have tasks find their data sets in a folder, as `owner/name/configuration/split.parquet`; those that it lacks on the hub.

    Other endings are .json, .jsonl and .csv; `split-00000-of-00001.parquet` is one part of a split, as the hub names them.

    Raises:
        InputError: naming a data set that is in neither, and where it may be put.
    """
    import datasets

    loads = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        key = repr((folder, path, name, options))
        if key not in _KNOWN:
            found = _read(Path(folder).expanduser() / path / (name or "")) if folder else None
            try:
                _KNOWN[key] = loads(path, name, **options) if found is None else found
            except Exception as error:  # of the network, of the cache, of the data: all kinds
                what = " ".join(filter(None, [path, name]))
                place = f"{folder or 'FOLDER'}/{path}/{f'{name}/' if name else ''}test.parquet"
                raise InputError(
                    f"the data set {what} cannot be loaded ({reason(error)}); check the network, or put it into {place} and "
                    f"give --lm-eval-data {folder or 'FOLDER'}"
                ) from None
        return _KNOWN[key]

    datasets.load_dataset = load  # lm-eval has no switch for this, and looks it up whenever it loads
    try:
        yield
    finally:
        datasets.load_dataset = loads


def _read(place: Path) -> Any:
    """Read all splits of a configuration that lies in a folder; None if there is none."""
    import datasets

    files = [file for file in sorted([*place.glob("data/*"), *place.glob("*")]) if kind_of(file) in ENDINGS and file.is_file()]
    splits: dict[str, list[Any]] = {}
    for file in files:
        splits.setdefault(file.name.partition(".")[0].partition("-")[0], []).extend(raw for _, raw in records(file))
    found = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    return datasets.DatasetDict(found) if found else None
