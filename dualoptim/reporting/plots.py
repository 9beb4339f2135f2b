"""The report's figures. Each is a function that draws on a matplotlib Figure; `render` makes pictures of it.

C0 is the colour of what is forgotten, C1 of what is retained.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Draw = Callable[[Any], None]

# text, lines, and the cycle of colours; each has its counterpart for dark pages
_LIGHT = "#1c1e21 #c9ced6 #c2410c #1d6fa5 #4d7c0f #7c3aed #b45309 #0f766e #be185d #475569".split()
_DARK = "#e4e6e8 #474c55 #fb923c #5cb3ec #a3d65c #b79bfb #fbbf24 #4fd1c0 #f48fb8 #a3b1c4".split()


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG on white, and as SVGs on nothing for light and for dark pages."""

    png: bytes
    light: bytes
    dark: bytes


def render(draw: Draw) -> Picture:
    """The pictures of a figure; the same figure gives the same bytes."""
    import matplotlib  # half a second, and only for plots
    from matplotlib.figure import Figure

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what costs most is done once
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    light = svg.getvalue()
    dark = light
    for old, new in zip(_LIGHT, _DARK, strict=True):
        dark = dark.replace(old.encode(), new.encode())
    return Picture(png.getvalue(), light, dark)


def _style() -> Any:
    from cycler import cycler

    text, line, *colours = _LIGHT
    style: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), text)
    style |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), line)
    style |= {"xtick.labelcolor": text, "ytick.labelcolor": text, "axes.prop_cycle": cycler(color=colours)}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6}
    style |= {"axes.facecolor": "none", "legend.frameon": False, "legend.fontsize": 10, "font.size": 11}
    style |= {"axes.titlesize": 11, "axes.titlelocation": "left", "lines.linewidth": 1.4}
    return style | {"svg.hashsalt": "dualoptim", "svg.fonttype": "path"}


def losses(log: Sequence[Mapping[str, Any]]) -> Draw:
    """Both losses over the steps, each on an axis of its own, because their sizes say nothing about one another."""
    curves = {name: _points(log, name) for name in ("forget", "retain")}
    shown = {name: points for name, points in curves.items() if points}

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, points) in zip(all_axes, shown.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color="C0" if name == "forget" else "C1", **_marks(points))
            axes.set_title(f"{name} loss")
        all_axes[-1].set_xlabel("optimizer step")

    return draw


def gradient_norms(log: Sequence[Mapping[str, Any]]) -> Draw:
    """The gradient norms of both phases before clipping, on a logarithmic axis; of every step where both losses share it."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in log:
        if _finite(record.get("grad_norm")) and record["grad_norm"] > 0:
            curves.setdefault(record["phase"], []).append((record["step"], record["grad_norm"]))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, points in curves.items():
            colour = {"forget": "C0", "retain": "C1"}.get(name, "C3")
            axes.plot(*zip(*points, strict=True), color=colour, label=f"{name} steps", **_marks(points))
        axes.set_yscale("log")
        axes.set_title("gradient norm before clipping")
        axes.set_xlabel("optimizer step")
        axes.legend()

    return draw


def _points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, loss) of the forget or the retain objective, in steps of one phase or of both."""
    found = []
    for record in log:
        alone = record["phase"] == name or (record["phase"] == "joint" and name == "forget" and "forget_loss" not in record)
        value = record.get("loss") if alone else record.get(f"{name}_loss")
        if _finite(value):
            found.append((record["step"], float(value or 0)))
    return found


def _marks(points: Sequence[Any]) -> dict[str, Any]:
    """Few steps are dots on a line, many a thin line."""
    return {"marker": "o", "markersize": 3} if len(points) <= 40 else {"linewidth": 1}


