"""Turn dataclasses into JSON values and back, checking the types of their fields."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_json(value: Any) -> Any:
    """Return the JSON form of a dataclass or of what its fields hold.

    A field stands under its name, or under its metadata's `key`. One that has a default and is None is left out.
    """
    if is_dataclass(value):
        held = {_key(field): (field, getattr(value, field.name)) for field in fields(value)}
        return {key: to_json(part) for key, (field, part) in held.items() if part is not None or not _has_default(field)}
    if isinstance(value, Mapping):
        return {key: to_json(part) for key, part in value.items()}
    return [to_json(part) for part in value] if isinstance(value, (list, tuple)) else value


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Build a `kind` of its JSON form; keys that it does not know are passed over. `where` names the value in messages.

    Raises:
        ValueError: if a value has another type than its field, or a field without a default is missing.
    """
    if get_origin(kind) in (Union, UnionType):
        kinds = get_args(kind)
        if value is None and type(None) in kinds:
            return None
        return from_json(next(one for one in kinds if one is not type(None)), value, where)
    if is_dataclass(kind):
        return _object(kind, value, where)
    if get_origin(kind) is Sequence:
        return [from_json(get_args(kind)[0], part, f"{where}[{n}]") for n, part in enumerate(_checked(list, value, where))]
    if get_origin(kind) is not None:  # a mapping of texts
        part_kind = get_args(kind)[1]
        return {key: from_json(part_kind, part, f"{where}.{key}") for key, part in _checked(dict, value, where).items()}
    return _checked(kind, value, where)


_NAMES = {dict: "an object", list: "a list", str: "a text", float: "a number", int: "a whole number"}


def _checked(kind: type, value: Any, where: str) -> Any:
    """Return a value if it is of this kind; whole numbers are numbers as well."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"{where.lstrip('.') or 'the whole'} is not {_NAMES[kind]}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where.lstrip('.')} has more digits than a score can have")
    return value


def _object(kind: Any, value: Any, where: str) -> Any:
    found, hints = _checked(dict, value, where), _hints(kind)
    given = {}
    for field in fields(kind):
        if _key(field) in found:
            given[field.name] = from_json(hints[field.name], found[_key(field)], f"{where}.{_key(field)}")
        elif not _has_default(field):
            raise ValueError(f"{where.lstrip('.') or 'the whole'} has no {_key(field)}")
    return kind(**given)


_hints = cache(get_type_hints)


def _key(field: Field[Any]) -> str:
    return field.metadata.get("key", field.name)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
