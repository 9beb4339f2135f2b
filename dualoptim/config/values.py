"""Make a field's value of what a user gives: typed, in YAML, or from Python, where notebooks have paths and numpy's numbers."""

import contextlib
import errno
import os
import types
import typing
from functools import cache
from typing import Any, Literal

from dualoptim.config.flags import Flag, default_of, flag_name, flags
from dualoptim.errors import InputError, shown


def expect(args: Any, kind: type) -> None:
    """Make sure that a function of the Python interface gets the arguments that are its own, and all that it needs.

    Raises:
        InputError: naming what it got and what it takes.
    """
    if not isinstance(args, kind):
        raise InputError(f"{shown(args)} is not what this function takes; give {kind.__name__}(...)")
    if missing := getattr(args, "missing", None):
        raise InputError(missing)


def settle(args: Any) -> None:
    """Give every flag of `args` a value of its type: tuples for lists and single values, `~` in paths replaced.

    Raises:
        InputError: if a value has another type, or is empty where that means nothing.
    """
    for name in flags(type(args)):
        object.__setattr__(args, name, field_value(type(args), name, getattr(args, name)))


def field_value(kind: Any, name: str, value: Any, place: str = "") -> Any:
    """Make the value of one field of `kind`; `place` says in errors where it stands, which else is the flag.

    Raises:
        InputError: as `settle` does.
    """
    flag, place = flags(kind)[name], place or flag_name(name)
    value = _convert(place, value, _hints(kind)[name])
    if name == "relearn":
        value = tuple(filter(None, value))  # no steps are no relearning: 0, as older runs wrote it, is the same as none
    if value == () and default_of(kind, name) is None:
        raise InputError(f"{place} is empty; give a value, or leave it out")
    return _checked(place, value, flag)


_hints = cache(typing.get_type_hints)


def _checked(place: str, value: Any, flag: Flag) -> Any:
    """Check a text, or all of a list, and write a path out; other values stay."""
    if isinstance(value, tuple):
        return tuple(_checked(place, one, flag) for one in value)
    if not isinstance(value, str):
        return value
    if not value.strip() and not flag.may_be_empty:
        raise InputError(f"{place} is empty; give a value, or leave it out")
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{place} {value!r} is not UTF-8 text; give one that is")
    if "\0" in value:
        raise InputError(f"{place} {shown(value)} holds a NUL character; give a text without")
    return _path(place, value, flag.group == "output") if flag.path else value


def _path(place: str, value: str, is_folder: bool) -> str:
    """Write `~` out, and refuse what no file can be, or no folder: the system is asked, with room for the names in a folder."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise InputError(f"{place} {value}: no such home folder; give the whole path, or ./{value} for a name with a ~")
    try:
        os.stat(os.path.join(os.path.abspath(path), "x" * 200))
    except OSError as error:
        if error.errno != errno.ENOENT and (is_folder or error.errno != errno.ENOTDIR):
            raise InputError(f"{place} {value}: {error.strerror}; give another path") from None
    return path


def _convert(place: str, value: Any, hint: Any) -> Any:
    """A value as the field's type: YAML reads 1e-5 as a string and a tuple as a list, and one value is a list of one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        with contextlib.suppress(Exception):  # it then has the wrong type
            value = value.tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = str.__str__(value)  # of an enumeration's member, what it stands for
    target = next(option for option in options if option is not type(None))
    origin, inner = typing.get_origin(target), typing.get_args(target)
    try:
        if origin is tuple:
            items = list(value) if isinstance(value, (list, tuple, range)) else [value]
            if inner[-1] is not Ellipsis and len(inner) != len(items):
                raise ValueError
            return tuple(_convert(place, item, inner[0]) for item in items)
        if origin is Literal and any(value == one and type(value) is type(one) for one in inner):
            return value
        if target is float and not isinstance(value, bool):
            return float(value)
        if origin is None and type(value) is target:
            return value
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        wanted = f"one of {', '.join(map(str, inner))}" if origin is Literal else getattr(target, "__name__", str(target))
        raise InputError(f"{place}: {shown(value)} has the wrong type; give {wanted}") from None
