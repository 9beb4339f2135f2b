"""Draw figures of losses, scores, tasks and attacks. Each function returns one that draws; `render` makes pictures.

C0 is the colour of what is forgotten, C1 of what is retained.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Draw = Callable[[Any], None]
"""What draws on a matplotlib Figure."""

Points = Sequence[tuple[float, float]]
"""A curve."""

PALETTE = {
    "text": ("#1c1e21", "#e4e6e8"),
    "axis": ("#c9ced6", "#474c55"),
    "forget": ("#c2410c", "#fb923c"),
    "retain": ("#1d6fa5", "#5cb3ec"),
    "green": ("#4d7c0f", "#a3d65c"),
    "violet": ("#7c3aed", "#b79bfb"),
    "amber": ("#b45309", "#fbbf24"),
    "teal": ("#0f766e", "#4fd1c0"),
    "pink": ("#be185d", "#f48fb8"),
    "slate": ("#475569", "#a3b1c4"),
}
"""Colours on light and on dark pages, by the names that a page's style gives them: text, lines, and the cycle of curves."""


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG on white, and as an SVG element on nothing, whose colours are variables of the page around it."""

    png: bytes
    svg: str


def render(draw: Draw) -> Picture:
    """Make the pictures of a figure; the same figure gives the same bytes."""
    import matplotlib  # half a second, and only for plots
    from matplotlib.figure import Figure

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what costs most is done once
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", facecolor="none", metadata=nothing)
    return Picture(png.getvalue(), _inline(svg.getvalue().decode()))


def _inline(file: str) -> str:
    """Cut the element out of an SVG file, without comments and style of its own, and make its colours variables."""
    element = file[file.index("<svg ") :].strip()
    element = re.sub(r"<!--.*?-->\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", element, flags=re.DOTALL)
    for name, (light, _) in PALETTE.items():
        element = element.replace(light, f"var(--{name})")
    return element


def _style() -> Any:
    from cycler import cycler

    text, line, *colours = [light for light, _ in PALETTE.values()]
    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), text)
    style |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), line)
    style |= {"xtick.labelcolor": text, "ytick.labelcolor": text, "axes.prop_cycle": cycler(color=colours)}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6}
    style |= {"axes.facecolor": "none", "legend.frameon": False, "legend.fontsize": 10, "font.size": 11}
    style |= {"axes.titlesize": 11, "axes.titlelocation": "left", "lines.linewidth": 1.4}
    return style | {"svg.hashsalt": "dualoptim", "svg.fonttype": "path"}


# ------------------------------------------------------------------------------------------------------------ training


def losses(curves: Mapping[str, Points]) -> Draw:
    """Draw the losses of forget and retain, each on an axis of its own, because their sizes say nothing about one another."""

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, points) in zip(all_axes, curves.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color="C0" if name == "forget" else "C1", **_marks(points))
            axes.set_title(f"{name} loss{_start(axes)}")
        _along_steps(all_axes[-1])

    return draw


def gradient_norms(curves: Mapping[str, Points]) -> Draw:
    """Draw the gradient norms before clipping by phase, on a logarithmic axis; `joint` where both losses share a step."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, points in curves.items():
            colour = {"forget": "C0", "retain": "C1"}.get(name, "C3")
            axes.plot(*zip(*points, strict=True), color=colour, label=f"{name} steps", **_marks(points))
        axes.set_yscale("log")
        axes.set_title("gradient norm before clipping (logarithmic axis)")
        _along_steps(axes)
        axes.legend()

    return draw


def _along_steps(axes: Any, steps: str = "optimizer step") -> None:
    """Name the axis of steps, whose ticks are whole numbers."""
    axes.set_xlabel(steps)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _start(axes: Any) -> str:
    """Let the upright axis start at zero, or return where else it starts, to be said."""
    low, high = axes.get_ylim()
    if min(min(line.get_ydata()) for line in axes.lines) < 0:
        return f" (axis from {low:.2g})"
    axes.set_ylim(0, high)
    return ""


def _marks(points: Points) -> dict[str, Any]:
    """Make few steps dots on a line, many a thin line."""
    return {"marker": "o", "markersize": 3} if len(points) <= 40 else {"linewidth": 1}


# -------------------------------------------------------------------------------------------------------------- scores


_PLACE_MARKS = {"before": ("C7", "o", "none"), "after": ("C0", "o", "C0"), "score": ("C2", "s", "C2")}


