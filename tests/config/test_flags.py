"""What stands on the flags: groups, bounds and texts of every field, and the help that follows from them."""

import dataclasses
import json
import math
import resource
import subprocess
import sys
from itertools import pairwise
from typing import get_type_hints

import pytest
from support import ROOT

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs
from dualoptim.config.args import AskArgs, ExportArgs, ReportArgs
from dualoptim.config.flags import GROUPS, Flag, default_of, flag_name, flags, helps

KINDS = [UnlearnArgs, SweepArgs, FinetuneArgs, EvalArgs, ReportArgs, AskArgs, ExportArgs]


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_flag_and_a_text(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert flags(kind).keys() == names
    assert helps(kind).keys() == names
    for name, text in helps(kind).items():
        assert text[0].isupper() or text.startswith(("`", "dual-adamw:")), name
        assert text.endswith("."), name
        assert "\n" not in text, name


@pytest.mark.parametrize("kind", KINDS)
def test_flags_come_group_by_group_in_the_order_of_their_fields(kind):
    groups = [flag.group for flag in flags(kind).values()]
    assert groups == sorted(groups, key=GROUPS.index)
    order = [field.name for field in dataclasses.fields(kind)]
    for group in set(groups):
        own = [name for name, flag in flags(kind).items() if flag.group == group]
        assert own == sorted(own, key=order.index)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_every_command_shares_is_the_same(kind):
    """A subclass may add flags, but says nothing else of those that it inherits."""
    for name, text in helps(kind).items():
        assert all(helps(base).get(name, text) == text for base in KINDS if issubclass(kind, base))
    assert flag_name("forget_lr") == "--forget-lr"


@pytest.mark.parametrize(
    ("flag", "numbers", "words"),
    [
        (Flag("steps", at_least=1), "a number", "1 or more"),
        (Flag("steps", above=0), "a number", "a number above 0"),
        (Flag("steps", above=0, at_most=1), "a number", "a number above 0, up to 1"),
        (Flag("steps", at_least=0, below=1), "two numbers", "two numbers from 0 up to but not 1"),
        (Flag("steps", at_least=0, below=2**32), "a number", "0 or more, below 2**32"),
    ],
)
def test_bounds_in_words(flag, numbers, words):
    assert flag.has_bounds
    assert flag.bounds(numbers) == words


def test_what_holds():
    closed, half_open, opened = Flag("steps", at_least=0), Flag("steps", at_least=0, below=1), Flag("steps", above=0, at_most=1)
    assert [closed.holds(value) for value in (-1, 0, 1e300)] == [False, True, True]
    assert [half_open.holds(value) for value in (-0.1, 0, 0.999, 1)] == [False, True, True, False]
    assert [opened.holds(value) for value in (0, 1e-9, 1, 1.1)] == [False, True, True, False]
    assert not any(flag.holds(value) for flag in (closed, half_open, opened) for value in (math.inf, math.nan))
    assert not Flag("model").has_bounds


BOUNDED = [(kind, name) for kind in KINDS[:4] for name, flag in flags(kind).items() if flag.has_bounds]


@pytest.mark.parametrize(("kind", "name"), BOUNDED, ids=[f"{kind.__name__} {name}" for kind, name in BOUNDED])
def test_the_first_value_outside_is_refused_in_one_line(kind, name):
    flag, default = flags(kind)[name], default_of(kind, name)
    first_outside = {
        flag.at_least: flag.at_least - 1,
        flag.above: flag.above,
        flag.below: flag.below,
        flag.at_most: flag.at_most + 1,
    }
    outside = [value for bound, value in first_outside.items() if math.isfinite(bound)]
    assert outside
    takes_floats = "float" in str(get_type_hints(kind)[name])
    for value in (*outside, math.nan) if takes_floats else outside:
        several = isinstance(default, tuple) or name.endswith("betas")
        with pytest.raises(InputError, match=f"^{flag_name(name)} .* is out of range; give ") as error:
            kind(**{name: (value, value) if several else value})
        assert "\n" not in str(error.value)


def test_defaults_are_within_their_bounds():
    for kind in (UnlearnArgs, SweepArgs, FinetuneArgs, EvalArgs):
        kind()


# ------------------------------------------------------------------------------------------------------------------- help

COMMANDS = {
    "train_unlearn.py": ([str(ROOT / "train_unlearn.py")], UnlearnArgs),
    "eval_tofu.py": ([str(ROOT / "eval_tofu.py")], EvalArgs),
    "dualoptim finetune": (["-m", "dualoptim", "finetune"], FinetuneArgs),
}
WIDTH = 100


def run_help(command):
    env = {"COLUMNS": str(WIDTH), "PYTHONPATH": str(ROOT), "PATH": ""}
    line = [sys.executable, *command, "--help"]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, env=env, cwd=ROOT, check=True).stdout


@pytest.fixture(scope="module")
def texts():
    return {name: run_help(command) for name, (command, _) in COMMANDS.items()}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_takes_less_than_two_seconds_of_a_core(name):
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_help(COMMANDS[name][0])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 2, taken


@pytest.mark.parametrize("word", ["train_unlearn.py", "eval_tofu.py", "unlearn", "eval", "finetune", "sweep", "report", "plan"])
def test_help_waits_for_no_library_that_it_does_not_need(word):
    script = f"""
import json, runpy, sys
sys.argv = [{word!r}, "--help"]
try:
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv.insert(0, "dualoptim")
        runpy.run_module("dualoptim", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
print(json.dumps([name for name in ("torch", "transformers", "datasets", "accelerate") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("name", list(COMMANDS))
def test_headings_are_the_groups_in_their_order(name, texts):
    headings = [line.split()[1] for line in texts[name].splitlines() if line.startswith("╭─ ") and " options ─" in line]
    present = {flag.group for flag in flags(COMMANDS[name][1]).values()}
    assert [heading for heading in headings if heading not in ("options", "defaults")] == [g for g in GROUPS if g in present]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_flag_stands_under_its_heading(name, texts):
    kind, group, found = COMMANDS[name][1], "", {}
    for line in texts[name].splitlines():
        if line.startswith("╭─ "):
            group = line.split()[1]
        elif line.startswith("│ --"):
            found[line.split()[1].rstrip(",")] = group
    expected = {flag_name(field): flag.group for field, flag in flags(kind).items()}
    assert {flag: group for flag, group in found.items() if group != "defaults"} == expected


def ragged(text):
    """Lines of help texts after which the next line's first word would have had room."""
    lines = [line[2:-2] for line in text.splitlines() if line.startswith("│ ")]
    column = next(line.index("show this help") for line in lines if "show this help" in line)  # where texts stand
    for line, following in pairwise(lines):
        is_text = line[column - 2 : column] == "  " and line[column] != " "
        goes_on = following.startswith(" " * column)
        if is_text and goes_on and len(line.rstrip()) + 1 + len(following.split()[0]) <= len(line):
            yield line.rstrip()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_line_of_help_ends_early(name, texts):
    """A line break of the source inside a text would stand in the middle of a paragraph."""
    assert list(ragged(texts[name])) == []


def test_a_line_that_ends_early_would_be_seen(texts):
    lines = texts["train_unlearn.py"].splitlines()
    place = next(number for number, line in enumerate(lines) if "Model to start from: a hub" in line)
    lines[place] = lines[place].split(" hub")[0].ljust(WIDTH - 2) + " │"
    (line,) = ragged("\n".join(lines))
    assert line.endswith("Model to start from: a")