def utility(paths: Sequence[Mapping[str, Mapping[str, Any]]]) -> Draw:
    """Model utility against forget efficacy. A path is one result's summaries by title, mostly from before to after.

    Several paths are numbered as the rows of the table beside them; results that lie together share a label.
    """
    marks = {"before": ("C7", "o", "none"), "after": ("C0", "o", "C0"), "score": ("C2", "s", "C2")}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        named: set[str] = set()
        ends: list[tuple[int, tuple[float, float]]] = []
        for number, path in enumerate(paths, 1):
            places = {title: place for title, summary in path.items() if (place := utility_place(summary))}
            if "before" in places and "after" in places:
                arrow = {"arrowstyle": "->", "color": "C7", "linewidth": 0.9, "shrinkA": 5, "shrinkB": 5}
                axes.annotate("", places["after"], places["before"], arrowprops=arrow)
            for title, place in places.items():
                colour, mark, inside = marks.get(title, ("C1", "D", "none"))
                label = "" if title in named else "evaluated alone" if title == "score" else title
                axes.plot(*place, mark, color=colour, markerfacecolor=inside, markersize=7, label=label or None)
                named.add(title)
            ends += [(number, places[title]) for title in ("after", "score") if title in places]
        axes.set_xlabel("forget efficacy (right: forgets more)")
        axes.set_ylabel("model utility (up: keeps more)")
        axes.margins(0.12)
        if len(paths) == 1:
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
        else:
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            if high - low < 0.1:  # small differences should look small
                low, high = (low + high) / 2 - 0.05, (low + high) / 2 + 0.05
                axes.set_ylim(low, high)
            together: dict[tuple[int, int], list[tuple[int, tuple[float, float]]]] = {}
            for number, (x, y) in ends:
                cell = round(20 * (x - left) / (right - left)), round(14 * (y - low) / (high - low))
                together.setdefault(cell, []).append((number, (x, y)))
            for group in together.values():
                text = ", ".join(str(number) for number, _ in group)
                axes.annotate(text, group[0][1], xytext=(6, 5), textcoords="offset points", fontsize=9)
        figure.legend(loc="outside upper left", ncols=4)

    return draw


def utility_place(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    """Where a model stands in the plot of utility against forgetting, if both are known."""
    x, y = summary.get("untargeted_forget_efficacy"), summary.get("model_utility")
    return (float(x), float(y)) if x is not None and y is not None else None


def tasks(ticks: Sequence[str], curves: Mapping[str, Sequence[float | None]]) -> Draw:
    """The probability of every task's answers after each task: does the first come back while the fifth goes?"""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        forgotten = [name for name in curves if name.startswith("task")]
        colours = ["C0", *(f"C{n}" for n in range(2, 8))]
        for name, values in curves.items():
            style = {"color": colours[forgotten.index(name) % len(colours)]} if name in forgotten else {"linestyle": "--"}
            style |= {} if name in forgotten else {"color": "C1" if name == "retain set" else "C7"}
            axes.plot([math.nan if v is None else v for v in values], marker="o", markersize=4, label=name, **style)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_ylim(-0.02, 1.02)
        axes.set_title("probability of the true answer")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return draw


def relearning(before: Mapping[str, Any] | None, attack: Mapping[str, Any]) -> Draw:
    """How fast fine-tuning brings the forget set back, beside the retain-only model and the level before unlearning."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        curves = (
            ("curve", "forget", "C0", "-", "this model"),
            ("curve", "forget_unseen", "C0", "--", "its rows not taught"),
            ("retain_only", "forget", "C1", "-", "retain-only model"),
        )
        for key, name, colour, line, title in curves:
            points = [(point["step"], point["sets"].get(name, {}).get("probability")) for point in attack.get(key) or ()]
            points = [(step, value) for step, value in points if _finite(value)]
            if points:
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=colour, label=title)
        if before and (level := before["sets"].get("forget", {}).get("probability")) is not None:
            axes.axhline(level, color="C7", linestyle=":", label="before unlearning")
        axes.set_ylim(-0.02, 1.02)
        axes.set_title("forget set: probability of the true answer")
        axes.set_xlabel("step of relearning")
        axes.legend()

    return draw


def attacks(states: Sequence[tuple[str, Mapping[str, Any], Any]]) -> Draw:
    """The forget set's scores before, after and under every attack: the states of `tables.attacked_states`."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        titles = [title for title, _, _ in states]
        for metric, colour, mark, title in (
            ("probability", "C0", "o", "probability"),
            ("rouge_l_recall", "C3", "s", "ROUGE-L recall"),
        ):
            values = [sets.get("forget", {}) for _, sets, _ in states]
            best = [scores.get(metric, scores.get(f"best_{metric}")) for scores in values]
            places = [(value, row) for row, value in enumerate(best) if _finite(value)]
            if places:
                axes.plot(*zip(*places, strict=True), mark, color=colour, markerfacecolor="none", label=title)
        axes.set_yticks(range(len(titles)), titles)
        axes.set_ylim(len(titles) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("score of the forget set")
        figure.legend(loc="outside upper right", ncols=2)

    return draw


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
