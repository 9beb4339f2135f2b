"""Open what a user names: a file is read whole, and one line says why if it cannot be."""

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from dualoptim.errors import InputError, reason


def read_bytes(what: str, path: str | Path, remedy: str) -> bytes:
    """Read a file; `what` names it in errors, and `remedy` says what to give instead.

    Raises:
        InputError: if there is none, it is a folder, a pipe or a device (which may never end), or it cannot be read.
    """
    try:
        path = Path(path).expanduser()
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return path.read_bytes()
        why = "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device"
    except (OSError, ValueError, RuntimeError) as error:  # also a name with NUL, and `~` of nobody
        why = getattr(error, "strerror", None) or reason(error)
    raise InputError(f"{what}: cannot be read ({why}); {remedy}")


def read_text(what: str, path: str | Path, remedy: str) -> str:
    """Read a file of UTF-8 text, without the marks that editors put before it. Arguments are those of `read_bytes`.

    Raises:
        InputError: as `read_bytes` does, or naming the line that is not such text.
    """
    return decoded(what, read_bytes(what, path, remedy))


def decoded(what: str, content: bytes) -> str:
    """Make text of the bytes of a file, which `what` names in errors.

    Raises:
        InputError: naming the line that is not UTF-8, or holds a zero byte, as every second one of UTF-16 is.
    """
    place, zero = -1, content.find(b"\0")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start
    if zero >= 0 and not 0 <= place < zero:
        place = zero
    if place >= 0:
        line = content.count(b"\n", 0, place) + 1
        raise InputError(f"{what}:{line}: not UTF-8 text (byte {content[place]:#04x}); save the file as UTF-8")
    return text.lstrip("\ufeff")


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML as runs write it: names that stand twice are mistakes, and so are aliases, a few of which can be gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias, which no run writes", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for name in (key.value for key, _ in node.value if isinstance(key.value, str)):
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(what: str, path: str | Path, remedy: str) -> Any:
    """Read what a YAML file holds. Arguments are those of `read_bytes`.

    Raises:
        InputError: as `read_text` does, or if it is not YAML as runs write it.
    """
    return parse_yaml(what, read_text(what, path, remedy), remedy)


def parse_yaml(what: str, text: str, remedy: str) -> Any:
    """Make of the text of a YAML file what it holds.

    Raises:
        InputError: if it is not YAML as runs write it.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or a number that Python has none of is a ValueError
        raise InputError(f"{what} is not YAML ({reason(error)}); {remedy}") from None
