"""Show the frontier of methods: as a table with the best setting of each, as data, and as a plot."""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from urllib.parse import quote

from dualoptim.atomic import write_bytes, write_text
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.frontier import (
    COLLAPSED,
    KEPT,
    LEAST,
    LEVELS,
    WINDOW,
    Method,
    Run,
    chief_kind,
    has_frontier,
    mean_curve,
    methods_of,
    place_of,
    reached,
)
from dualoptim.reporting.frontier_plot import Beside, Front, frontier
from dualoptim.reporting.methods import told_apart
from dualoptim.reporting.page import Plot, Section, to_markdown
from dualoptim.reporting.plots import Draw
from dualoptim.reporting.results import Columns
from dualoptim.reporting.tables import Table, number

FRONTIER_FILES = ("frontier.md", "frontier.csv", "frontier.png")
"""What a sweep writes of methods at equal forgetting."""

TITLE = "What methods keep at equal forgetting"

_AT_LEAST = "≥ "


def kept_tables(methods: Sequence[Method]) -> list[Table]:
    """Show what each method keeps at the levels of forgetting, mean and deviation (n - 1) over seeds: a table a kind."""
    found, names = [], told_apart([method.words for method in methods])
    for kind in KEPT:
        before = [run.before[kind] for method in methods for run in method.runs if kind in run.before]
        rows = [("before unlearning", *[number(fmean(before))] * len(LEVELS))] if before else []
        for name, method in zip(names, methods, strict=True):
            if seeds := len(method.fronts(kind)):
                at = [
                    _bound(_spread(method.at(kind, one), seeds) or "not reached", method.goes_beyond(kind, one))
                    for one in LEVELS
                ]
                rows.append((name, *at))
        found.append(Table((KEPT[kind], *(f"at {one:g}" for one in LEVELS)), rows if len(rows) > bool(before) else ()))
    return found


def range_table(methods: Sequence[Method]) -> Table:
    """Show over how wide a range of forgetting and of rates each method keeps what methods are compared by."""
    kind, most = chief_kind(methods), max(LEVELS)
    rows = []
    for name, method in zip(told_apart([method.words for method in methods]), methods, strict=True):
        if method.fronts(kind):
            area = _bound(_spread(method.areas(kind)), method.goes_beyond(kind, most))
            rows.append((name, str(len(method.runs)), area, _octaves(method, kind, most), _collapsed(method, kind)))
    return Table(("method", "runs", "area", f"window to {most:g}", "collapsed"), rows)


def best_table(methods: Sequence[Method]) -> Table:
    """Show the best setting of each method."""
    kind, rows = chief_kind(methods), []
    for name, best in _best(methods).items():
        forget, kept = (_spread(values) for values in ([r.forget for r in best], [r.kept[kind] for r in best]))
        rows.append((name, f"{best[0].rate:g}", f"{best[0].forget_rate:g}", forget, kept))
    return Table(("best setting", "learning rate", "forget lr", "forget probability", "kept"), rows)


def best_commands(methods: Sequence[Method]) -> list[str]:
    """Write the commands that repeat the best settings, each into a folder of its own."""
    commands = []
    for name, best in _best(methods).items():
        folder = f"runs/again-{quote(name.replace(' ', '-'), safe='+,')}"
        words = ("dualoptim", "unlearn", "--config", str(Path(best[0].folder) / "config.yaml"), "--output-dir", folder)
        commands.append(shlex.join(words))
    return commands


def _best(methods: Sequence[Method]) -> dict[str, list[Run]]:
    """Give the runs of the best setting of each method, by its name."""
    kind = chief_kind(methods)
    level = reached(methods, kind)
    names = told_apart([method.words for method in methods])
    ranked = {name: method.ranked(kind, level) for name, method in zip(names, methods, strict=True)}
    return {name: settings[0] for name, settings in ranked.items() if settings}


def frontier_notes(methods: Sequence[Method], tables: Sequence[Table]) -> list[str]:
    """Say how the tables are to be read."""
    level = reached(methods, chief_kind(methods))
    notes = [
        f"Area: the mean from {max(LEVELS):g} down to {min(LEVELS):g}, 0 where no run comes. Window: the octaves of rate that "
        f"forget to {max(LEVELS):g} and keep {WINDOW:.0%} of before. Collapsed: less than {COLLAPSED:.0%} of before is left, "
        f"or a loss was not finite. Best setting: of the rates with most seeds that forget to {level:g} those that keep most.",
    ]
    if any(cell.startswith(_AT_LEAST) for table in tables for row in table.rows for cell in row):
        notes.append(
            f"{_AT_LEAST}is a bound: even the mildest run of a seed forgets more than that level, and keeps so much; or the "
            "window ends with the rates that were tried. Other rates would tell more."
        )
    if len({run.seed for method in methods for run in method.runs}) == 1:
        notes.append("One seed: differences that are smaller than what another seed moves mean nothing. --seeds 1 2 3 tells.")
    failed = sum(method.failed for method in methods)
    return notes + ([f"Runs without scores, which no curve has: {failed}."] if failed else [])


