"""Tables about one run or several: for the console, `results.csv`, `results.md`, the model card and the report.

A table is a list of rows of text, the header first; `summary` is what `summary.json` holds, of which every part may be absent.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualoptim.reporting import plots
from dualoptim.models.checkpoint import read_json_lines, write_text

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
    "cosine_similarity": "similarity of its answer to the true one",
    "entailment_score": "entailment between the true and its answer",
    "refusal_entailment_score": "its answer entails a refusal",
}
_AGGREGATE_TITLES = {
    "model_utility": ("model utility", "stay"),
    "untargeted_forget_efficacy": ("forget efficacy, untargeted", "rise"),
    "targeted_forget_efficacy": ("forget efficacy, targeted (refusals)", "rise"),
    "tofu.model_utility": ("TOFU model utility", "stay"),
    "tofu.forget_truth_ratio": ("TOFU truth ratio of the forget set", "rise"),
    "tofu.forget_quality": ("TOFU forget quality (p-value against retain-only)", "rise"),
}
_PRIVACY_TITLES = {
    "mia_loss": "membership by loss",
    "mia_zlib": "membership by loss over compressed size",
    "mia_min_k": "membership by Min-K%",
    "mia_min_k_plus_plus": "membership by Min-K%++",
    "mia_gradnorm": "membership by gradient norm",
    "mia_reference": "membership against a reference model",
}
_CAME_BACK_OF = {"best_rouge_l_recall": "rouge_l_recall"}  # the best of several samples is compared with the greedy answer

SEQUENCE_FILES = ("tasks.csv", "tasks.md", "tasks.png")
"""What a sequence of tasks leaves beside their folders."""


def score_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """What was forgotten and what was kept, by the two plainest metrics, with a column per summary, by its title."""
    rows: list[tuple[str, ...]] = [("", *summaries)]
    for name, title in _SET_TITLES.items():
        for metric in ("probability", "rouge_l_recall"):
            values = [summary["sets"].get(name, {}).get(metric) for summary in summaries.values()]
            if values[-1] is not None:
                aim = " (should fall)" if name == "forget" else " (should stay)"
                rows.append((f"{title}{aim}: {_METRIC_TITLES[metric]}", *map(number, values)))
    for key, title in (
        ("model_utility", "model utility (0 to 1, higher keeps more)"),
        ("untargeted_forget_efficacy", "forget efficacy (0 to 1, higher forgets more)"),
    ):
        rows.append((title, *(number(summary.get(key)) for summary in summaries.values())))
    return markdown_table(rows)


def evaluation_tables(summary: Mapping[str, Any]) -> str:
    """Everything that one evaluation measured, what attacks brought back, and what was not measured."""
    columns = {title.replace("after", "score"): scores for title, scores in side_by_side(None, summary).items()}
    tables = [(set_rows(columns), 2), (aggregate_rows(columns), 1), (privacy_rows(columns), 1)]
    tables += [(attack_rows(None, summary), 1)] if summary.get("attacks") else []
    tables += [(skipped_rows(summary), 2)]
    return "\n\n".join(markdown_table(rows, left) for rows, left in tables if len(rows) > 1)


def example_answers(before: Path, after: Path, counts: Mapping[str, int]) -> str:
    """The first answers of some sets, before and after, from two evaluation folders."""
    lines = []
    for name, count in counts.items():
        old, new = (folder / f"{name}.jsonl" for folder in (before, after))
        if not (old.is_file() and new.is_file()):
            continue
        for old_row, new_row in list(zip(read_json_lines(old), read_json_lines(new), strict=True))[:count]:
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
    """`tasks.csv`, `tasks.md` and `tasks.png`: the lines of `sequence`."""
    lines = sequence(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / "tasks.csv", text.getvalue())
    write_text(folder / "tasks.md", markdown_table(sequence_rows(lines)) + "\n")
    (folder / "tasks.png").write_bytes(plots.render(plots.tasks(*sequence_curves(lines))).png)


def sequence(results: Sequence[Any]) -> list[dict[str, Any]]:
    """The first task before it was unlearned, and every task so far after each.

    `results` have `task`, `before` and `after` as a `TaskResult` does, and are those of one pair and rate, in order. A line is
    a state of the model, a column a task: does it remember task 1 again after task 5? A score that could not be computed is
    None.
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
    return lines


