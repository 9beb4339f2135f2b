"""The parts of the retain set: rows that steps trained on, and rows that none did."""

import pytest

from dualoptim.data.rows import Row
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summary import Summary
from dualoptim.evaluation.unseen import ALL_SEEN, with_unseen

ROWS = [Row("a?", "A"), Row("b?", "B"), Row("c?", "C"), Row("d?", "D")]
RECORDS = [Record("a?", "A", probability=0.9), Record("b?", "B", probability=0.5), Record("c?", "C", probability=0.3)]
BEFORE = Summary(sets={"retain": {"probability": 1.7 / 3}}, rows={"retain": 3})


def test_each_part_of_the_retain_set_has_its_own_means_and_nothing_else_changes():
    summary = with_unseen(BEFORE, ROWS, RECORDS, {"a?", "x?"})
    assert summary.sets == {"retain": {"probability": 1.7 / 3}, "retain_seen": {"probability": 0.9},
                            "retain_unseen": {"probability": pytest.approx(0.4)}}  # fmt: skip
    assert summary.rows == {"retain": 3, "retain_seen": 1, "retain_unseen": 2}
    assert summary["sets"]["retain_unseen"]["probability"] == pytest.approx(0.4)
    assert summary.skipped == {}


def test_where_no_row_or_every_row_is_trained_on_there_is_one_part_or_a_reason():
    assert set(with_unseen(BEFORE, ROWS, RECORDS, frozenset()).sets) == {"retain", "retain_unseen"}
    seen = with_unseen(BEFORE, ROWS, RECORDS, {"a?", "b?", "c?"})  # the fourth is not measured
    assert (seen.sets, seen.skipped) == (BEFORE.sets, {"retain_unseen": ALL_SEEN})
    assert with_unseen(BEFORE, ROWS, RECORDS, None) is BEFORE
    assert with_unseen(BEFORE, ROWS, [], {"a?"}) is BEFORE


def test_a_group_of_the_users_that_has_the_name_of_a_part_stays():
    grouped = Summary(sets={**BEFORE.sets, "retain_unseen": {"probability": 0.1}}, rows={"retain": 3, "retain_unseen": 1})
    summary = with_unseen(grouped, ROWS, RECORDS, {"a?"})
    assert (summary.sets["retain_unseen"], summary.rows["retain_unseen"]) == ({"probability": 0.1}, 1)
