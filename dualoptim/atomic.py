"""Write files so that a reader never sees half of one: beside the target, then renamed."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dualoptim.errors import InputError, reason


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; a number that is not finite is an error, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
