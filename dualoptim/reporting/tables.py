"""Put scores and settings into tables: for the console, the model card, and the report."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dualoptim.config.args import CommonArgs
from dualoptim.config.flags import flags
from dualoptim.config.saved import to_dict
from dualoptim.data.wordings import OTHER_WORDS
from dualoptim.evaluation.metrics import AGGREGATES, EFFICACY, MEMBERSHIP, METRICS, in_tables
from dualoptim.evaluation.summary import PARTS, RetainOnly, Summary
from dualoptim.reporting.unread import unread

Cells = tuple[str, ...]

Columns = Mapping[str, Summary | RetainOnly]
"""Summaries by the titles of their columns."""

SET_TITLES = {
    "forget": "forget set",
    OTHER_WORDS: "forget set in other words",
    "retain": "retain set",
    **PARTS,
    "real_authors": "real authors",
    "world_facts": "world facts",
}

NO_QUESTION = "(a passage, continued from its middle)"
"""What stands in place of a passage's question."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first `left` columns hold words, the others numbers. True if it has a row.

    `pairs` of a name and a value need no table on a page, where they fill its width instead.
    """

    head: Cells
    rows: Sequence[Cells]
    left: int = 1
    pairs: bool = False

    def __bool__(self) -> bool:
        return bool(self.rows)

    def measured(self) -> "Table":
        """Leave out the columns of numbers in which no row has one."""
        kept = [n for n in range(len(self.head)) if n < self.left or any(row[n].strip("-") for row in self.rows)]
        return replace(self, head=tuple(self.head[n] for n in kept), rows=[tuple(row[n] for n in kept) for row in self.rows])

    def markdown(self, escape: Callable[[str], str] = str) -> str:
        """Write it in Markdown; its columns also line up as plain text."""
        rows = [tuple(map(escape, row)) for row in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

        def line(cells: Cells) -> str:
            padded = [c.ljust(w) if i < self.left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return f"| {' | '.join(padded)} |"

        rule = "|" + "|".join("-" * (w + 2) if i < self.left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
        return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


# --------------------------------------------------------------------------------------------------------------- scores


def side_by_side(before: Summary | None, after: Summary | None) -> dict[str, Summary | RetainOnly]:
    """Give the summaries that there are the titles of their columns; the retain-only model's scores are a part of `after`'s."""
    found = {"before": before, "after": after, "retain-only": after.retain_only if after else None}
    return {title: summary for title, summary in found.items() if summary}


def set_table(columns: Columns) -> Table:
    """Show every metric of every set, and where each should go."""
    rows: list[Cells] = []
    known = [summary for summary in columns.values() if isinstance(summary, Summary)]
    for name in dict.fromkeys([*SET_TITLES, *(name for summary in columns.values() for name in summary.sets)]):
        goes = any(summary.forgets(name) for summary in known)
        for metric in in_tables():
            values = [summary.sets.get(name, {}).get(metric) for summary in columns.values()]
            if any(value is not None for value in values):
                elsewhere = "stay forgotten" if _earlier(name) else "stay"
                aim = METRICS[metric].forget if goes and not _earlier(name) else elsewhere
                rows.append((set_title(name, *known), METRICS[metric].title, *map(number, values), aim))
    return Table(("rows", "metric", *columns, "should"), rows, left=2)


def aggregate_table(columns: Columns) -> Table:
    """Show the published scores over all sets, and the tasks of lm-eval."""
    rows: list[Cells] = []
    for name, aggregate in AGGREGATES.items():
        values = [summary.score(name) for summary in columns.values()]
        if any(value is not None for value in values):
            shown = p_value if name == "tofu.forget_quality" else number
            aim = efficacy_aim(columns) if name == EFFICACY else aggregate.aim
            rows.append((aggregate.title, *map(shown, values), aim))
    measured = [(summary.general or {}) if isinstance(summary, Summary) else {} for summary in columns.values()]
    for task, metric in dict.fromkeys((key, name) for general in measured for key in general for name in general[key]):
        values = [general.get(task, {}).get(metric) for general in measured]
        rows.append((f"{task}: {metric}", *map(number, values), "" if "stderr" in metric else "stay"))
    return Table(("score", *columns, "should"), rows)


def efficacy_aim(columns: Columns) -> str:
    """Say where the forget efficacy should go: not over that of a retain-only model, which still guesses, if one is known."""
    scores = {title: summary.score(EFFICACY) for title, summary in columns.items()}
    most = scores.pop("retain-only", None)
    newest = [*scores.values(), None][len(scores) - 1]
    if most is None:
        return AGGREGATES[EFFICACY].aim
    return "over-forgetting: more than retain-only" if newest is not None and newest > most else "rise, up to retain-only"


def privacy_table(columns: Columns) -> Table:
    """Show how well the forget rows can be told from rows that were never learned."""
    rows: list[Cells] = []
    for name, membership in MEMBERSHIP.items():
        values = [summary.privacy.get(name) for summary in columns.values()]
        if any(value is not None for value in values):
            aim = "like retain-only" if "retain-only" in columns else "0.5"
            rows.append((f"{membership.title} (AUC)", *map(number, values), aim))
    leaks = [summary.privacy.get("privleak") for summary in columns.values()]
    if any(leak is not None for leak in leaks):
        rows.append(("PrivLeak, in percent", *map(number, leaks), "0"))
    return Table(("privacy", *columns, "should be"), rows)


def skipped_table(summary: Summary) -> Table:
    """Say what was not measured, by the reason why."""
    by_reason: dict[str, list[str]] = {}
    for metric, why in summary.skipped.items():
        by_reason.setdefault(why, []).append(metric)
    return Table(("not measured", "because"), [(", ".join(metrics), why) for why, metrics in by_reason.items()], left=2)


def benchmark_tables(columns: Columns) -> list[Table]:
    """Show the scores of a benchmark, and those that others report of it."""
    known = {
        title: summary.benchmark for title, summary in columns.items() if isinstance(summary, Summary) and summary.benchmark
    }
    if not known:
        return []
    titles = {name: title for scores in known.values() for name, title in scores.titles.items()}
    newest = [*known.values()][-1]
    rows = []
    for name, title in titles.items():
        should = next(scores.should.get(name, "") for scores in known.values() if name in scores.titles)
        rows.append((title, *(number(scores.scores.get(name)) for scores in known.values()), should))
    others = dict.fromkeys(name for scores in newest.published.values() for name in scores)
    published = [(method, *(number(scores.get(name)) for name in others)) for method, scores in newest.published.items()]
    head = (f"published ({newest.source})", *(titles.get(name, name.replace("_", " ")) for name in others))
    return [Table((str(newest.name), *known, "should"), rows), Table(head, published)]


def _earlier(name: str) -> bool:
    """Tell whether a set is an earlier task's."""
    return re.fullmatch(r"forget_task\d+", name) is not None