def frontier_plot(methods: Sequence[Method]) -> Draw:
    """Draw what methods keep over what they have forgotten, by the kind that they are compared by first."""
    kind = chief_kind(methods)
    fronts = [
        Front(
            name,
            [(run.forget, run.kept[kind]) for run in method.runs if kind in run.kept],
            mean_curve(method.fronts(kind)),
        )
        for name, method in zip(told_apart([method.words for method in methods]), methods, strict=True)
    ]
    before = [run.before[kind] for method in methods for run in method.runs if kind in run.before]
    beside = Beside(LEVELS, fmean(before) if before else None, _retain_only(methods, kind))
    return frontier(fronts, KEPT[kind], beside)


def frontier_section(lines: Sequence[Columns]) -> Section:
    """Tell of methods at equal forgetting in a part of a report; nothing where there is no curve."""
    methods = methods_of(lines)
    if not has_frontier(methods):
        return Section(TITLE)
    kept = KEPT[chief_kind(methods)]
    says = f"{kept.capitalize()} over the probability of what is forgotten, by method: up and right is better."
    plot = Plot("frontier", says, frontier_plot(methods))
    tables = [*kept_tables(methods), range_table(methods), best_table(methods)]
    return Section(
        TITLE,
        "What is kept where the probability of what is forgotten has come down to a level: between runs by its logarithm, "
        "along the runs of a seed that none beats.",
        points=frontier_notes(methods, tables),
        tables=tables,
        commands=best_commands(methods),
        plots=[plot],
    )


def write_frontier(folder: Path, lines: Sequence[Columns]) -> Section:
    """Write the `FRONTIER_FILES` of a sweep and return what they say; nothing, and no file, where there is no curve."""
    section = frontier_section(lines)
    if not section:
        for name in FRONTIER_FILES:  # of what the sweep was before
            (folder / name).unlink(missing_ok=True)
    else:
        write_text(folder / "frontier.md", to_markdown(replace(section, plots=())))
        write_text(folder / "frontier.csv", _data(methods_of(lines)))
        write_bytes(folder / "frontier.png", section.plots[0].picture.png)
    return section


def _data(methods: Sequence[Method]) -> str:
    """Write the points of all curves as CSV: a line per run."""
    chief = chief_kind(methods)
    text = io.StringIO()
    head = ("method", "learning_rate", "forget_lr", "seed", "forget", *KEPT, *(f"before_{kind}" for kind in KEPT), "on_curve")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*head, "folder"))
    for method in methods:
        curve = {point for front in method.fronts(chief) for point in front}
        for run in method.runs:
            values = [scores.get(kind) for scores in (run.kept, run.before) for kind in KEPT]
            on_curve = (max(run.forget, LEAST), run.kept.get(chief)) in curve
            rates = (f"{run.rate:g}", f"{run.forget_rate:g}")
            writer.writerow((method.name, *rates, run.seed, run.forget, *values, on_curve, run.folder))
    return text.getvalue()


def _spread(values: Sequence[float], of: int = 0) -> str:
    """Write a mean and its deviation, and of how many seeds, if these are not all; nothing without a value."""
    if not values:
        return ""
    some = f" ({len(values)} of {of} seeds)" if 0 < len(values) < of else ""
    return number(fmean(values)) + (f" ± {stdev(values):.3f}" if len(values) > 1 else "") + some


def _bound(value: str, is_least: bool) -> str:
    return _AT_LEAST + value if is_least else value


def _octaves(method: Method, kind: str, level: float) -> str:
    windows = method.windows(kind, level)
    widths, open_ends = zip(*windows, strict=True) if windows else ((), ())
    return _bound(f"{fmean(widths):.2f} octaves", any(open_ends)) if windows else "one rate"


def _collapsed(method: Method, kind: str) -> str:
    some, known = method.collapsed(kind)
    return f"{some} of {known}" if known else "-"


def _retain_only(methods: Sequence[Method], kind: str) -> tuple[float, float] | None:
    """Find what a retain-only model that runs were compared with knows and keeps; None without one."""
    for folder in (Path(run.folder) for method in methods for run in method.runs):
        if (path := folder / "eval" / "summary.json").is_file():
            found = Summary.read(path).retain_only
            return place_of(found.sets, kind) if found else None
    return None
