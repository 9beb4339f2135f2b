"""Shares of the base rate: the published ones by hand, the others against transformers and its own numbers."""

import pytest
import torch
from transformers import get_scheduler

from dualoptim.method.rates import lr_factor


def factors(schedule, total, warmup):
    return [lr_factor(schedule, step, total, warmup) for step in range(total)]


def test_ten_published_rates_by_hand():
    # warm-up 1/4 .. 4/4 reaches the base rate on its last step; the decay spans the other six and never arrives at zero
    expected = [1 / 4, 2 / 4, 3 / 4, 4 / 4, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors("published", 10, 4) == pytest.approx(expected)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (6, 0), (60, 12), (7, 6)])
def test_no_published_step_has_rate_zero(total, warmup):
    found = factors("published", total, warmup)
    assert min(found) > 0
    assert max(found) == 1


@pytest.mark.parametrize("warmup", [0, 1, 3, 17, 30])
@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_the_others_are_transformers_own_to_the_digit(schedule, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup, 17)
    expected = []
    for _ in range(17):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert factors(schedule, 17, warmup) == expected


def test_the_others_are_the_numbers_that_published_runs_had(shared_json):
    for name, one in shared_json("oracles/schedules.json")["schedules"].items():
        if one["scheduler"] == "constant" and one["warmup_steps"]:
            continue  # which ignores a warm-up; ours is the one that has it
        schedule = one["scheduler"].removesuffix("_with_warmup")
        assert factors(schedule, 30, one["warmup_steps"]) == one["factor_at_step"], name
