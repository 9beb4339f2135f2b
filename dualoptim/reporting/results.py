"""Write tables into an output folder: of all results, of a sequence of tasks, of a sweep's methods."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dualoptim.atomic import write_text
from dualoptim.config.args import UnlearnArgs
from dualoptim.config.flags import flags
from dualoptim.errors import WriteError
from dualoptim.evaluation.summary import PARTS, UNSEEN, Summary
from dualoptim.reporting.tables import Table, number
from dualoptim.reporting.verdicts import VERDICT, verdict_column, verdict_counts

Columns = Mapping[str, str | int | float | None]
"""A line of a CSV file by the names of its columns."""


@dataclass(frozen=True)
class TaskResult:
    """One task unlearned: where it lies, what each step said, and the evaluations (None with `--no-eval`)."""

    losses: str
    learning_rate: float
    task: int
    folder: Path
    model: Path
    log: list[dict[str, Any]]
    before: Summary | None
    after: Summary | None
    target: str | None = None  # of the benchmark
    split: str = ""


# ---------------------------------------------------------------------------------------------------------- all results

_RAN = ("losses", "optim", "learning_rate", "forget_lr", "seed", "task", "target")
_FLAGS = set(flags(UnlearnArgs)) - set(_RAN)
_SHOWN = (
    *_RAN,
    "forget_probability",
    "forget_rouge_l_recall",
    "retain_probability",
    "retain_rouge_l_recall",
    "retain_unseen_probability",
    "model_utility",
    "untargeted_forget_efficacy",
    VERDICT,
    "failed",
)

OF_UNSEEN = {f"{UNSEEN}_probability": f"probability of {PARTS[UNSEEN]}"}
"""The column of a table that has what is kept of rows that no step trained on."""

_BENCHMARK = "benchmark_"
"""What the columns of a benchmark's scores begin with."""


def result_columns(result: TaskResult) -> dict[str, str | int | float | None]:
    """Make a result a line of results.csv: what ran, the scores after it, and those before it with the prefix `before_`."""
    line: dict[str, str | int | float | None] = {"losses": result.losses, "learning_rate": f"{result.learning_rate:g}"}
    line |= {"task": result.task} | ({"target": result.target} if result.target else {})
    for prefix, summary in (("", result.after), ("before_", result.before)):
        if summary is not None:
            line |= {prefix + name: value for name, value in score_columns(summary).items()}
    return {**line, **verdict_column(result.after), "folder": str(result.folder)}


def score_columns(summary: Summary) -> dict[str, float | None]:
    """Give every score of a summary by the name of its column."""
    columns = {name: summary.score(name) for name in ("model_utility", "untargeted_forget_efficacy")}
    for name, value in (summary.benchmark.scores if summary.benchmark else {}).items():
        columns[f"{_BENCHMARK}{name}"] = value
    for name, scores in summary.sets.items():
        columns |= {f"{name}_{metric}": value for metric, value in scores.items()}
    return columns


def write_results(folder: Path, new: Sequence[Columns], begun: Collection[str] = ()) -> None:
    """Write results.csv with every column and results.md with the plainest ones; lines of earlier runs in the folder stay.

    `begun` are folders of whole runs, of which no earlier line stays.

    Raises:
        WriteError: if somebody has put another results.csv there.
    """
    path = folder / "results.csv"
    earlier = read_results(path)
    if earlier is None:
        raise WriteError(f"{path} has become another table than ours; move it away", "repeat the command with --resume")
    fresh = {str(line["folder"]) for line in new}
    lines: list[Columns] = [line for line in earlier if line["folder"] not in fresh and run_folder(line) not in begun]
    lines += new
    _write_csv(path, lines)
    shown = _shown(lines)
    rows = [tuple(_cell(column, line.get(column)) for column in shown) for line in lines]
    write_text(folder / "results.md", Table(titles(shown), rows).markdown() + "\n")


def _shown(lines: Sequence[Columns]) -> list[str]:
    """Name the plainest columns of those that there are."""
    names = (*_RAN, *settings(lines), *_SHOWN[len(_RAN) :], *of_benchmark(lines))
    return [column for column in names if any(column in line for line in lines)]


def settings(lines: Sequence[Columns]) -> list[str]:
    """Name the columns of flags that differ from run to run, beside those that every table has."""
    return list(dict.fromkeys(column for line in lines for column in line if column in _FLAGS))


def of_benchmark(lines: Sequence[Columns]) -> list[str]:
    """Name the columns of a benchmark's scores, in their order."""
    return list(dict.fromkeys(column for line in lines for column in line if column.startswith(_BENCHMARK)))


