"""Read `--vary`: which flags take several values in a sweep, and which, as they would be typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, get_type_hints
from urllib.parse import quote

import yaml

from dualoptim.config.flags import Flag, default_of, flag_name, flags
from dualoptim.config.optimizers import OPTIMIZERS
from dualoptim.config.spelling import names_of
from dualoptim.config.values import field_value
from dualoptim.errors import InputError, shown

if TYPE_CHECKING:
    from dualoptim.config.args import SweepArgs, UnlearnArgs

_LISTS = {
    "forget_losses": "--forget-losses",
    "learning_rates": "--learning-rates",
    "forget_lr": "--forget-lrs",
    "seed": "--seeds",
    "split": "--split",
    "targets": "--targets",
}
"""Flags whose values have a list of their own."""

_OWN = ("vary", "forget_lrs", "seeds", "budget")


def varied(args: SweepArgs) -> dict[str, list[Any]]:
    """Give the values of every flag of `--vary`, and of several splits.

    Raises:
        InputError: if that is no flag which can be varied, or no value of it.
    """
    found: dict[str, list[Any]] = {"split": [(split,) for split in args.split]} if len(args.split) > 1 else {}
    for given, *texts in (entry or ("",) for entry in args.vary):
        name = given.lstrip("-").replace("-", "_")
        flag = flags(type(args)).get(name)
        if name in _LISTS:
            raise InputError(f"--vary {given} has a list of its own; give {' '.join([_LISTS[name], *map(_typed, texts)])}")
        if not flag or not _varies(name, flag):
            raise InputError(
                f"--vary {shown(given)} is no flag that changes what a run computes; give one such as forget_coeff"
            )
        place = f"--vary {given}"
        if not texts:
            raise InputError(f"{place} has no values; give some, such as --vary forget_coeff 0.1 1")
        if name in found:
            raise InputError(f"{place} is given twice; give all of its values once")
        found[name] = [_value(type(args), name, text, place) for text in texts]
        for value, text in zip(found[name], texts, strict=True):
            if found[name].count(value) > 1:
                raise InputError(f"{place} names {_typed(text)} twice; give each value once")
    return found


def check_single(kind: Any, words: Sequence[str]) -> None:
    """Refuse several values behind a flag that takes one, as `--optim dual-adamw adamw`, if a sweep can try them in turn.

    Raises:
        InputError: saying what to type.
    """
    names, hints, known = names_of(kind), get_type_hints(kind), flags(kind)
    for place, word in enumerate(words):
        name = names.get(word.removeprefix("--").replace("-", "_")) if word.startswith("--") else None
        if name is None or "tuple" in str(hints[name]) or not _varies(name, known[name]):
            continue
        values = [*takewhile(lambda value: not value.startswith("--"), words[place + 1 :])]
        if len(values) > 1:
            several = [_LISTS[name]] if name in _LISTS else ["--vary", name]
            raise InputError(f"{word} takes one value; to try several, type {shlex.join([*several, *values])}")


def _varies(name: str, flag: Flag) -> bool:
    """Tell whether a flag changes what a run computes, and is no list of a sweep's own."""
    return not flag.path and flag.group != "output" and flag.changes not in ("speed", "nothing") and name not in _OWN


def combinations(args: SweepArgs, shared: UnlearnArgs) -> Iterator[tuple[dict[str, str], UnlearnArgs]]:
    """Give `shared` with every combination of varied values, each also in words by the names of their flags.

    Where optimizers are varied, each is given the flags alone that it reads.

    Raises:
        InputError: naming the combination that makes no sense.
    """
    axes = varied(args)
    kinds = {name: OPTIMIZERS[name].reads for name in axes.get("optim", []) if name in OPTIMIZERS}
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        words = {name: in_words(value) for name, value in chosen.items()}
        unread = frozenset().union(*kinds.values()) - kinds.get(chosen.get("optim", ""), frozenset())
        others = {name: default_of(type(shared), name) for name in unread if kinds}
        try:
            yield words, replace(shared, **others | chosen)
        except InputError as error:
            which = ", ".join(f"{name} {_typed(word)}" for name, word in words.items())
            raise InputError(f"--vary {which}: {error}") from None


def in_words(value: Any) -> str:
    """Write a value as it is typed behind `--vary`."""
    if isinstance(value, tuple):
        return ",".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _typed(text: str) -> str:
    """Show a text as it was typed, if a line takes it."""
    return text if text.isprintable() and len(text) < 60 else shown(text)


def in_a_name(words: Mapping[str, str]) -> str:
    """Write varied values into the name of a folder, which differs where they do."""
    return "".join(f"_{name}={quote(value, safe=',+')}" for name, value in words.items())


def _value(kind: type, name: str, text: str, place: str) -> Any:
    """Make a value of a text, as the command line would: with commas between the parts of a list."""
    if text.lower() == "none" and default_of(kind, name) is None:
        return None
    with suppress(InputError):
        return field_value(kind, name, text, place)
    try:
        values = yaml.safe_load(f"[{text}]")
        return field_value(kind, name, values if "," in text else values[0], place)
    except (InputError, IndexError, yaml.YAMLError):
        remedy = f"give one as it is typed behind {flag_name(name)}, with commas between several parts"
        raise InputError(f"{place}: {shown(text)} is no value of that flag; {remedy}") from None
