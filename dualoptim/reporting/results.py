"""Write tables into an output folder: of all results, of a sequence of tasks, of a sweep's methods."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dualoptim.atomic import write_bytes, write_text
from dualoptim.errors import WriteError
from dualoptim.evaluation.summary import Scores, Summary
from dualoptim.reporting import plots
from dualoptim.reporting.tables import Table, number

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


# ---------------------------------------------------------------------------------------------------------- all results

_RAN = ("losses", "optim", "learning_rate", "forget_lr", "seed", "task")
_SHOWN = (
    *_RAN,
    "forget_probability",
    "forget_rouge_l_recall",
    "retain_probability",
    "retain_rouge_l_recall",
    "model_utility",
    "untargeted_forget_efficacy",
    "failed",
)

_BENCHMARK = "benchmark_"
"""What the columns of a benchmark's scores begin with."""


def result_columns(result: TaskResult) -> dict[str, str | int | float | None]:
    """Make a result a line of results.csv: what ran, the scores after it, and those before it with the prefix `before_`."""
    line: dict[str, str | int | float | None] = {"losses": result.losses, "learning_rate": f"{result.learning_rate:g}"}
    line["task"] = result.task
    for prefix, summary in (("", result.after), ("before_", result.before)):
        if summary is None:
            continue
        for name in ("model_utility", "untargeted_forget_efficacy"):
            line[prefix + name] = summary.score(name)
        for name, value in (summary.benchmark.scores if summary.benchmark else {}).items():
            line[f"{prefix}{_BENCHMARK}{name}"] = value
        for name, scores in summary.sets.items():
            line |= {f"{prefix}{name}_{metric}": value for metric, value in scores.items()}
    return {**line, "folder": str(result.folder)}


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
    lines: list[Columns] = [line for line in earlier if line["folder"] not in fresh and _run_folder(line) not in begun]
    lines += new
    _write_csv(path, lines)
    shown = [column for column in (*_SHOWN, *_of_benchmark(lines)) if any(column in line for line in lines)]
    rows = [tuple(_cell(column, line.get(column)) for column in shown) for line in lines]
    write_text(folder / "results.md", Table(_titles(shown), rows).markdown() + "\n")


def _of_benchmark(lines: Sequence[Columns]) -> list[str]:
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
        scores = [name for name in _SHOWN if name not in (*_RAN, "failed")]
        for line in lines:
            [float(line[name] or 0) for name in scores if name in line]  # they are numbers, or ValueError
    except (OSError, ValueError, csv.Error):
        return None
    whole = all(line["folder"] and None not in line for line in lines if "folder" in line)
    return [*lines] if whole and {"losses", "learning_rate", "task", "folder"} <= {*(reader.fieldnames or ())} else None


def _run_folder(line: Columns) -> str:
    """Name the output folder of the run of a sweep that a line is of."""
    folder = str(line["folder"])
    return folder if line["task"] == "-" else str(Path(folder).parent.parent)


def _cell(column: str, value: str | int | float | None) -> str:
    """Write a cell of results.md: what an earlier run wrote comes back from its file as text."""
    if value is None or value == "":
        return "-"
    return number(value if column in (*_RAN, "failed") else float(value))


