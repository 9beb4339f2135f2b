"""The room's README: its tables of flags are those of the code."""

from pathlib import Path

import pytest

from dualoptim.config import args as module
from dualoptim.config.args import EvalArgs, FinetuneArgs, SweepArgs, UnlearnArgs
from dualoptim.config.flags import GROUPS, default_of, flag_name, flags, helps

README = (Path(module.__file__).parent / "README.md").read_text(encoding="utf-8")


def shown(kind, name) -> str:
    """A flag's default as one would type it."""
    value = default_of(kind, name)
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def flag_rows(kind, group, known=()) -> str:
    """The rows of a group of flags as the README should have them; print them to renew the README."""
    lines = []
    for name, flag in flags(kind).items():
        if flag.group == group and name not in known:
            text = helps(kind)[name].replace("|", "\\|")
            lines.append(f"| `{flag_name(name)}` | {shown(kind, name)} | {flag.changes} | {text} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Every table by its title: all flags of unlearning, then what other commands have beside them."""
    found = {group: flag_rows(UnlearnArgs, group) for group in GROUPS}
    known = set(flags(UnlearnArgs))
    for title, kind in (("finetune", FinetuneArgs), ("eval", EvalArgs), ("sweep", SweepArgs)):
        found[title] = "\n".join(rows for group in GROUPS if (rows := flag_rows(kind, group, known)))
    return {title: rows for title, rows in found.items() if rows}


@pytest.mark.parametrize("title", tables())
def test_the_tables_of_flags_are_those_of_the_fields(title):
    assert tables()[title] in README, tables()[title]
