"""Say what a run or an evaluation has measured: in tables that fit the terminal, or in Markdown where the output is a file."""

import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill

from dualoptim.evaluation.metrics import METRICS
from dualoptim.evaluation.records import read_records
from dualoptim.evaluation.summary import SEEN, UNSEEN, RetainOnly, Summary
from dualoptim.reporting.attack_tables import attack_table
from dualoptim.reporting.tables import (
    NO_QUESTION,
    SET_TITLES,
    Cells,
    Table,
    aggregate_table,
    benchmark_tables,
    efficacy_aim,
    number,
    privacy_table,
    set_table,
    set_title,
    side_by_side,
)

_LONG = 24
"""Characters of a word after which it may be cut, as answers that only repeat themselves, and folders, are."""


def shown(table: Table) -> str:
    """Write a table as it goes to standard output: fitted to a terminal, or in Markdown.

    No word of usual length is cut: where the terminal is too narrow for all columns, each row is a heading and a line for each
    of its other cells.
    """
    if not sys.stdout.isatty():
        return table.markdown()
    from rich import box  # a tenth of a second, and only for a terminal
    from rich.console import Console
    from rich.table import Table as Fitted
    from rich.text import Text

    room = shutil.get_terminal_size().columns
    if not (widths := _widths([*zip(table.head, *table.rows, strict=True)], room)):
        return "\n".join(_stacked(table))
    fitted = Fitted(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for place, (title, width) in enumerate(zip(table.head, widths, strict=True)):
        fitted.add_column(Text(title), justify="left" if place < table.left else "right", width=width, overflow="fold")
    for row in table.rows:
        fitted.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=room).print(fitted)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").split("\n"))


def wrapped(line: str) -> str:
    """Break a line for a terminal, and no flag; a file gets it whole."""
    if not sys.stdout.isatty():
        return line
    return fill(
        line, shutil.get_terminal_size().columns, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _widths(columns: Sequence[Cells], room: int) -> list[int] | None:
    """Share a line among columns, the widest of which give way, as far as their words go; None if it is too short for them."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in columns]
    least = [min(_LONG, max(cell_len(word) for cell in column for word in (cell.split() or [""]))) for column in columns]
    room -= 2 * (len(columns) - 1)
    while sum(widths) > room:
        wide = [place for place, width in enumerate(widths) if width > least[place]]
        if not wide:
            return None
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _stacked(table: Table) -> Iterator[str]:
    """Write each row as a heading of its first cells and, under it, the others by the titles of their columns."""
    left = min(table.left, len(table.head) - 1) or 1
    width = max(map(len, table.head[left:]), default=0)
    for row in table.rows:
        first = zip(table.head, row[:left], strict=False)
        yield " ".join(f"{title} {cell}" if cell.isdigit() else cell for title, cell in first if cell)
        yield from (f"  {title:{width}}  {cell}" for title, cell in zip(table.head[left:], row[left:], strict=True) if cell)


def score_table(summaries: Mapping[str, Summary], explain: bool = True) -> str:
    """Say what was forgotten and what was kept, by the two plainest metrics, with a column per summary, by its title.

    A retain-only model that the last one was compared with has a column as well. `explain` why no unseen rows were measured.
    """
    newest = [*summaries.values()][-1]
    columns: dict[str, Summary | RetainOnly] = dict(summaries)
    if newest.retain_only:
        columns["retain-only"] = newest.retain_only
    rows: list[Cells] = []
    for name in (name for name in SET_TITLES if name != SEEN):
        title = set_title(name, *summaries.values())
        for metric in ("probability", "rouge_l_recall"):
            if metric in newest.sets.get(name, {}):
                values = (summary.sets.get(name, {}).get(metric) for summary in columns.values())
                aim = METRICS[metric].forget if name.startswith("forget") else "stay"
                rows.append((f"{title} (should {aim}): {METRICS[metric].title}", *map(number, values)))
    rises = efficacy_aim(columns).replace("rise", "higher forgets more")
    for key, title in (
        ("model_utility", "model utility (0 to 1, higher keeps more)"),
        (
            "untargeted_forget_efficacy",
            f"forget efficacy (0 to 1, {rises})",
        ),
    ):
        rows.append((title, *(number(summary.score(key)) for summary in columns.values())))
    tables = (Table(("", *columns), rows), *benchmark_tables(summaries))
    why = newest.skipped.get(UNSEEN) if explain else None
    missing = [wrapped(f"Not measured: {SET_TITLES[UNSEEN]}, because {why}.")] if why else []
    return "\n\n".join([*(shown(table) for table in tables if table), *missing])


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
    skipped = [f"Not measured: {', '.join(summary.skipped)}. `skipped` in summary.json says why."] if summary.skipped else []
    return "\n\n".join([*(shown(table) for table in tables if table), *skipped])


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
