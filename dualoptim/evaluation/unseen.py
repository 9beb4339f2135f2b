"""Tell how well the rows of the retain set are kept that no step trained on, and how well the others."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from dualoptim.data.rows import Row
from dualoptim.data.unseen import said
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summarize import set_scores
from dualoptim.evaluation.summary import SEEN, UNSEEN, Summary

ALL_SEEN = "every row of the retain set that is measured is one that steps train on; hold some out, as --retain-held-out 0.2"


def with_unseen(summary: Summary, rows: Sequence[Row], records: Sequence[Record], trained: Collection[str] | None) -> Summary:
    """Add the parts of the retain set to a summary, or why there are none.

    `records` are those of the first of `rows`, and `trained` names the rows that steps train on, as `said` names them; None
    where that is not known. The part that steps train on is given beside the other alone. A set or group of the data that has
    the name of a part stays.
    """
    if trained is None or not records:
        return summary
    parts: dict[str, list[Record]] = {SEEN: [], UNSEEN: []}
    for row, record in zip(rows, records, strict=False):
        parts[SEEN if said(row) in trained else UNSEEN].append(record)
    if not parts[UNSEEN]:
        return replace(summary, skipped={**summary.skipped, UNSEEN: ALL_SEEN})
    found = {name: own for name, own in parts.items() if own and name not in summary.sets}
    return replace(
        summary,
        sets={**summary.sets, **{name: set_scores(name, own, {}) for name, own in found.items()}},
        rows={**summary.rows, **{name: len(own) for name, own in found.items()}},
    )
