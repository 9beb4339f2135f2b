"""An update that is compiled is the update as it is written, in one call a tensor, and nothing is compiled twice."""

import pytest
import torch
from support import Asked
from torch._inductor import compile_fx, metrics

from dualoptim.method import fused
from dualoptim.method.fused import Rule, as_written, compiled
from dualoptim.method.plus import DualAdamWPlus, PartlyDecoupledAdamW, adamw_update, plus_update

SHAPES = ((70, 99), (7,), (3, 4099), (0,), (1,))


def after_some_steps(make, steps=12):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(parameters)
    for step in range(steps):
        optimizer.use("forget" if step % 3 == 0 else "retain", 1e-3 / (step + 1))
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


def plus(groups):
    return DualAdamWPlus(groups, betas=(0.9, 0.95), base_betas=(0.8, 0.95))


def shared_mean(groups):
    return PartlyDecoupledAdamW(groups, decouple="v")


@pytest.mark.launch
def test_compiled_steps_are_those_as_written(monkeypatch):
    """To 1e-6 without a bound, where the denominator all but vanishes at places, because every product is rounded alike.

    One graph serves every shape and step, and moves at most 1.5 times the bytes that have to be moved.
    """
    kinds = {plus: Rule(plus_update, 4, 9), shared_mean: Rule(adamw_update, 2, 5)}
    written = [after_some_steps(make) for make in kinds]
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)  # of what is kept nothing is counted
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True)  # nor where nothing is logged
    torch._dynamo.reset()
    compiled.cache_clear()
    graphs = torch._dynamo.utils.counters["stats"]
    for (make, rule), (expected, as_it_stands) in zip(kinds.items(), written, strict=True):
        metrics.reset()
        before = graphs["unique_graphs"]
        found, optimizer = after_some_steps(make)
        if compiled(rule, torch.device("cpu")) is None:
            pytest.skip("there is no compiler here")
        assert graphs["unique_graphs"] - before == 1
        ideal = 4 * (3 + 2 * rule.moments)  # weights, gradient and the moments are read, all but the gradient written
        assert ideal <= metrics.num_bytes_accessed / fused.TRIAL <= 1.5 * ideal
        assert float(optimizer.largest_update) == pytest.approx(float(as_it_stands.largest_update), rel=1e-6)
        assert all(torch.allclose(one, other, rtol=0, atol=1e-6) for one, other in zip(found, expected, strict=True))
        for one, other in zip(optimizer.state.values(), as_it_stands.state.values(), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.allclose(value, other[key], rtol=0, atol=1e-6) for key, value in one.items())


def test_a_large_step_is_one_call_a_tensor(monkeypatch):
    """With what is compiled replaced by what is written: of each tensor the whole, flat, and the factors of a group in one."""
    calls = []

    def counted(rule, device):
        def move(weights, gradient, moments, factors, largest):
            calls.append((weights.shape, len(moments), factors.data_ptr()))
            as_written(rule)(weights, gradient, moments, factors, largest)

        return move

    expected, _ = after_some_steps(DualAdamWPlus, steps=2)
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    monkeypatch.setattr(fused, "compiled", counted)
    monkeypatch.setattr("dualoptim.method.kernels.PIECE", 1024)
    found, _ = after_some_steps(DualAdamWPlus, steps=2)
    sizes = [(torch.Size([expected[n].numel()]), 4) for n in range(3)]  # another kind of shape would be compiled for itself
    assert [call[:2] for call in calls] == 2 * sizes
    assert len({call[2] for call in calls[:3]}) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_small_step_is_taken_as_it_is_written(monkeypatch):
    monkeypatch.setattr(fused, "compiled", None)
    after_some_steps(DualAdamWPlus, steps=2)
    assert sum(torch.Size(shape).numel() for shape in SHAPES) < fused.COMPILED_FROM


def test_what_one_call_replaces():
    """The operations of an update as it is written, each of which reads and writes whole tensors."""
    (weights, gradient, *moments), factors, largest = torch.ones(6, 8), torch.ones(11), torch.ones(())
    with Asked() as asked:
        as_written(Rule(plus_update, 4, 9))(weights, gradient, moments, factors, largest)
    assert asked.operations.total() == 21


def test_where_nothing_can_be_compiled_steps_are_taken_as_written_and_said_once(monkeypatch, caplog):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    compiled.cache_clear()
    found, _ = after_some_steps(DualAdamWPlus, steps=3)
    monkeypatch.undo()
    compiled.cache_clear()
    expected, _ = after_some_steps(DualAdamWPlus, steps=3)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        "optimizer steps are not compiled, and take several times as long: no C++ compiler was found"
    ]
