"""Make values of the types that a declaration has of what its YAML says, and name the key of what has another type."""

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dualoptim.errors import InputError, shown


def built(kind: Any, raw: Any, where: str) -> Any:
    """Make a value of a type that declarations have of what YAML says.

    Raises:
        InputError: naming the key, if it is unknown or its value has another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        hints, names = typing.get_type_hints(kind), [one.name for one in fields(kind)]
        for key in _mapping(raw, where):
            if key not in names:
                raise InputError(f"{where}: unknown key {shown(key)}; take {', '.join(names)}")
        return kind(**{key: built(hints[key], value, _under(where, key)) for key, value in raw.items()})
    if origin is tuple:
        return tuple(built(inner[0], one, where) for one in (raw if isinstance(raw, list) else [raw]))
    if kind is Any:
        return raw
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {str(key): built(inner[1], value, _under(where, key)) for key, value in _mapping(raw, where).items()}
    wanted = next(one for one in (inner or (kind,)) if one is not type(None))
    if wanted is float and type(raw) is int and abs(raw) < 2**53:
        return float(raw)
    if type(raw) is not wanted or (wanted is int and raw < 0):
        raise InputError(f"{where} is {shown(raw)}; give {_NAMES[wanted]}")
    return raw


_NAMES = {str: "a text", int: "a whole number from 0", float: "a number", bool: "true or false"}


def _mapping(raw: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where} is {shown(raw)}; give `name: value` lines")
    return raw


def _under(where: str, key: object) -> str:
    """Name a key of a declaration: `--benchmark lume: rows.forget.file`."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"