def sequence_rows(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of `sequence` as a table, without ROUGE-L."""
    shown = [name for name in lines[0] if not name.endswith("rouge_l_recall")]
    rows = [tuple(name.replace("_", " ") for name in shown)]
    return rows + [tuple(number(line[name]) for name in shown) for line in lines]


def sequence_curves(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[float | None]]]:
    """What a plot of `sequence` shows: the names of the states, and a curve per task, of the retain set and of the utility."""
    tasks = [line["after_task"] for line in lines[1:]]
    curves = {f"task {task}": [line[f"task{task}_probability"] for line in lines] for task in tasks}
    curves |= {
        "retain set": [line["retain_probability"] for line in lines],
        "utility": [line["model_utility"] for line in lines],
    }
    return ["before", *(f"after {task}" for task in tasks)], curves


def side_by_side(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The summaries that there are, by the titles of their columns; the retain-only model's scores are a part of `after`'s."""
    found = {"before": before, "after": after, "retain-only": (after or {}).get("retain_only")}
    return {title: summary for title, summary in found.items() if summary}


def set_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Every metric of every set, a column per summary, and where each should go."""
    rows: list[tuple[str, ...]] = [("rows", "metric", *columns, "should")]
    names = dict.fromkeys([*_SET_TITLES, *(name for summary in columns.values() for name in summary.get("sets", {}))])
    for name in names:
        for metric, title in _METRIC_TITLES.items():
            values = [summary.get("sets", {}).get(name, {}).get(metric) for summary in columns.values()]
            if any(value is not None for value in values):
                rows.append((set_title(name), title, *map(number, values), _aim(name, metric)))
    return rows


def aggregate_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The published scores over all sets, and the tasks of lm-eval."""
    rows: list[tuple[str, ...]] = [("score", *columns, "should")]
    for key, (title, aim) in _AGGREGATE_TITLES.items():
        block, _, name = key.rpartition(".")
        values = [(summary.get(block, {}) if block else summary).get(name) for summary in columns.values()]
        if any(value is not None for value in values):
            rows.append((title, *map(p_value if name == "forget_quality" else number, values), aim))
    measured = [summary.get("general", {}) for summary in columns.values()]
    for task, metric in dict.fromkeys(
        (key, name) for general in measured for key, scores in general.items() for name in scores
    ):
        values = [general.get(task, {}).get(metric) for general in measured]
        rows.append((f"{task}: {metric}", *map(number, values), "" if "stderr" in metric else "stay"))
    return rows


def privacy_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """How well the forget rows can be told from rows that were never learned."""
    rows: list[tuple[str, ...]] = [("privacy", *columns, "should be")]
    measured = [summary.get("privacy", {}) for summary in columns.values()]
    for name in dict.fromkeys([*_PRIVACY_TITLES, *(name for scores in measured for name in scores if name != "privleak")]):
        values = [scores.get(name) for scores in measured]
        if any(value is not None for value in values):
            aim = "like retain-only" if "retain-only" in columns else "0.5"
            rows.append((f"{_PRIVACY_TITLES.get(name, name)} (AUC)", *map(number, values), aim))
    leaks = [scores.get("privleak") for scores in measured]
    if any(leak is not None for leak in leaks):
        rows.append(("PrivLeak, in percent", *map(number, leaks), "0"))
    return rows


def attack_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What attacks bring back: the forget set's scores before, after and under every attack of `after`."""
    rows: list[tuple[str, ...]] = [("state", "probability", "came back", "ROUGE-L", "came back", "retain probability")]
    for title, sets, came_back in attacked_states(before, after):
        forget, cells = sets.get("forget", {}), []
        for metric in ("probability", "best_rouge_l_recall" if "best_rouge_l_recall" in forget else "rouge_l_recall"):
            plain = _CAME_BACK_OF.get(metric, metric)
            change = (came_back or {}).get(metric, (came_back or {}).get(plain))
            known = after.get("sets", {}).get("forget", {}).get(plain)
            if came_back is not None and change is None and None not in (forget.get(metric), known):
                change = forget[metric] - known
            cells += [number(forget.get(metric)), "" if came_back is None else "-" if change is None else f"{change:+.3f}"]
        rows.append((title, *cells, number(sets.get("retain", {}).get("probability"))))
    return rows


def attacked_states(
    before: Mapping[str, Any] | None, after: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]]:
    """Title, scores by set, and what came back, of the states of a model that attacks compare.

    What came back is None for a state that is no attack, and empty where the attack does not say it.
    """
    states: list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]] = []
    states += [("before unlearning", before["sets"], None)] if before else []
    states.append(("after unlearning" if before else "without an attack", after.get("sets", {}), None))
    attacks = after.get("attacks", {})
    relearn = attacks.get("relearn", {})
    if curve := relearn.get("curve"):
        first, last = curve[0]["sets"], curve[-1]["sets"]
        title = f"relearned ({curve[-1]['step']} steps)"
        states.append((title, last, relearn.get("came_back", {})))
        if unseen := last.get("forget_unseen"):
            known = first.get("forget_unseen", {})
            change = {key: value - known[key] for key, value in unseen.items() if key in known}
            states.append((f"{title}, rows not taught", {"forget": unseen}, change))
    if curve := relearn.get("retain_only"):
        states.append((f"retain-only, taught the same ({curve[-1]['step']} steps)", curve[-1]["sets"], None))
    for bits, result in attacks.get("quantize", {}).items():
        states.append((f"weights in {bits} bits", result.get("sets", {}), result.get("came_back", {})))
    if "paraphrase" in attacks:
        states.append(
            ("asked in other words", attacks["paraphrase"].get("sets", {}), attacks["paraphrase"].get("came_back", {}))
        )
    if "sample" in attacks:
        sample = attacks["sample"]
        title = f"best of {sample.get('samples', 'several')} samples"
        states.append((title, sample.get("sets", {}), sample.get("came_back", {})))
    return states


