"""Write files so that a reader never sees half of one: beside the target, then renamed."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dualoptim.errors import InputError, reason

LOCK = ".dualoptim.lock"
"""The file in an output folder that a run holds a lock of; it says who that is, and goes when the run ends."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only writing fails with: a full disk, a quota, a file that may not grow, a file system that is read only."""


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a place for a file or a folder, which takes that of `path` once it is whole; what has become of it goes otherwise.

    The folder around is made if it is missing, but not the one around that: what was removed during a run stays away.
    """
    path.parent.mkdir(exist_ok=True)
    place = path.with_name(path.name + ".tmp")
    remove(place)
    try:
        yield place
        if place.is_dir():
            remove(path)
        os.replace(place, path)
    except RuntimeError:
        raise  # it is whole, and not what it should be: whoever looks into that needs it
    except BaseException:
        with contextlib.suppress(OSError):
            remove(place)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with beside(path) as place:
        place.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text whole or not at all; lines end as they are given."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, small: bool = False) -> None:
    """Write JSON, indented unless `small`; a number that is not finite is an error, because JSON has none."""
    write_text(path, json.dumps(value, indent=None if small else 2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[Any]:
    """Read what `write_json_lines` wrote. Lines end at \\n alone: generated texts hold other separators too."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_json(path: Path, kinds: Mapping[str, type], remedy: str) -> dict[str, Any]:
    """Read an object that a program of ours wrote, whose keys of `kinds` hold values of these.

    Raises:
        InputError: if the file is missing, cut, or holds something else, with the remedy.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no object; {remedy}")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind) or isinstance(value[name], bool):
            raise InputError(f"{path}: {name} is {str(value.get(name))[:60]}; {remedy}")
    return value
