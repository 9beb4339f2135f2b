"""Phases and rates: literal tables, each with its reason."""

import pytest

from dualoptim.method.schedule import Plan, cycle_length, phase_at, phase_step, steps_per_epoch

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


def test_a_plan_says_where_a_run_ends_and_what_its_rate_decays_over():
    plan = Plan(PUBLISHED, steps_per_epoch=12, num_epochs=5, warmup_epochs=1)
    assert (plan.total_steps, plan.last_step, plan.warmup_steps) == (60, 60, 12)
    assert [plan.lr_factor(step) for step in (0, 11, 12, 59)] == pytest.approx([1 / 12, 1, 1, 1 / 48])
    assert (plan.steps_of("forget"), plan.steps_of("retain")) == (10, 50)
    shorter = Plan(PUBLISHED, 12, 5, 1, max_steps=7)
    assert (shorter.total_steps, shorter.last_step) == (60, 7)  # the rate decays over all of them
    assert shorter.lr_factor(6) == plan.lr_factor(6)
    assert (shorter.steps_of("forget"), shorter.steps_of("retain")) == (2, 5)
    longer = Plan(PUBLISHED, 12, 5, 1, max_steps=300)
    assert (longer.total_steps, longer.last_step) == (300, 300)  # epochs repeat, and the rate decays over all they take
    assert [longer.lr_factor(step) for step in (0, 11, 12, 299)] == pytest.approx([1 / 12, 1, 1, 1 / 288])
    assert (longer.steps_of("forget"), longer.steps_of("retain")) == (50, 250)
    assert Plan(PUBLISHED, 12, 5, max_steps=60).lr_factor(30) == Plan(PUBLISHED, 12, 5).lr_factor(30)


def test_warm_up_leaves_a_step_to_decay_and_needs_more_than_one_step_an_epoch():
    assert Plan((("joint", 1),), 1, 5, warmup_epochs=1).warmup_steps == 0
    assert Plan((("joint", 1),), 4, 1, warmup_epochs=1).warmup_steps == 3
    assert Plan((("joint", 1),), 4, 5, warmup_epochs=0.5).warmup_steps == 2
    assert Plan((("joint", 1),), 4, 5).warmup_steps == 0


def test_a_warm_up_in_steps_takes_the_place_of_epochs_and_is_cut_for_the_published_schedule_alone():
    joint = (("joint", 1),)
    assert Plan(joint, 4, 5, warmup_epochs=1, warmup=3).warmup_steps == 3
    assert Plan(joint, 4, 1, warmup=9).warmup_steps == 3
    assert Plan(joint, 1, 5, warmup=2).warmup_steps == 2
    assert Plan(joint, 4, 1, warmup=9, schedule="cosine").warmup_steps == 9
    assert Plan(joint, 1, 5, warmup_epochs=2, schedule="linear").warmup_steps == 2
    assert [Plan(PUBLISHED, 6, 1, 0, schedule="linear").lr_factor(step) for step in (0, 1, 5)] == [1, 5 / 6, 1 / 6]
