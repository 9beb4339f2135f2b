"""Write what a sweep has found, and how methods compare: their scores over seeds, independent tasks and splits."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from dualoptim.atomic import write_text
from dualoptim.evaluation.summary import PARTS, UNSEEN
from dualoptim.reporting.results import (
    OF_UNSEEN,
    RESULT_FILES,
    Columns,
    of_benchmark,
    run_folder,
    settings,
    titles,
    write_results,
)
from dualoptim.reporting.tables import Table
from dualoptim.reporting.verdicts import VERDICT, verdict_counts

METHODS = "methods.md"

SWEEP_FILES = (*RESULT_FILES, METHODS)
"""What a sweep shares with an earlier one."""

_SCORES = {
    "model_utility": "model utility",
    "untargeted_forget_efficacy": "forget efficacy",
    "retain_probability": "retain probability",
    "forget_probability": "forget probability",
}
_BRIEF = {
    "retain probability": "retain",
    "forget probability": "forget",
    **dict.fromkeys(OF_UNSEEN.values(), "unseen"),
}
"""Titles of columns on a terminal."""


def write_sweep(folder: Path, lines: Sequence[Columns]) -> None:
    """Write what a sweep has found, results.csv and results.md beside the lines of others, and methods.md."""
    write_results(folder, lines, {run_folder(line) for line in lines})
    write_methods(folder, lines)


def write_methods(folder: Path, lines: Sequence[Columns]) -> Table:
    """Write methods.md, the mean of each method's scores and their deviation (n - 1), and return its table."""
    table = _table(lines)
    write_text(folder / METHODS, table.markdown() + "\n")
    return table


def brief_methods(lines: Sequence[Columns]) -> tuple[Table, str]:
    """Show the table of methods as it fits a terminal, without what all of them share, and say what stands in it."""
    table, methods = _table(lines), [*_by_method(lines)]
    names, shared = told_apart(methods), shared_words(methods)
    rows = [(name, *row[1:]) for name, row in zip(names, table.rows, strict=True)]
    kept = [place for place, title in enumerate(table.head) if title != "runs" or any(row[place] != "1" for row in rows)]
    head = tuple(_BRIEF.get(table.head[place], table.head[place]) for place in kept)
    says = f"retain, forget and unseen ({PARTS[UNSEEN]}) are probabilities of the true answers"
    says += f"; all methods: {', '.join(shared)}" if shared else ""
    return Table(head, [tuple(row[place] for place in kept) for row in rows]), f"{says}."


def _table(lines: Sequence[Columns]) -> Table:
    rows, judged = [], [VERDICT] if verdict_counts(lines) else []
    for (method, scores), own in zip(scores_by_method(lines).items(), _by_method(lines).values(), strict=True):
        count, verdicts = max(len(values) for values in scores.values()), verdict_counts(own)
        rows.append((method, str(count), *map(_spread, scores.values()), *(verdicts.get(name, "-") for name in judged)))
    return Table(("method", "runs", *_titles(lines).values(), *titles(of_benchmark(lines)), *judged), rows)


def _titles(lines: Sequence[Columns]) -> dict[str, str]:
    """Give the plainest scores of runs by the names of their columns, of those that they have."""
    return _SCORES | {name: title for name, title in OF_UNSEEN.items() if any(name in line for line in lines)}


def scores_by_method(lines: Sequence[Columns]) -> dict[str, dict[str, list[float]]]:
    """Gather the scores of the runs of every method, one per seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for method, own in _by_method(lines).items():
        values = {name: [line.get(name) for line in own] for name in (*_titles(lines), *of_benchmark(lines))}
        found[" ".join(method)] = {
            name: [one for one in ones if isinstance(one, (int, float))] for name, ones in values.items()
        }
    return found


def ends(lines: Sequence[Columns]) -> list[Columns]:
    """Give the lines after the last task of each run, or of every task, if tasks are independent."""
    return [*{sequence_folder(line): line for line in lines}.values()]


def sequence_folder(line: Columns) -> str:
    """Name the folder of what a line ends, or goes on with: a sequence of tasks, or a task that is alone."""
    alone = line["task"] == "-" or line.get("tasks_independent") == "True"
    return str(line["folder"]) if alone else str(Path(str(line["folder"])).parent)


def varied_settings(lines: Sequence[Columns]) -> list[str]:
    """Name the flags by whose values methods differ, beside pair, optimizer and rates."""
    return [name for name in settings(lines) if name != "tasks_independent" or len({line.get(name) for line in lines}) > 1]


def _by_method(lines: Sequence[Columns]) -> dict[tuple[str, ...], list[Columns]]:
    """Gather the `ends` of every method (pair, optimizer, rates, what else varies), one per seed."""
    varied = varied_settings(lines)
    found: dict[tuple[str, ...], list[Columns]] = {}
    for line in ends(lines):
        words = [str(line["losses"]), str(line.get("optim", "")), f"lr {line['learning_rate']}"]
        words += [f"forget {line['forget_lr']}"] if "forget_lr" in line else []
        words += [f"{name} {line[name]}" for name in varied if name in line]
        found.setdefault(tuple(filter(None, words)), []).append(line)
    return found


def told_apart(methods: Sequence[Sequence[str]]) -> list[str]:
    """Name methods by those of their words that not all share."""
    shared = shared_words(methods)
    return [" ".join(word for word in words if word not in shared) for words in methods]


def shared_words(methods: Sequence[Sequence[str]]) -> list[str]:
    """Give the words that all methods share; none of a single method, or where nothing else would be left of one."""
    shared = [word for word in methods[0] if all(word in words for words in methods)] if len(methods) > 1 else []
    return shared if all(len(words) > len(shared) for words in methods) else []


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
