"""An update that is compiled is the update as it is written, in one call a tensor, and nothing is compiled twice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualoptim.method import fused
from dualoptim.method.fused import as_written, compiled
from dualoptim.method.plus import DualAdamWPlus, PartlyDecoupledAdamW

KINDS = {
    "plus": lambda groups: DualAdamWPlus(groups, betas=(0.9, 0.95), base_betas=(0.8, 0.95), max_update=3.0),
    "m": lambda groups: PartlyDecoupledAdamW(groups, decouple="m"),
}
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


@pytest.mark.launch
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_are_those_as_written(kind, monkeypatch):
    """To a thousandth of a rate, rates that fall and counters that grow; one graph serves every shape and step."""
    expected, as_it_stands = after_some_steps(KINDS[kind])
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    torch._dynamo.reset()
    compiled.cache_clear()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    found, optimizer = after_some_steps(KINDS[kind])
    if compiled(KINDS[kind](found)._rule._replace(bounded=kind == "plus"), torch.device("cpu")) is None:
        pytest.skip("there is no compiler here")
    assert graphs["unique_graphs"] - before == 1
    assert float(optimizer.largest_update) == pytest.approx(float(as_it_stands.largest_update), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    compared = 0
    for one, other in zip(optimizer.state.values(), as_it_stands.state.values(), strict=True):
        for key, value in one.items():
            assert torch.allclose(value, other[key], rtol=1e-5, atol=1e-6), key
            compared += 1
    assert compared == len(SHAPES) * (9 if kind == "plus" else 6)


def test_a_large_step_is_one_call_a_tensor(monkeypatch):
    """With what is compiled replaced by what is written: of each tensor the whole, flat, and the factors of a group in one."""
    calls = []

    def counted(rule, device):
        def move(weights, gradient, moments, factors, largest):
            calls.append((weights.shape, len(moments), factors.data_ptr()))
            as_written(rule)(weights, gradient, moments, factors, largest)

        return move

    expected, _ = after_some_steps(KINDS["plus"], steps=2)
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    monkeypatch.setattr(fused, "compiled", counted)
    monkeypatch.setattr("dualoptim.method.kernels.PIECE", 1024)
    found, _ = after_some_steps(KINDS["plus"], steps=2)
    sizes = [(torch.Size([expected[n].numel()]), 4) for n in range(3)]  # another kind of shape would be compiled for itself
    assert [call[:2] for call in calls] == 2 * sizes
    assert len({call[2] for call in calls[:3]}) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_small_step_is_taken_as_it_is_written(monkeypatch):
    monkeypatch.setattr(fused, "compiled", None)
    after_some_steps(KINDS["plus"], steps=2)
    assert sum(torch.Size(shape).numel() for shape in SHAPES) < fused.COMPILED_FROM


class Operations(TorchDispatchMode):
    """How many operations on tensors there are, but for views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function.namespace == "aten"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rule", "operations"), [(DualAdamWPlus._rule, 21), (PartlyDecoupledAdamW._rule, 14)])
def test_what_one_call_replaces(rule, operations):
    """The operations of an update as it is written, each of which reads and writes whole tensors."""
    (weights, gradient, *moments), factors, largest = (
        torch.ones(2 + rule.moments, 8),
        torch.ones(3 + rule.factors),
        torch.ones(()),
    )
    with Operations() as counted:
        as_written(rule)(weights, gradient, moments, factors, largest)
    assert counted.count == operations


def test_where_nothing_can_be_compiled_steps_are_taken_as_written_and_said_once(monkeypatch, caplog):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: no_compiler)
    monkeypatch.setattr(fused, "COMPILED_FROM", 1)
    compiled.cache_clear()
    found, _ = after_some_steps(KINDS["m"], steps=3)
    monkeypatch.undo()
    compiled.cache_clear()
    expected, _ = after_some_steps(KINDS["m"], steps=3)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        "optimizer steps are not compiled, and take several times as long: no C++ compiler was found"
    ]
