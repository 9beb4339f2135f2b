"""Tables and text about one run or several, for the console, `results.csv`, `results.md` and the model card."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dualoptim.args import CommonArgs, to_dict
from dualoptim.checkpoint import write_text

_SET_TITLES = {
    "forget": "forget set",
    "retain": "retain set",
    "real_authors": "real authors",
    "world_facts": "world facts",
}
_METRIC_TITLES = {
    "probability": "probability of the true answer",
    "rouge_l_recall": "ROUGE-L recall of its own answer",
    "truth_ratio": "truth ratio",
    "exact_memorization": "exact memorization",
    "extraction_strength": "extraction strength",
    "token_entropy": "token entropy of its answer",
}


SEQUENCE_FILES = ("tasks.csv", "tasks.md", "tasks.png")
"""What a sequence of tasks leaves beside their folders."""


def score_table(summaries: Mapping[str, Mapping[str, Any]], full: bool = False) -> str:
    """What was forgotten and what was kept, as a Markdown table with a column per summary, by its title.

    Without `full` only the two plainest metrics are shown, which should fall on the forget set and stay on the others.
    """
    rows: list[tuple[str, ...]] = [("", *summaries)]
    for name, title in _SET_TITLES.items():
        for metric in list(_METRIC_TITLES) if full else list(_METRIC_TITLES)[:2]:
            values = [summary["sets"].get(name, {}).get(metric) for summary in summaries.values()]
            if values[-1] is not None:
                aim = "" if full else " (should fall)" if name == "forget" else " (should stay)"
                rows.append((f"{title}{aim}: {_METRIC_TITLES[metric]}", *map(_number, values)))
    for key, title in (
        ("model_utility", "model utility (0 to 1, higher keeps more)"),
        ("untargeted_forget_efficacy", "forget efficacy (0 to 1, higher forgets more)"),
    ):
        rows.append((title, *(_number(summary.get(key)) for summary in summaries.values())))
    return markdown_table(rows)


def example_answers(before: Path, after: Path, counts: Mapping[str, int]) -> str:
    """The first answers of some sets, before and after, from two evaluation folders."""
    lines = []
    for name, count in counts.items():
        old, new = (folder / f"{name}.jsonl" for folder in (before, after))
        if not (old.is_file() and new.is_file()):
            continue
        pairs = zip(old.read_text(encoding="utf-8").splitlines(), new.read_text(encoding="utf-8").splitlines(), strict=True)
        for old_row, new_row in [(json.loads(a), json.loads(b)) for a, b in list(pairs)[:count]]:
            lines += [
                f"[{name}] {old_row['question'] or '(a passage, continued from its middle)'}",
                f"  truth:  {old_row['answer']}",
                f"  before: {_one_line(old_row['generated'])}",
                f"  after:  {_one_line(new_row['generated'])}",
            ]
    return "\n".join(lines)


def results_row(
    losses: str, rate: float, task: int, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, folder: Path
) -> dict[str, Any]:
    """One line of `results.csv`: what ran, the scores after it, and those before it with the prefix `before_`."""
    row: dict[str, Any] = {"losses": losses, "learning_rate": f"{rate:g}", "task": task}
    for prefix, summary in (("", after), ("before_", before)):
        if summary is None:
            continue
        for name in ("model_utility", "untargeted_forget_efficacy"):
            row[prefix + name] = summary.get(name)
        for name, values in summary["sets"].items():
            row |= {f"{prefix}{name}_{metric}": value for metric, value in values.items()}
    return {**row, "folder": str(folder)}


def write_results(folder: Path, new_rows: Sequence[Mapping[str, Any]]) -> None:
    """`results.csv` with every column and `results.md` with the plainest ones; rows of earlier runs in the folder stay."""
    path = folder / "results.csv"
    with path.open(encoding="utf-8", newline="") if path.is_file() else io.StringIO() as file:
        fresh = {str(row["folder"]) for row in new_rows}
        rows = [row for row in csv.DictReader(file) if row["folder"] not in fresh] + list(new_rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    wanted = [
        "losses",
        "optim",
        "learning_rate",
        "forget_lr",
        "seed",
        "task",
        "forget_probability",
        "forget_rouge_l_recall",
        "retain_probability",
        "retain_rouge_l_recall",
        "model_utility",
        "untargeted_forget_efficacy",
        "failed",
    ]
    shown = [column for column in wanted if column in columns]
    table = [tuple(column.replace("_", " ") for column in shown)]
    table += [tuple(_cell(column, row.get(column)) for column in shown) for row in rows]
    write_text(folder / "results.md", markdown_table(table) + "\n")


def write_sequence(folder: Path, results: Sequence[Any]) -> None:
    """`tasks.csv`, `tasks.md` and `tasks.png`: the first task before it was unlearned, and every task so far after each.

    `results` are `TaskResult`s of one pair and rate, in order. A line is a state of the model, a column a task: does it
    remember task 1 again after task 5? A score that could not be computed is empty.
    """
    tasks = [result.task for result in results]
    lines: list[dict[str, Any]] = []
    states = [("before", results[0].before, []), *((r.task, r.after, tasks[: n + 1]) for n, r in enumerate(results))]
    for state, summary, unlearned in states:
        scores = summary["sets"]
        line: dict[str, Any] = {"after_task": state}
        newest = unlearned[-1] if unlearned else tasks[0]
        for task in tasks:
            own = scores.get("forget" if task == newest else f"forget_task{task}", {})
            line |= {f"task{task}_{metric}": own.get(metric) for metric in ("probability", "rouge_l_recall")}
        seen = [value for task in unlearned if (value := line[f"task{task}_probability"]) is not None]
        line["all_tasks_probability"] = sum(seen) / len(seen) if seen else None
        line["retain_probability"] = scores.get("retain", {}).get("probability")
        for name in ("model_utility", "untargeted_forget_efficacy"):
            line[name] = summary.get(name)
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "tasks.csv", text.getvalue())
    shown = [name for name in lines[0] if not name.endswith("rouge_l_recall")]
    table = [tuple(name.replace("_", " ") for name in shown)]
    table += [tuple(_number(line[name]) for name in shown) for line in lines]
    write_text(folder / "tasks.md", markdown_table(table) + "\n")
    curves = {f"task {task}": [line[f"task{task}_probability"] for line in lines] for task in tasks}
    curves |= {
        "retain set": [line["retain_probability"] for line in lines],
        "utility": [line["model_utility"] for line in lines],
    }
    ticks = ["before", *(f"after {task}" for task in tasks)]
    plot_lines(folder / "tasks.png", ticks, curves, "probability of the true answer")


def plot_lines(path: Path, ticks: Sequence[str], curves: Mapping[str, Sequence[float | None]], title: str) -> None:
    """A PNG with one line per curve over named places; what is None is left out."""
    from matplotlib.figure import Figure  # half a second, and only for plots

    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        dashed = "--" if not name.startswith("task") else "-"
        axes.plot([float("nan") if v is None else v for v in values], dashed, marker="o", markersize=3, label=name)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def model_card(base: str, what: str, args: CommonArgs, summary: Mapping[str, Any] | None = None) -> str:
    """The README of a saved model: what was done to which model, with which settings, and how it scores."""
    settings = yaml.safe_dump(to_dict(args), sort_keys=False, allow_unicode=True)
    scores = f"\n## Evaluation\n\n```json\n{json.dumps(summary, indent=2)}\n```\n" if summary else ""
    return (
        "---\nlibrary_name: transformers\ntags:\n- dualoptim\n- unlearning\n---\n\n"
        f"# {base}, {what}\n\nMade with dualoptim.\n\n## Settings\n\n```yaml\n{settings}```\n{scores}"
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _cell(column: str, value: Any) -> str:
    """A cell of results.md: what an earlier run wrote comes back from the file as text."""
    text = column in ("losses", "optim", "learning_rate", "forget_lr", "seed", "task", "failed")
    return _number(value or None if text else float(value) if value not in (None, "") else None)


def _one_line(text: str, length: int = 110) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= length else text[: length - 3] + "..."