def _write_csv(path: Path, lines: Sequence[Columns]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for line in lines for column in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def _titles(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)


# --------------------------------------------------------------------------------------------------- a sequence of tasks

RESULT_FILES = ("results.csv", "results.md")
"""What all runs of an output folder share."""

SWEEP_FILES = (*RESULT_FILES, "methods.md", "results.png")
"""What a sweep shares with an earlier one."""

SEQUENCE_FILES = ("tasks.csv", "tasks.md", "tasks.png")
"""What a sequence of tasks leaves beside their folders."""


@dataclass(frozen=True)
class Standing:
    """What a model knows after a task of a sequence: of every task's rows, and of what is kept. None: not measured."""

    after_task: int | str  # "before" the first
    tasks: Mapping[int, Scores]
    all_tasks_probability: float | None  # the mean over the tasks unlearned so far
    retain_probability: float | None
    model_utility: float | None
    untargeted_forget_efficacy: float | None

    def columns(self) -> dict[str, str | int | float | None]:
        """Make it a line of tasks.csv."""
        line: dict[str, str | int | float | None] = {"after_task": self.after_task}
        for task, scores in self.tasks.items():
            line |= {f"task{task}_{metric}": scores.get(metric) for metric in ("probability", "rouge_l_recall")}
        for name in ("all_tasks_probability", "retain_probability", "model_utility", "untargeted_forget_efficacy"):
            line[name] = getattr(self, name)
        return line


def sequence(tasks: Sequence[int], summaries: Sequence[Summary]) -> list[Standing]:
    """Line up what the model knew before the first of `tasks` and after each: does it remember task 1 again after task 5?

    `summaries` are those of one pair and rate, one more than tasks: before the first, and after each.
    """
    found = []
    for done, summary in enumerate(summaries):
        newest = tasks[max(done - 1, 0)]
        own = {task: summary.sets.get("forget" if task == newest else f"forget_task{task}", {}) for task in tasks}
        seen = [own[task]["probability"] for task in tasks[:done] if "probability" in own[task]]
        found.append(
            Standing(
                after_task=tasks[done - 1] if done else "before",
                tasks=own,
                all_tasks_probability=sum(seen) / len(seen) if seen else None,
                retain_probability=summary.sets.get("retain", {}).get("probability"),
                model_utility=summary.model_utility,
                untargeted_forget_efficacy=summary.untargeted_forget_efficacy,
            )
        )
    return found


def sequence_table(standings: Sequence[Standing]) -> Table:
    """Show a sequence as a table, without ROUGE-L."""
    lines = [standing.columns() for standing in standings]
    shown = [name for name in lines[0] if not name.endswith("rouge_l_recall")]
    return Table(_titles(shown), [tuple(number(line[name]) for name in shown) for line in lines])


def sequence_plot(standings: Sequence[Standing]) -> plots.Draw:
    """Draw a sequence: a curve per task, of the retain set and of the utility."""
    ticks = [f"after {standing.after_task}" if number else "before" for number, standing in enumerate(standings)]
    curves = {f"task {task}": [one.tasks[task].get("probability") for one in standings] for task in standings[0].tasks}
    curves |= {
        "retain set": [standing.retain_probability for standing in standings],
        "utility": [standing.model_utility for standing in standings],
    }
    return plots.tasks(ticks, curves)


def write_sequence(folder: Path, results: Sequence[TaskResult]) -> None:
    """Write the `SEQUENCE_FILES` of one pair and rate, whose tasks were evaluated."""
    summaries = [results[0].before, *(result.after for result in results)]
    standings = sequence([result.task for result in results], [summary for summary in summaries if summary is not None])
    _write_csv(folder / "tasks.csv", [standing.columns() for standing in standings])
    write_text(folder / "tasks.md", sequence_table(standings).markdown() + "\n")
    write_bytes(folder / "tasks.png", plots.render(sequence_plot(standings)).png)


# --------------------------------------------------------------------------------------------------------------- a sweep

_METHOD_SCORES = ("model_utility", "untargeted_forget_efficacy", "retain_probability", "forget_probability")


def write_sweep(folder: Path, lines: Sequence[Columns]) -> None:
    """Write what a sweep has found: results.csv and results.md, beside the lines of others, methods.md and results.png."""
    write_results(folder, lines, {_run_folder(line) for line in lines})
    methods = scores_by_method(lines)
    rows = []
    for method, scores in methods.items():
        count = max(len(values) for values in scores.values())
        rows.append((method, str(count), *map(_spread, scores.values())))
    head = ("method", "runs", "model utility", "forget efficacy", "retain probability", "forget probability")
    write_text(folder / "methods.md", Table((*head, *_titles(_of_benchmark(lines))), rows).markdown() + "\n")
    write_bytes(folder / "results.png", plots.render(plots.methods(methods)).png)


def scores_by_method(lines: Sequence[Columns]) -> dict[str, dict[str, list[float]]]:
    """Gather for every method (pair, optimizer, rates) the scores of its runs after their last task, one per seed."""
    last: dict[str, Columns] = {}
    for line in lines:
        folder = str(line["folder"])
        last[folder if line["task"] == "-" else str(Path(folder).parent)] = line
    names = (*_METHOD_SCORES, *_of_benchmark(lines))
    found: dict[str, dict[str, list[float]]] = {}
    for line in last.values():
        method = "{losses} {optim} lr {learning_rate} forget {forget_lr}".format(**line)
        scores = found.setdefault(method, {name: [] for name in names})
        for name in names:
            value = line.get(name)
            if isinstance(value, (int, float)):
                scores[name].append(value)
    return found


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
