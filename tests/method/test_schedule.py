"""Phases and rates: literal tables, each with its reason."""

import pytest

from dualoptim.method.schedule import cycle_length, lr_factor, phase_at, phase_step, steps_per_epoch

PUBLISHED = (("forget", 1), ("retain", 5))


def test_one_forget_step_then_five_retain_steps():
    assert "".join(phase_at(step, PUBLISHED)[0] for step in range(14)) == "frrrrrfrrrrrfr"
    assert cycle_length(PUBLISHED) == 6


def test_phase_steps_count_each_phase_without_gaps():
    cycle = (("forget", 2), ("retain", 3))
    seen = {"forget": [], "retain": []}
    for step in range(50):
        seen[phase_at(step, cycle)].append(phase_step(step, cycle))
    assert seen == {"forget": list(range(20)), "retain": list(range(30))}


@pytest.mark.parametrize(
    ("rows", "batch", "cycle", "steps"),
    [
        (40, 20, PUBLISHED, 12),  # two forget steps, five retain steps after each
        (41, 20, PUBLISHED, 18),  # a started step is taken
        (5, 20, PUBLISHED, 6),  # fewer rows than a batch: one cycle
        (100, 20, (("forget", 2), ("retain", 1)), 9),  # five forget steps make three cycles of two
        (40, 20, (("joint", 1),), 2),
    ],
)
def test_steps_per_epoch(rows, batch, cycle, steps):
    assert steps_per_epoch(rows, batch, cycle) == steps


def test_ten_rates_by_hand():
    # warm-up 1/4 .. 4/4 reaches the base rate on its last step; the decay spans the other six and never arrives at zero
    expected = [1 / 4, 2 / 4, 3 / 4, 4 / 4, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [lr_factor(step, 10, 4) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (6, 0), (60, 12), (7, 6)])
def test_no_step_has_rate_zero(total, warmup):
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert min(factors) > 0
    assert max(factors) == 1