def skipped_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What was not measured, by the reason why."""
    by_reason: dict[str, list[str]] = {}
    for metric, why in summary.get("skipped", {}).items():
        by_reason.setdefault(why, []).append(metric)
    return [("not measured", "because"), *((", ".join(metrics), why) for why, metrics in by_reason.items())]


SHOWN_SETTINGS = """model data forget_file retain_file split splits tasks task task_list forget_losses optim forget_optimizer
retain_optimizer learning_rates learning_rate forget_lr forget_freq retain_freq forget_coeff regularization_coeff beta gamma
layer num_epochs max_steps batch_size gradient_accumulation_steps weight_decay adam_betas base_betas max_update max_grad_norm
optim_bits use_lora lora_rank lora_alpha mask template seed retain_model retain_logs relearn eval_rows""".split()
"""The arguments that a reader asks for first."""
_OFF_AT_ZERO = ("max_steps", "max_update", "relearn", "eval_rows")


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The settings that a reader asks for first, without those that are off."""
    rows: list[tuple[str, ...]] = [("setting", "value")]
    without = ["forget_freq", "retain_freq", "forget_lr"] if settings.get("optim") == "adamw" else []
    without += [] if settings.get("use_lora") else ["lora_rank", "lora_alpha"]
    for name in SHOWN_SETTINGS:
        value = settings.get(name)
        off = value is None or value is False or value in ("", []) or (value == 0 and name in _OFF_AT_ZERO)
        if name not in without and not off:
            rows.append((name.replace("_", " "), shown_value(value)))
    return rows


def shown_value(value: Any) -> str:
    """A setting as one would type it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown_value, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def set_title(name: str) -> str:
    """The name of an evaluation set for a reader."""
    if name.startswith("forget_task"):
        return f"task {name.removeprefix('forget_task')}, unlearned before"
    return _SET_TITLES.get(name, name.replace("_", " "))


def _aim(name: str, metric: str) -> str:
    """Where unlearning should take a metric of a set."""
    if name.startswith("forget_task"):
        return "stay forgotten"
    if name != "forget" or metric == "token_entropy":
        return "stay"
    return "rise" if metric in ("truth_ratio", "refusal_entailment_score") else "fall"


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns also line up as plain text; the first row is the header, `left` columns hold text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def number(value: Any) -> str:
    """A score with three decimals, a dash where there is none."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def p_value(value: float | None) -> str:
    """A p-value, whose size matters where it is small."""
    return f"{value:.0e}" if value is not None and 0 < value < 0.001 else number(value)


def _cell(column: str, value: Any) -> str:
    """A cell of results.md: what an earlier run wrote comes back from the file as text."""
    text = column in ("losses", "optim", "learning_rate", "forget_lr", "seed", "task", "failed")
    return number(value or None if text else float(value) if value not in (None, "") else None)


def _one_line(text: str, length: int = 110) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= length else text[: length - 3] + "..."
