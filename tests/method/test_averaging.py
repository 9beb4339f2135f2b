"""The moving mean of weights at the ends of cycles and of the run: by hand, and only there."""

import pytest
import torch
from accelerate import Accelerator

from dualoptim import InputError, UnlearnArgs
from dualoptim.method.averaging import average, put_mean
from dualoptim.method.engine import prepare
from dualoptim.method.schedule import Plan

CYCLE = (("forget", 1), ("retain", 2))


def averaged(decay, steps):
    """A run of so many steps, after which the weights are 1, 2, 3, ...: what it ends with, and the mean before its end."""
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    bias, plan = model.bias.detach().clone(), Plan(CYCLE, 6, 2, max_steps=steps)
    engine = prepare(Accelerator(cpu=True), model, torch.optim.SGD([model.weight], lr=1.0))
    engine.average_cycles = decay
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(step)
        average(engine, plan, step)
        assert model.weight.tolist() == [[step, step]], "what trains goes on as it is"
    before = [mean.flatten().tolist() for mean in engine.means.values()]
    put_mean(engine, plan)
    assert torch.equal(model.bias, bias)
    return model.weight.flatten().tolist(), before


@pytest.mark.parametrize(("decay", "mean"), [(0.5, 3 / 4 + 6 / 4 + 9 / 2), (0.9, 0.81 * 3 + 0.09 * 6 + 0.1 * 9), (0.0, 9)])
def test_the_mean_of_the_ends_of_cycles_is_the_result_by_hand(decay, mean):
    """Cycles of three steps end at 3, 6 and 9."""
    assert averaged(decay, 9)[0] == pytest.approx([mean] * 2)


def test_a_run_that_ends_within_a_cycle_counts_its_last_weights():
    """Only its result does: the mean that checkpoints hold is that of whole cycles, as a longer run has it there."""
    assert averaged(0.9, 2) == ([2, 2], [])
    weights, before = averaged(0.9, 8)
    assert before == [pytest.approx([0.9 * 3 + 0.1 * 6] * 2)]
    assert weights == pytest.approx([0.9 * before[0][0] + 0.1 * 8] * 2)
    assert averaged(0, 8) == ([8, 8], [])


@pytest.mark.parametrize("limit", ["forget_until", "keep_budget"])
def test_a_limit_that_does_not_measure_the_mean_is_refused(limit):
    flag = "--" + limit.replace("_", "-")
    said = f"--average-cycles 0.9 saves a mean of weights, which {flag} 0.1 does not measure; drop one of them"
    with pytest.raises(InputError, match=f"^{said}$"):
        UnlearnArgs(average_cycles=0.9, **{limit: 0.1})
