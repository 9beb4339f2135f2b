"""Say in the terminal what a run or an evaluation has measured."""

from collections.abc import Mapping
from pathlib import Path

from dualoptim.evaluation.metrics import METRICS
from dualoptim.evaluation.records import read_records
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.tables import (
    NO_QUESTION,
    SET_TITLES,
    Cells,
    Table,
    aggregate_table,
    attack_table,
    benchmark_tables,
    number,
    privacy_table,
    set_table,
    side_by_side,
    skipped_table,
)


def score_table(summaries: Mapping[str, Summary]) -> str:
    """Say what was forgotten and what was kept, by the two plainest metrics, with a column per summary, by its title."""
    rows: list[Cells] = []
    for name, title in SET_TITLES.items():
        for metric in ("probability", "rouge_l_recall"):
            values = [summary.sets.get(name, {}).get(metric) for summary in summaries.values()]
            if values[-1] is not None:
                aim = METRICS[metric].forget if name == "forget" else "stay"
                rows.append((f"{title} (should {aim}): {METRICS[metric].title}", *map(number, values)))
    for key, title in (
        ("model_utility", "model utility (0 to 1, higher keeps more)"),
        ("untargeted_forget_efficacy", "forget efficacy (0 to 1, higher forgets more)"),
    ):
        rows.append((title, *(number(summary.score(key)) for summary in summaries.values())))
    tables = (Table(("", *summaries), rows), *benchmark_tables(summaries))
    return "\n\n".join(table.markdown() for table in tables if table)


def evaluation_tables(summary: Summary) -> str:
    """Say everything that one evaluation measured, what attacks brought back, and what was not measured."""
    columns = {title.replace("after", "score"): scores for title, scores in side_by_side(None, summary).items()}
    tables = (
        *benchmark_tables(columns),
        set_table(columns),
        aggregate_table(columns),
        privacy_table(columns),
        attack_table(None, summary),
    )
    return "\n\n".join(table.markdown() for table in (*tables, skipped_table(summary)) if table)


def example_answers(before: Path, after: Path, counts: Mapping[str, int]) -> str:
    """Show the first answers of some sets, before and after, from two evaluation folders."""
    lines = []
    for name, count in counts.items():
        old, new = (folder / f"{name}.jsonl" for folder in (before, after))
        if not (old.is_file() and new.is_file()):
            continue
        for old_row, new_row in list(zip(read_records(old), read_records(new), strict=True))[:count]:
            lines += [
                f"[{name}] {old_row.question or NO_QUESTION}",
                f"  truth:  {old_row.answer or '(not kept)'}",
                f"  before: {_one_line(old_row.generated)}",
                f"  after:  {_one_line(new_row.generated)}",
            ]
    return "\n".join(lines)


def _one_line(text: str | None, length: int = 110) -> str:
    text = " ".join((text or "").split()) or "(nothing)"
    return text if len(text) <= length else text[: length - 3] + "..."
