"""Read flags as the published scripts and their YAML spell them: `--mask true`, `--use_LoRA`, `--task_list 1,2`, `lr`.

tyro takes dashes for underscores and other names by itself (`Flag.aliases`), but a word after a switch only where the switch
has no `--no-` form. So the words of switches are joined to them here, before it sees them.
"""

import re
import shlex
from collections import deque
from collections.abc import Sequence
from typing import Any, get_type_hints

from dualoptim.config.flags import default_of, flag_name, flags
from dualoptim.errors import InputError, shown

_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}

_LISTS = ("forget_file", "retain_file", "holdout_file", "targets", "vary")
"""Flags of several texts that may hold a =."""

_NUMBERS = re.compile(r"[-+.\deE]+([,\s]+[-+.\deE]+)+")

_VALUES_DIFFER = {
    "optim_cfg": "optim",
    "alternate": "optim",
    "save_steps": "save_model_every",
    "eval_steps": "eval_every",
    "beta1": "adam_betas",
    "beta2": "adam_betas",
    "base_beta1": "base_betas",
    "base_beta2": "base_betas",
}
"""Published names of settings that flags of other names and values make here."""


def names_of(kind: Any) -> dict[str, str]:
    """List every name that a flag of `kind` goes by, with that of its field."""
    return {name: field for field, flag in flags(kind).items() for name in (field, *flag.aliases)}


def spelled(kind: Any, words: Sequence[str]) -> list[str]:
    """Write `--mask true` and `--mask=true` as `--mask`, `--mask false` as `--no-mask`, numbers with commas as words.

    Raises:
        InputError: if a switch is given another value, or if words are `name=value` without dashes, with what to type instead.
    """
    _check_dashes(kind, words)
    switches = {name: field for name, field in names_of(kind).items() if _is_switch(kind, field)}
    # a bare word after a switch may be a positional one, as the RUN of a report, whose folder may be called 1
    has_positional = any(not hasattr(kind, field) for field in flags(kind))
    after = {"true", "false"} if has_positional else _WORDS.keys()
    hints = get_type_hints(kind)
    lists = {name for name, field in names_of(kind).items() if _has_numbers(str(hints.get(field)))}
    found, left, flag = list[str](), deque(words), ""
    while left:
        word = left.popleft()
        name, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
        on = name in switches
        field = switches.get(name) or switches.get(name.removeprefix("no_"))
        if not word.startswith("--") or field is None:
            is_flag = word.startswith("--")
            flag, text = (name, word.partition("=")[2]) if is_flag else (flag, word)
            parts = re.split(r"[,\s]+", text) if flag in lists and _NUMBERS.fullmatch(text) else []
            found += [word.partition("=")[0]] * is_flag + parts if parts else [word]
            continue
        if not equals:
            bare = left and not has_positional and not left[0].startswith("-")
            value = left.popleft() if bare or (left and left[0].lower() in after) else "true"
        if value.lower() not in _WORDS:
            word = word if equals else f"{word} {value}"
            raise InputError(f"{word} is neither true nor false; give {flag_name(field)} or {_off(field)}")
        found.append(flag_name(field) if _WORDS[value.lower()] == on else _off(field))
    return found


def typed(kind: Any, words: Sequence[str]) -> set[str]:
    """Name the fields whose flags stand among the words."""
    said = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return {field for name, field in names_of(kind).items() if name in said or f"no_{name}" in said}


def elsewhere(kind: Any, name: str) -> str:
    """Give the flag that makes what a published name says, with values of its own; none where `kind` has no such flag."""
    field = _VALUES_DIFFER.get(name)
    return flag_name(field) if field in flags(kind) and name not in names_of(kind) else ""


def _is_switch(kind: Any, field: str) -> bool:
    return isinstance(default_of(kind, field), bool)


def _has_numbers(hint: str) -> bool:
    return "tuple[" in hint and ("int" in hint or "float" in hint)


def _off(field: str) -> str:
    return flag_name(f"no_{field}")


def _check_dashes(kind: Any, words: Sequence[str]) -> None:
    """Refuse flags of one dash, and settings as the published scripts hand them to theirs: `forget_losses=ME+GD lr=1e-5`.

    Raises:
        InputError: saying what to type.
    """
    names, flag = names_of(kind), ""
    for word in words:
        name, equals, value = word.partition("=")
        if re.match("-[^-]{2}", word) and (field := names.get(name[1:].replace("-", "_"))):
            raise InputError(f"{name}: a flag begins with two dashes; type {flag_name(field)}{equals}{value}")
        if word.startswith("--") and (other := elsewhere(kind, name[2:].replace("-", "_"))):
            raise InputError(f"{name}: the published scripts' name; the flag here is {other}, whose values --help lists")
    pairs = {}
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--"):
            flag = word
        elif (said := re.fullmatch(r"(\w+)=(.*)", word)) and not _is_value(kind, flag, before == flag):
            pairs[word] = said.groups()
    if not any(name in names for name, _ in pairs.values()):
        return
    typed = [_typed(kind, names[name], value) for name, value in pairs.values() if name in names]
    unknown = [name for name, _ in pairs.values() if name not in names]
    others_of = {name: elsewhere(kind, name) for name in unknown}
    rest = "".join(f"; {name}: see {other} in --help" for name, other in others_of.items() if other)
    rest += f"; {', '.join(left)}: no flag here" if (left := [name for name in unknown if not others_of[name]]) else ""
    others = "forget_losses" in flags(kind) and "--preset" not in words
    more = " (--preset gives the other settings of a published run; alone it lists them)" if others else ""
    line = f"a setting is a flag here, with dashes before its name{more}; type {' '.join(typed)}{rest}"
    raise InputError(f"{' '.join(pairs)}: {line}")


def _is_value(kind: Any, flag: str, is_first: bool) -> bool:
    """Tell whether a word with a = may be a value of the flag before it: the first behind one of a text, each of a list."""
    field = names_of(kind).get(flag.removeprefix("--").replace("-", "_"))
    if field is None:
        return is_first and flag == "--config"
    return field in _LISTS or (is_first and isinstance(default_of(kind, field), str | None))


def _typed(kind: Any, field: str, value: str) -> str:
    """Write a setting as it is typed; lists stand in brackets in a shell's script, or with commas."""
    if _is_switch(kind, field) and value.lower() in _WORDS:
        return flag_name(field) if _WORDS[value.lower()] else _off(field)
    default = default_of(kind, field)
    values = value.strip("()[]").replace(",", " ").split() if isinstance(default, tuple) else [value]
    return shlex.join([flag_name(field), *values])


def fields_of(kind: Any, values: dict[Any, Any], place: str) -> dict[Any, Any]:
    """Give settings by the names of the fields that their keys stand for; unknown keys stay.

    Raises:
        InputError: if two keys stand for the same field.
    """
    names, found = names_of(kind), dict[Any, Any]()
    for key, value in values.items():
        field = names.get(key, key)
        if field in found:
            raise InputError(f"{place}: {shown(key)} and another name of {flag_name(field)} both stand there; keep one")
        found[field] = value
    return found
