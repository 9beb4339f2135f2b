"""Draw what methods keep over what they have forgotten."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dualoptim.reporting.plots import Draw, Points

_EDGE = 1e-5  # what is forgotten still more lies at the edge, lest all else crowds at the other one
_MARKS = "os^Dv<>P"


@dataclass(frozen=True)
class Front:
    """What a method keeps over what it has forgotten: its runs, and the mean of its seeds with the lowest and the highest."""

    title: str
    runs: Points
    curve: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Beside:
    """What methods are compared with: forget probabilities, what was kept before, and the retain-only model's place."""

    levels: Sequence[float]
    before: float | None = None
    retain_only: tuple[float, float] | None = None


def frontier(fronts: Sequence[Front], words: str, beside: Beside) -> Draw:
    """Draw what methods keep, in words, over forget probabilities, which fall to the right on a logarithmic axis.

    Both axes hold every run; a curve goes as far as every seed of its method.
    """
    places = [place for front in fronts for place in front.runs] + ([beside.retain_only] if beside.retain_only else [])
    lowest = min([min(beside.levels), *(forget for forget, _ in places)])
    end = max(lowest, _EDGE)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for number, front in enumerate(fronts):
            style = {"color": f"C{number % 8}", "linestyle": ("-", "--", ":")[number // 8 % 3], "marker": _MARKS[number % 8]}
            style["markerfacecolor"] = "none"
            inside = [(max(forget, end), kept) for forget, kept in front.runs]
            axes.plot(*zip(*inside, strict=True), **style | {"linestyle": ""}, markersize=6)
            forget, mean, low, high = zip(*front.curve, strict=True) if front.curve else ((), (), (), ())
            axes.plot(forget, mean, label=front.title, **style, markevery=[], linewidth=2)
            axes.fill_between(forget, low, high, color=style["color"], alpha=0.15, linewidth=0)
        if beside.before is not None:
            axes.axhline(beside.before, color="C7", linestyle=":", label="before")
        if beside.retain_only:
            known, kept = beside.retain_only
            axes.plot(max(known, end), kept, "*", color="C7", markersize=11, linestyle="", label="retain-only model")
        axes.set_xscale("log")
        decades = [10.0**-n for n in range(3, 1 - round(math.log10(_EDGE))) if 10.0**-n >= end]
        axes.set_xticks([1, *beside.levels, *decades], [f"{level:g}" for level in (1, *beside.levels, *decades)], fontsize=9)
        axes.set_xticks([], minor=True)
        axes.set_xlim(1, end / 1.3)
        beyond = f"; at the edge {_EDGE:g} or less" if lowest < end else ""
        axes.set_xlabel(f"probability of what is forgotten (right: forgets more{beyond})")
        least = min([kept for _, kept in places], default=0.0)
        start = math.floor(20 * (least - 0.05)) / 20 if least > 0.5 else 0  # small differences should look small
        axes.set_ylim(start, 1 + (1 - start) / 20)
        axes.set_title(f"kept: {words} (up: keeps more)" + (f",\naxis from {start:g}" if start else ""))
        figure.legend(loc="outside lower center", ncols=2 if len(fronts) > 2 else 1, fontsize=9)

    return draw
