"""Read methods at equal forgetting: what each keeps over what it has forgotten, from runs at several rates and seeds.

A method is a pair, an optimizer and whatever else varies that is no rate, ratio of rates or seed. Its runs of one seed are
points; those that none beats, forgetting as much and keeping more, make a curve, linear in the logarithm of the forget
probability. Nothing is said of a level that no run has reached.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from dualoptim.evaluation.summary import PARTS, SEEN, UNSEEN, SetScores
from dualoptim.reporting.methods import ends, sequence_folder, varied_settings
from dualoptim.reporting.results import Columns

LEVELS = (0.1, 0.03, 0.01, 0.003)
"""Forget probabilities at which methods are compared."""
WINDOW = 0.95
"""The share of what was kept before that a rate within the window keeps."""
COLLAPSED = 0.5
"""The share of what was kept before of which less is left where a run has collapsed."""
LEAST = 1e-12  # forget probabilities below it count as this one, whose logarithm is finite
RATES = ("forget_strength", "retain_freq", "forget_freq", "tasks_independent")
"""Flags that say how strongly, or how often, and make no other method."""

KEPT = {
    "unseen": PARTS[UNSEEN],
    "seen": PARTS[SEEN],
    "general": "ROUGE-L recall of real authors and world facts",
}
"""What is kept, by its name in frontier.csv: probabilities of true answers, but for general knowledge."""

Points = Sequence[tuple[float, float]]
"""Forget probabilities, each with what is kept there."""


@dataclass(frozen=True)
class Run:
    """One run, after its last task: at which rates, how much it forgot, what it kept by the names of `KEPT`, and before it."""

    rate: float
    forget_rate: float
    seed: str
    forget: float  # probability, of all tasks that were forgotten
    kept: Mapping[str, float]
    before: Mapping[str, float]
    folder: str
    often: tuple[str, ...] = ()  # how often steps of a kind are taken, and the like, where that varies

    @property
    def ratio(self) -> float:
        """The rate of forget steps over that of retain steps."""
        return self.forget_rate / self.rate

    def left(self, kind: str) -> float | None:
        """Give the share of what was kept before that is left; None where one of both is not known."""
        known = kind in self.kept and self.before.get(kind, 0.0) > 0
        return self.kept[kind] / self.before[kind] if known else None


@dataclass
class Method:
    """All runs of a method, by its words; `failed` ended without scores, of which `diverged` as a loss was not finite."""

    words: tuple[str, ...]
    runs: list[Run] = field(default_factory=list)
    failed: int = 0
    diverged: int = 0

    @property
    def name(self) -> str:
        """The words in a row."""
        return " ".join(self.words)

    def fronts(self, kind: str) -> list[Points]:
        """Give the curve of each seed, of the seeds that have one."""
        seeds = dict.fromkeys(run.seed for run in self.runs)
        found = (envelope((r.forget, r.kept[kind]) for r in self.runs if r.seed == s and kind in r.kept) for s in seeds)
        return [front for front in found if front]

    def at(self, kind: str, level: float) -> list[float]:
        """Say what is kept at a level of forgetting, by the seeds that reach it."""
        values = (kept_at(front, level) for front in self.fronts(kind))
        return [value for value in values if value is not None]

    def goes_beyond(self, kind: str, level: float) -> bool:
        """Tell whether a seed has no run as mild as a level: what it keeps there is what its mildest run keeps, or more."""
        seeds = dict.fromkeys(run.seed for run in self.runs if kind in run.kept)
        return any(max(run.forget for run in self.runs if run.seed == seed) < level for seed in seeds)

    def areas(self, kind: str) -> list[float]:
        """Give the mean of what each seed keeps from the highest of `LEVELS` to the lowest; 0 counts where it does not come."""
        return [area(front, min(LEVELS), max(LEVELS)) for front in self.fronts(kind)]

    def collapsed(self, kind: str) -> tuple[int, int]:
        """Count the runs that collapsed, or diverged, and those of which that is known."""
        left = [share for share in (run.left(kind) for run in self.runs) if share is not None]
        return sum(share < COLLAPSED for share in left) + self.diverged, len(left) + self.diverged

    def windows(self, kind: str, level: float) -> list[tuple[float, bool]]:
        """Give the width of the window of rates in octaves, by seed: where it forgets to a level and keeps `WINDOW` of before.

        Both rates move together; where no two runs have the same ratio, the one of forget steps moves, or that of retain steps.
        Of several such rows of runs the widest window counts; it may be wider, which is told beside it, where it ends with the
        rates that were tried. None is given where no two were.
        """
        ways: tuple[tuple[Callable[[Run], float], Callable[[Run], float]], ...] = (
            (lambda run: round(math.log2(run.ratio), 3), lambda run: run.rate),
            (lambda run: run.rate, lambda run: run.forget_rate),
            (lambda run: run.forget_rate, lambda run: run.rate),
        )
        found = []
        for seed in dict.fromkeys(run.seed for run in self.runs):
            own = [run for run in self.runs if run.seed == seed and run.left(kind) is not None]
            for alike, rate in ways:
                rows = [sorted((r for r in own if alike(r) == one), key=rate) for one in {alike(run) for run in own}]
                widths = [_width(row, rate, kind, level) for row in rows if len({rate(run) for run in row}) > 1]
                if widths:
                    found.append(max(widths))
                    break
        return found

    def ranked(self, kind: str, level: float) -> list[list[Run]]:
        """Give the runs of each setting, most runs first; of as many, what keeps most at a level, then what forgets most."""
        settings: dict[tuple[object, ...], list[Run]] = {}
        for run in (run for run in self.runs if kind in run.kept):
            settings.setdefault((run.rate, run.forget_rate, run.often), []).append(run)

        def goodness(runs: list[Run]) -> tuple[int, bool, float]:
            forget = _log_mean(run.forget for run in runs)
            reaches = forget <= math.log(level)
            return len(runs), reaches, fmean(run.kept[kind] for run in runs) if reaches else -forget

        return sorted(settings.values(), key=goodness, reverse=True)


def methods_of(lines: Sequence[Columns]) -> list[Method]:
    """Gather the runs of every method from lines of results.csv, in their order."""
    names = [name for name in varied_settings(lines) if name not in RATES]
    first = {sequence_folder(line): line for line in reversed(lines)}
    found: dict[tuple[str, ...], Method] = {}
    for line in ends(lines):
        said = [str(line["losses"]), str(line.get("optim") or "")]
        said += [f"{name} {line[name]}" for name in names if line.get(name) not in (None, "")]
        words = tuple(filter(None, said))
        method = found.setdefault(words, Method(words))
        forget = _scores(line, "", r"forget(_task\d+)?_probability")
        rate = _number(line.get("learning_rate"))
        if rate is None or not forget:
            method.failed += 1
            method.diverged += str(line.get("failed") or "").startswith("NonFiniteError")
            continue
        seed = " ".join(str(line.get(name) or "") for name in ("seed", *(["task"] if _alone(line) else [])))
        kept, before = _kept(line, ""), _kept(first[sequence_folder(line)], "before_")
        folder = str(line["folder"])
        often = tuple(str(line[name]) for name in RATES if line.get(name) not in (None, ""))
        rates = rate, _number(line.get("forget_lr")) or rate
        method.runs.append(Run(*rates, seed, fmean(forget), kept, before, folder, often))
    return [*found.values()]


def place_of(sets: SetScores, kind: str) -> tuple[float, float] | None:
    """Say what a retain-only model knows of what is forgotten, and keeps; to it all retain rows are alike."""
    line = {f"{name}_{metric}": value for name, scores in sets.items() for metric, value in scores.items()}
    forget, kept = _scores(line, "", r"forget(_task\d+)?_probability"), _kept(line, "")
    found = kept.get(kind, kept.get("seen"))
    return (fmean(forget), found) if forget and found is not None else None


def chief_kind(methods: Iterable[Method]) -> str:
    """Say by what methods are compared first: rows that no step saw, or where they are not known of every run, the others."""
    runs = [run for method in methods for run in method.runs]
    return "unseen" if runs and all("unseen" in run.kept for run in runs) else "seen"


def has_frontier(methods: Iterable[Method]) -> bool:
    """Tell whether there is a curve to read: two runs of a method and a seed at different rates."""
    for method in methods:
        rates = {(run.seed, run.rate, run.forget_rate) for run in method.runs}
        if len({seed for seed, *_ in rates}) < len(rates):
            return True
    return False


def reached(methods: Iterable[Method], kind: str) -> float:
    """Give the lowest of `LEVELS` to which a run forgets that has not collapsed, the highest if there is none."""
    runs = [(run.forget, run.left(kind)) for method in methods for run in method.runs if kind in run.kept]
    whole = [forget for forget, left in runs if left is None or left >= COLLAPSED]
    return min((level for level in LEVELS if any(forget <= level for forget in whole)), default=max(LEVELS))


# -------------------------------------------------------------------------------------------------------------- curves


def envelope(points: Iterable[tuple[float, float]]) -> Points:
    """Keep the points that none beats, forgetting as much and keeping more: both numbers rise along them."""
    found: list[tuple[float, float]] = []
    for forget, kept in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or kept > found[-1][1]:
            found.append((max(forget, LEAST), kept))
    return found


def kept_at(front: Points, level: float) -> float | None:
    """Interpolate what is kept at a forget probability, linearly in its logarithm; None if no point has come there.

    Where every point forgets more, the one that forgets least says how much is kept at least.
    """
    if not front or front[0][0] > level * (1 + 1e-9):
        return None
    forget, kept = zip(*front, strict=True)
    return float(np.interp(math.log(level), np.log(forget), kept))


def area(front: Points, low: float, high: float) -> float:
    """Average what is kept over the logarithm of forget probabilities from `low` to `high`; 0 where no point has come."""
    if not front or front[0][0] >= high:
        return 0.0
    start = max(low, front[0][0])
    places = [start, *(forget for forget, _ in front if start < forget < high), high]
    values = [kept_at(front, place) or 0.0 for place in places]
    return float(np.trapezoid(values, np.log(places))) / math.log(high / low)


def mean_curve(fronts: Sequence[Points], places: int = 60) -> list[tuple[float, float, float, float]]:
    """Average the curves of seeds where all of them have come: forget probability, mean, lowest and highest of what is kept."""
    if not fronts:
        return []
    low, high = max(front[0][0] for front in fronts), max(front[-1][0] for front in fronts)
    corners = {forget for front in fronts for forget, _ in front if low <= forget <= high}
    found = []
    for forget in sorted({*corners, *(np.geomspace(low, high, places).tolist() if len(fronts) > 1 else ())}):
        values = [value for value in (kept_at(front, forget) for front in fronts) if value is not None]
        found.append((forget, fmean(values), min(values), max(values)))
    return found


def _width(row: Sequence[Run], rate: Callable[[Run], float], kind: str, level: float) -> tuple[float, bool]:
    """Sum the octaves of rate where neighbours, joined by lines, forget to a level and keep `WINDOW` of before.

    Tells also whether the first or the last run does.
    """
    places = [math.log2(rate(run)) for run in row]
    margins = [(math.log(level) - math.log(max(run.forget, LEAST)), run.kept[kind] - WINDOW * run.before[kind]) for run in row]
    octaves = 0.0
    for left, right, one, other in zip(places, places[1:], margins, margins[1:], strict=False):
        parts = [_inside(a, b) for a, b in zip(one, other, strict=True)]
        octaves += (right - left) * max(0.0, min(end for _, end in parts) - max(begin for begin, _ in parts))
    return octaves, any(min(margins[end]) >= 0 for end in (0, -1))


def _inside(a: float, b: float) -> tuple[float, float]:
    """Say from where to where, in shares of the way from a to b, a line between them is not below 0."""
    if a >= 0 and b >= 0:
        return 0.0, 1.0
    if a < 0 and b < 0:
        return 1.0, 0.0
    root = a / (a - b)
    return (root, 1.0) if b >= 0 else (0.0, root)


# --------------------------------------------------------------------------------------------------------------- lines


def _kept(line: Columns, prefix: str) -> dict[str, float]:
    """Read what is kept from a line, by the names of `KEPT`, as far as it was measured."""
    found = {
        "unseen": _scores(line, prefix, f"{UNSEEN}_probability"),
        "seen": _scores(line, prefix, f"{SEEN}_probability") or _scores(line, prefix, "retain_probability"),
        "general": _scores(line, prefix, "(real_authors|world_facts)_rouge_l_recall"),
    }
    return {name: fmean(values) for name, values in found.items() if values}


def _scores(line: Columns, prefix: str, pattern: str) -> list[float]:
    """Give the numbers in the columns of a line whose names are as a pattern says."""
    values = (_number(value) for name, value in line.items() if re.fullmatch(prefix + pattern, name))
    return [value for value in values if value is not None]


def _number(value: Any) -> float | None:
    """Take a finite number, also as a file has it; None for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _alone(line: Columns) -> bool:
    return line.get("tasks_independent") == "True"


def _log_mean(values: Iterable[float]) -> float:
    return fmean(math.log(max(value, LEAST)) for value in values)