def set_title(name: str, *summaries: Summary) -> str:
    """Name an evaluation set for a reader, and say where `summaries` have its rows from if not from the data."""
    if _earlier(name):
        return f"task {name.removeprefix('forget_task')}, unlearned before"
    if name == "retain" and any(summary.retain_from for summary in summaries):
        return f"{SET_TITLES[name]}, made from the model"
    return SET_TITLES.get(name, name.replace("_", " "))


# ------------------------------------------------------------------------------------------------------------- settings


def setting_table(settings: Mapping[str, Any], kind: type[CommonArgs]) -> Table:
    """Show the settings that a reader asks for first, without those that are off or that nothing of the run reads.

    What the settings lack counts as the default of `kind`.
    """
    defaults = to_dict(kind())
    values = {**defaults, **settings}
    silent = unread(values)
    rows = []
    for name in asked_first(kind):
        off = not values[name] and values[name] == defaults[name]
        if not off and name not in silent:
            rows.append((name.replace("_", " "), shown_value(values[name])))
    return Table(("setting", "value"), rows, left=2, pairs=True)


def asked_first(kind: type[CommonArgs]) -> list[str]:
    """Name the flags that a reader asks for first."""
    return [name for name, flag in flags(kind).items() if flag.shown]


def shown_value(value: Any) -> str:
    """Write a setting as one would type it, a dash where there is none."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown_value, value)) or "-"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float | str | None) -> str:
    """Write a score with three decimals, a dash where there is none."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def p_value(value: float | None) -> str:
    """Write a p-value, whose size matters where it is small."""
    return f"{value:.0e}" if value is not None and 0 < value < 0.001 else number(value)
