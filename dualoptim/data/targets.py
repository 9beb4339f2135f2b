"""Find the tasks that `--targets` names: what a benchmark can forget one by one, such as the people of RWKU."""

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TypeVar

from dualoptim.config.args import EvalArgs, MeasureArgs, UnlearnArgs
from dualoptim.config.flags import default_of
from dualoptim.config.opening import read_text
from dualoptim.data.benchmark import Benchmark
from dualoptim.errors import InputError

A = TypeVar("A", bound=MeasureArgs)


def with_targets(args: A) -> A:
    """Say which tasks `--targets` are, by the names that the benchmark has for them; each starts from the first model.

    Raises:
        InputError: if the benchmark has no such target, or tasks are named as well.
    """
    if args.targets is None:
        return args
    benchmark = Benchmark(args)
    if not benchmark.targets:
        raise InputError(f"--targets: {benchmark.name} has none to choose from; drop it")
    numbers = _numbers(_names(args.targets), benchmark)
    names = tuple(benchmark.targets[number - 1] for number in numbers)
    if isinstance(args, EvalArgs):
        if len(numbers) > 1:
            raise InputError(f"--targets names {len(numbers)}, and a model is measured on one; give that")
        _only(args, "task", numbers[0])
        return replace(args, targets=names, task=numbers[0])
    if isinstance(args, UnlearnArgs):
        _only(args, "task_list", numbers)
        return replace(args, targets=names, task_list=numbers, tasks_independent=True)
    return args


def _only(args: MeasureArgs, name: str, said: object) -> None:
    if getattr(args, name) not in (said, default_of(type(args), name)):
        raise InputError(f"--targets and --{name.replace('_', '-')} both say what is forgotten; give one of them")


def _names(targets: Sequence[str]) -> list[str]:
    """Read the names out of a file, if that is what is given."""
    path = targets[0] if len(targets) == 1 else ""
    if not path.endswith(".txt"):
        return list(targets)
    text = read_text(f"--targets {path}", path, "give a text file with one name a line")
    if not (names := [line.strip() for line in text.splitlines() if line.strip()]):
        raise InputError(f"--targets {path}: holds no lines; write one name a line")
    return names


def _numbers(names: Sequence[str], benchmark: Benchmark) -> tuple[int, ...]:
    """Find the numbers of targets by their names, or by those of their folders, such as 1_Stephen_King."""
    if list(names) == ["all"]:
        return tuple(range(1, len(benchmark.targets) + 1))
    known = {_plain(target): number for number, target in enumerate(benchmark.targets, start=1)}
    found: list[int] = []
    for name in names:
        number = known.get(_plain(name)) or known.get(_plain(re.sub(r"^\d+_", "", name)))
        if number is None:
            near = get_close_matches(_plain(name), known, n=1, cutoff=0)
            shown = benchmark.targets[known[near[0]] - 1]
            has = f"{benchmark.name} has {len(benchmark.targets)} targets, and none of this name"
            raise InputError(f"--targets {name!r}: {has}; the nearest is {shown!r}")
        if number in found:
            raise InputError(f"--targets names {benchmark.targets[number - 1]!r} twice; give each once")
        found.append(number)
    return tuple(found)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
