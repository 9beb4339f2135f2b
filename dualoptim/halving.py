"""Choose the runs of a sweep that takes only some of them: many settings with one seed, the better half with one more."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from math import ceil
from pathlib import Path

from dualoptim.data.stream import seeded
from dualoptim.errors import InputError
from dualoptim.reporting.frontier import RATES, chief_kind, methods_of, reached
from dualoptim.reporting.results import Columns

_SEED = 0  # of the draw of settings: not the training's

Setting = tuple[str, ...]
"""The names of the runs of a setting, one per seed."""


class Halving:
    """Plans a sweep by successive halving (arXiv 1502.07943): settings are tried, and the better ones with more seeds.

    The first round takes every setting with the first seed; of more than there may be runs it takes a draw, evenly from all
    methods. Each later round takes the better half of what every method had in the last one, with the next seed. A setting is
    all that varies but the seed; methods, and which setting of one is better, are those of the frontier.
    """

    def __init__(self, runs: Mapping[str, Columns], budget: int) -> None:
        """Take at most `budget` of `runs`: names of folders, each with its line of results.csv without scores.

        Raises:
            InputError: if that is less than a run for every method, or all of them.
        """
        by_setting: dict[Setting, list[str]] = {}
        for name, line in runs.items():
            by_setting.setdefault(_without(line, ("seed", "folder")), []).append(name)
        settings = [tuple(names) for names in by_setting.values()]
        methods: dict[Setting, list[Setting]] = {}
        for names in settings:
            methods.setdefault(_without(runs[names[0]], ("seed", "folder", "learning_rate", "forget_lr", *RATES)), []).append(
                names
            )
        if budget < len(methods):
            raise InputError(f"--budget {budget} is less than a run for each of the {len(methods)} methods; give that or more")
        if budget >= len(runs):
            raise InputError(f"--budget {budget} is enough for all of the {len(runs)} runs; drop it, or give less")
        drawn = list(methods.values())
        if budget < len(settings):
            drawn = [[own[n] for n in seeded(_SEED, "budget").permutation(len(own))] for own in drawn]
            chosen = set(_in_turns(drawn)[:budget])
            drawn = [[names for names in own if names in chosen] for own in methods.values()]
        self._budget, self._settings, self._drawn = budget, settings, drawn

    @property
    def first(self) -> list[str]:
        """Name the runs of the first round, method by method."""
        return [names[0] for own in self._drawn for names in own]

    @property
    def total(self) -> int:
        """Count the runs that are taken if none fails."""
        sizes, rounds = [len(own) for own in self._drawn], range(len(self._settings[0]))
        return min(self._budget, sum(ceil(size / 2**number) for number in rounds for size in sizes))

    def order(self, lines: Sequence[Columns]) -> Iterator[str]:
        """Name one run after another; `lines` of results.csv are to hold those before when the next one is asked for."""
        left, chosen = self._budget, self.first
        for number in range(len(self._settings[0])):
            yield from chosen[:left]
            left -= len(chosen)
            if left <= 0:
                return
            chosen = [names[number + 1] for names in self._better(lines, number)] if number + 1 < len(self._settings[0]) else []

    def _better(self, lines: Sequence[Columns], number: int) -> list[Setting]:
        """Choose the better half of the settings that came through a round, those of each method in turns, the best first."""
        methods = methods_of(lines)
        kind = chief_kind(methods)
        level = reached(methods, kind)
        setting, through = {name: names for names in self._settings for name in names}, []
        for method in methods:
            found = [[_name(run.folder) for run in runs] for runs in method.ranked(kind, level)]
            own = [setting[names[0]] for names in found if setting[names[0]][number] in names]
            through.append(own[: ceil(len(own) / 2)])
        return _in_turns(through)


def _without(line: Columns, columns: Sequence[str]) -> Setting:
    return tuple(f"{column} {value}" for column, value in line.items() if column not in columns)


def _in_turns(methods: Sequence[Sequence[Setting]]) -> list[Setting]:
    """Take the first setting of every method, then the second of every one, and so on."""
    return [names for turn in zip_longest(*methods) for names in turn if names is not None]


def _name(folder: str) -> str:
    """Name the run of a sweep by the folder of one of its tasks."""
    return Path(folder).parents[1].name
