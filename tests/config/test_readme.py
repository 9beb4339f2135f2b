"""The room's README: its tables of flags are those of the code."""

import re
from pathlib import Path

import pytest

from dualoptim.config import args as module
from dualoptim.config.args import EvalArgs, FinetuneArgs, SweepArgs, UnlearnArgs
from dualoptim.config.cli import parse
from dualoptim.config.flags import GROUPS, default_of, flag_name, flags, helps
from dualoptim.config.spelling import elsewhere, names_of
from dualoptim.data.declaration import benchmarks

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


def test_the_help_names_every_benchmark_of_the_package():
    """Or that of which it is a part or a form: lume, muse-news, rwku-phi."""
    said = re.split(r"[\s,]+", helps(UnlearnArgs)["benchmark"])
    assert all(set(said) & {name, name.rpartition("-")[0]} for name in benchmarks())


def test_the_table_of_published_names_is_true():
    """Each stands for the flag beside it, which the command line takes under that name where it is a flag of its own here."""
    (table,) = re.findall(r"\| published name .*\n\|---.*\n((?:\|.*\n)+)", README)
    names, found = names_of(UnlearnArgs), {}
    for row in table.splitlines():
        name, flag, default, meaning = (cell.strip(" `") for cell in row.strip("|").split("|"))
        field = flag.removeprefix("--").replace("-", "_")
        found[name] = field
        assert default == shown(UnlearnArgs, field), name
        assert names.get(name) == field or elsewhere(UnlearnArgs, name) == flag, name
        assert meaning.endswith("."), name
    theirs = "forget_losses task_list learning_rates forget_coeff regularization_coeff num_epochs split mask use_LoRA".split()
    assert list(found)[: len(theirs)] == theirs
    assert set(theirs) <= set(names)


def test_published_commands_are_presets_on_two_processes(capsys):
    """So that a step takes as many rows as theirs, which parsing would say otherwise."""
    commands = re.findall(r"^    accelerate launch --num_processes 2 train_unlearn.py (.*)$", README.replace("\\\n", ""), re.M)
    assert len(commands) == 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        found = [parse(UnlearnArgs, command.split()) for command in commands]
    assert capsys.readouterr().out == ""
    assert [len(args.task_list) for args in found] == [1, 1, 1, 10, 10, 1, 1, 1, 1, 1]
    assert [args.forget_coeff for args in found] == [1, 0.1, 1, 1, 1, 0.5, 1, 1, 1, 1]
    assert [args.mask for args in found] == [True, False, True, False, True, False, True, True, True, True]