def utility(paths: Sequence[Mapping[str, tuple[float, float]]]) -> Draw:
    """Draw model utility against forget efficacy. A path is one result's places by title, mostly from before to after.

    Several paths are numbered as the rows of the table beside them; results that lie together share a label.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        named: set[str] = set()
        for places in paths:
            if "before" in places and "after" in places:
                arrow = {"arrowstyle": "->", "color": "C7", "linewidth": 0.9, "shrinkA": 5, "shrinkB": 5}
                axes.annotate("", places["after"], places["before"], arrowprops=arrow)
            for title, place in places.items():
                colour, mark, inside = _PLACE_MARKS.get(title, ("C1", "D", "none"))
                label = "" if title in named else "evaluated alone" if title == "score" else title
                axes.plot(*place, mark, color=colour, markerfacecolor=inside, markersize=7, label=label or None)
                named.add(title)
        axes.set_xlabel("forget efficacy (right: forgets more)")
        axes.set_ylabel("model utility (up: keeps more)")
        axes.margins(0.12)
        if len(paths) == 1:
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
        else:
            _number_ends(axes, paths)
            axes.set_xlabel(f"{axes.get_xlabel()}, axis from {axes.get_xlim()[0]:.2f}")
            axes.set_ylabel(f"{axes.get_ylabel()},\naxis from {axes.get_ylim()[0]:.2f}")
        figure.legend(loc="outside upper left", ncols=4)

    return draw


def _number_ends(axes: Any, paths: Sequence[Mapping[str, tuple[float, float]]]) -> None:
    """Write the number of each path where it ends; those that end in one place share a label."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    if high - low < 0.1:  # small differences should look small
        low, high = (low + high) / 2 - 0.05, (low + high) / 2 + 0.05
        axes.set_ylim(low, high)
    ends = [(n, places[title]) for n, places in enumerate(paths, 1) for title in ("after", "score") if title in places]
    together: dict[tuple[int, int], list[tuple[int, tuple[float, float]]]] = {}
    for number, (x, y) in ends:
        cell = round(20 * (x - left) / (right - left)), round(14 * (y - low) / (high - low))
        together.setdefault(cell, []).append((number, (x, y)))
    for group in together.values():
        text = ", ".join(str(number) for number, _ in group)
        axes.annotate(text, group[0][1], xytext=(6, 5), textcoords="offset points", fontsize=9)


UTILITY = "model utility"
"""The name of the curve that is no probability."""


def tasks(ticks: Sequence[str], curves: Mapping[str, Sequence[float | None]], along: str = "") -> Draw:
    """Draw the probability of every task's answers after each task: does the first come back while the fifth goes?

    `along` names the axis.
    """
    measured = {name: values for name, values in curves.items() if any(value is not None for value in values)}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        forgotten = [name for name in measured if name not in ("retain set", UTILITY)]
        colours = ["C0", *(f"C{n}" for n in range(2, 8))]
        for name, values in measured.items():
            style = {"color": colours[forgotten.index(name) % len(colours)]} if name in forgotten else {"linestyle": "--"}
            style |= {} if name in forgotten else {"color": "C1" if name == "retain set" else "C7"}
            axes.plot([math.nan if v is None else v for v in values], marker="o", markersize=4, label=name, **style)
        every = math.ceil(len(ticks) / 12)  # more would lie over one another
        axes.set_xticks(range(len(ticks))[::every], ticks[::every])
        axes.set_ylim(-0.02, 1.02)
        axes.set_title("probability of the true answer" + (f" and {UTILITY}" if UTILITY in measured else ""))
        axes.set_xlabel(along)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return draw


# ------------------------------------------------------------------------------------------------------------- attacks


@dataclass(frozen=True)
class Relearning:
    """Curves of relearning: the probability of the forget set's true answers after some steps."""

    taught: Points
    unseen: Points  # of the forget rows that were not taught
    retain_only: Points
    before: float | None  # the level before unlearning


def relearning(curves: Relearning) -> Draw:
    """Draw how fast fine-tuning brings the forget set back, beside the retain-only model and the level before unlearning."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for points, colour, line, title in (
            (curves.taught, "C0", "-", "this model"),
            (curves.unseen, "C0", "--", "its rows not taught"),
            (curves.retain_only, "C1", "-", "retain-only model"),
        ):
            if points:
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=colour, label=title)
        if curves.before is not None:
            axes.axhline(curves.before, color="C7", linestyle=":", label="before unlearning")
        axes.set_ylim(-0.02, 1.02)
        axes.set_title("forget set: probability of the true answer")
        _along_steps(axes, "step of relearning")
        axes.legend()

    return draw


def attacks(titles: Sequence[str], scores: Mapping[str, Sequence[float | None]]) -> Draw:
    """Draw the forget set's scores by name, each before, after and under every attack, whose titles are the rows."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for (title, values), (colour, mark) in zip(scores.items(), (("C0", "o"), ("C3", "s")), strict=True):
            places = [(value, row) for row, value in enumerate(values) if value is not None]
            if places:
                axes.plot(*zip(*places, strict=True), mark, color=colour, markerfacecolor="none", label=title)
        axes.set_yticks(range(len(titles)), titles)
        axes.set_ylim(len(titles) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("score of the forget set")
        figure.legend(loc="outside upper right", ncols=2)

    return draw
