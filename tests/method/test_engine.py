"""What the engine does in one process: it chooses phases, clips as torch does, and refuses a gradient that is not finite."""

import math

import pytest
import torch
from accelerate import Accelerator

from dualoptim.method.dual import DualOptimizer
from dualoptim.method.engine import Engine, prepare
from dualoptim.method.plus import DualAdamWPlus

NO_SUMS = torch.zeros(0)


def engine_of(make):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, bias=False)
    return prepare(Accelerator(cpu=True), model, make(model.parameters()))


def filled(engine, value=None):
    """Give every weight a gradient, and return it."""
    (weight,) = engine.model.parameters()
    weight.grad = torch.full((3, 5), value) if value is not None else torch.arange(15.0).reshape(3, 5)
    return weight.grad.clone()


def test_one_process_has_the_plain_engine():
    engine = engine_of(torch.optim.SGD)
    assert type(engine) is Engine
    assert engine.model.training


def test_a_phase_has_its_rate_whatever_the_optimizer():
    one_bank = engine_of(torch.optim.SGD)
    two_banks = engine_of(lambda parameters: DualOptimizer(parameters, forget=torch.optim.SGD, retain=torch.optim.Adam))
    for engine in (one_bank, two_banks):
        for phase, lr in (("forget", 0.1), ("retain", 0.2)):
            engine.use_phase(phase, lr)
            assert engine.raw_optimizer.param_groups[0]["lr"] == lr
    assert two_banks.raw_optimizer.phase == "retain"


@pytest.mark.parametrize("limit", [0.0, 2.0, 1e9])
def test_clipping_is_torchs_own(limit):
    """A step of plain SGD at rate 1 moves the weights by exactly what clipping leaves of the gradient."""
    engine = engine_of(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    (weight,) = engine.model.parameters()
    before, gradient = weight.detach().clone(), filled(engine)
    assert engine.step(limit, NO_SUMS) == [pytest.approx(float(gradient.norm()), rel=1e-6)]
    left = gradient if not limit else gradient * min(1.0, limit / (float(gradient.norm()) + 1e-6))
    assert torch.allclose(before - weight, left, atol=1e-5)
    assert weight.grad is None


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(value):
    engine = engine_of(lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    (weight,) = engine.model.parameters()
    before = weight.detach().clone()
    filled(engine, value)
    assert not math.isfinite(*engine.step(1.0, NO_SUMS))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("total", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_moves_nothing(total):
    """Whatever its gradient is; what is done meanwhile is done before anyone knows."""
    engine, done = engine_of(lambda parameters: torch.optim.SGD(parameters, lr=1.0)), []
    (weight,) = engine.model.parameters()
    before = weight.detach().clone()
    norm = float(filled(engine).norm())
    found = engine.step(0.0, torch.tensor([1.5, total]), lambda: done.append(1))
    assert found == pytest.approx([1.5, total, norm], nan_ok=True)
    assert done == [1]
    assert torch.equal(weight, before)


def test_the_largest_update_is_told_by_those_who_count_it():
    assert engine_of(torch.optim.SGD).largest_update() == {}
    engine = engine_of(DualAdamWPlus)
    engine.use_phase("forget", 0.1)
    filled(engine, 2.0)
    engine.step(0.0, NO_SUMS)
    # the phase's own moments have seen g alone, and no base stands before the first step: Adam's first update, one rate
    assert engine.largest_update() == {"largest_update": pytest.approx(1.0, rel=1e-5)}