def read_results(path: Path) -> list[Columns] | None:
    """Read the lines of a results.csv, none if it is not there; None if it is no table of ours."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines: list[dict[str, Any]] = list(reader)
        scores = [name for name in _SHOWN if name not in (*_RAN, VERDICT, "failed")]
        for line in lines:
            [float(line[name] or 0) for name in scores if name in line]  # they are numbers, or ValueError
    except (OSError, ValueError, csv.Error):
        return None
    whole = all(line["folder"] and None not in line for line in lines if "folder" in line)
    return [*lines] if whole and {"losses", "learning_rate", "task", "folder"} <= {*(reader.fieldnames or ())} else None


def run_folder(line: Columns) -> str:
    """Name the output folder of the run of a sweep that a line is of."""
    folder = str(line["folder"])
    return folder if line["task"] == "-" else str(Path(folder).parent.parent)


def _cell(column: str, value: str | int | float | None) -> str:
    """Write a cell of results.md: what an earlier run wrote comes back from its file as text."""
    if value is None or value == "":
        return "-"
    return number(value if column in (*_RAN, *_FLAGS, VERDICT, "failed") else float(value))


def _write_csv(path: Path, lines: Sequence[Columns]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for line in lines for column in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def write_table(path: Path, lines: Sequence[Columns], table: Table) -> Table:
    """Write lines as CSV, and beside them as Markdown what is shown of them, which is returned."""
    _write_csv(path, lines)
    write_text(path.with_suffix(".md"), table.markdown() + "\n")
    return table


def titles(names: Sequence[str]) -> tuple[str, ...]:
    """Write names of columns as the head of a table."""
    return tuple(OF_UNSEEN.get(name, name.replace("_", " ")) for name in names)


# --------------------------------------------------------------------------------------------------- a sequence of tasks

RESULT_FILES = ("results.csv", "results.md")
"""What all runs of an output folder share."""

SPLITS_FILES = ("splits.csv", "splits.md")
"""What evaluations of several splits share."""

SEQUENCE_FILES = ("tasks.csv", "tasks.md", "tasks.png")
"""What a sequence of tasks leaves beside their folders; independent ones leave no plot."""


# ----------------------------------------------------------------------------------------------------- independent tasks


def side_by_side(
    tasks: Sequence[tuple[int, str | None]], summaries: Sequence[Summary], before: Sequence[Summary] = ()
) -> list[Columns]:
    """Line up what each of some models scores after the one task that it has unlearned, with mean and deviation over tasks.

    A task has the name of its target, if it has one. The mean of what was measured `before` is the first line, if it is given.
    """
    scores = [score_columns(summary) | verdict_column(summary) for summary in summaries]
    named = [{"task": task} | ({"target": target} if target else {}) for task, target in tasks]
    lines: list[Columns] = [{**task, **line} for task, line in zip(named, scores, strict=True)]
    values = _values(scores)
    lines.append({"task": "mean", **{name: fmean(own) for name, own in values.items()}, **verdict_counts(lines)})
    lines.append({"task": "deviation", **{name: stdev(own) for name, own in values.items() if len(own) > 1}})
    if first := _values([score_columns(summary) for summary in before]):
        lines.insert(0, {**dict.fromkeys(named[0]), "task": "before", **{name: fmean(own) for name, own in first.items()}})
    return lines


def _values(lines: Sequence[Columns]) -> dict[str, list[float]]:
    """Gather the numbers of every column that has any."""
    found: dict[str, list[float]] = {}
    for name, value in (one for line in lines for one in line.items()):
        if isinstance(value, (int, float)):
            found.setdefault(name, []).append(value)
    return found


def write_splits(folder: Path, summaries: Mapping[str, Summary]) -> Table:
    """Write the `SPLITS_FILES` of the evaluations of one model, by split, and return the table."""
    lines: list[Columns] = [{"split": split, **score_columns(summary)} for split, summary in summaries.items()]
    return write_table(folder / "splits.csv", lines, side_by_side_table(lines))


def side_by_side_table(lines: Sequence[Columns]) -> Table:
    """Show the plainest scores of tasks or splits as a table."""
    shown = _shown(lines)
    return Table(titles(shown), [tuple(_cell(name, line.get(name)) for name in shown) for line in lines])


def write_tasks(folder: Path, results: Sequence[TaskResult]) -> Table:
    """Write tasks.csv and tasks.md of one pair and rate, whose tasks were evaluated, and return the table."""
    tasks = [(result.task, result.target) for result in results]
    before, after = before_and_after(results)
    lines = side_by_side(tasks, after, before)
    return write_table(folder / "tasks.csv", lines, side_by_side_table(lines))


def before_and_after(results: Sequence[TaskResult]) -> tuple[list[Summary], list[Summary]]:
    """Give the summaries that there are, before and after each task."""
    return [one.before for one in results if one.before], [one.after for one in results if one.after]
