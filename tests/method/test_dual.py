"""The dual optimizer against torch's own optimizers, the published trajectory, and its promises about banks."""

import copy
import math
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualoptim.method.adamw import adamw
from dualoptim.method.dual import DualOptimizer

PATTERN = "FRRRRRFRRRRRFFRF"
PHASE = {"F": "forget", "R": "retain"}
RATE = {"F": 1e-3, "R": 5e-4}


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5,), (3, 4), (2, 2, 2), (70, 70))]


def gradients(steps, parameters, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(steps)]


def set_gradients(parameters, values):
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()


MAKERS = {
    "fused": lambda groups: torch.optim.AdamW(groups, weight_decay=0.01, fused=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, weight_decay=0.01, foreach=True),
    "for-loop": lambda groups: torch.optim.AdamW(groups, weight_decay=0.01, foreach=False),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "plain sgd": lambda groups: torch.optim.SGD(groups),
    "adagrad": lambda groups: torch.optim.Adagrad(groups),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5),
}
PAIRS = [("fused", "fused"), ("fused", "sgd"), ("sgd", "foreach"), ("for-loop", "plain sgd"), ("amsgrad", "rmsprop")]
PAIRS += [("adagrad", "fused")]


def alternate_by_hand(forget, retain, pattern=PATTERN):
    """Two ordinary optimizers over the same tensors: the definition that DualOptimizer has to meet."""
    parameters = weights()
    optimizers = {"F": MAKERS[forget](parameters), "R": MAKERS[retain](parameters)}
    for phase, values in zip(pattern, gradients(len(pattern), parameters), strict=True):
        set_gradients(parameters, values)
        for group in optimizers[phase].param_groups:
            group["lr"] = RATE[phase]
        optimizers[phase].step()
    return parameters


@pytest.mark.parametrize(("forget", "retain"), PAIRS)
def test_interleaved_phases_are_bitwise_two_ordinary_optimizers(forget, retain):
    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=MAKERS[forget], retain=MAKERS[retain])
    for phase, values in zip(PATTERN, gradients(len(PATTERN), parameters), strict=True):
        set_gradients(parameters, values)
        optimizer.use(PHASE[phase], lr=RATE[phase])
        optimizer.step()
    for ours, theirs in zip(parameters, alternate_by_hand(forget, retain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("phase", ["forget", "retain"])
def test_one_phase_alone_is_bitwise_adamw(phase):
    ours, theirs = weights(), weights()
    dual = DualOptimizer(ours, forget=adamw(1e-3, (0.9, 0.95)), retain=adamw(1e-3, (0.9, 0.95)))
    single = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), fused=True)
    dual.use(phase, lr=1e-3)
    for values in gradients(12, ours):
        set_gradients(ours, values)
        set_gradients(theirs, values)
        dual.step()
        single.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_one_shared_bank_is_something_else():
    """The negative control: were the banks mixed up, the test above would see it by far."""
    shared = weights()
    optimizer = torch.optim.AdamW(shared, weight_decay=0.01, fused=True)
    for phase, values in zip(PATTERN, gradients(len(PATTERN), shared), strict=True):
        set_gradients(shared, values)
        for group in optimizer.param_groups:
            group["lr"] = RATE[phase]
        optimizer.step()
    dual = alternate_by_hand("fused", "fused")
    assert max(float((a - b).detach().abs().max()) for a, b in zip(shared, dual, strict=True)) > 1e-3


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
def test_the_published_trajectory(betas, shared_json):
    oracle = shared_json("oracles/optimizer_trajectories.json")
    meta = oracle["meta"]
    parameters = [torch.nn.Parameter(torch.tensor(values)) for values in oracle["init"]]
    make = lambda groups: torch.optim.AdamW(  # noqa: E731
        groups, betas=betas, eps=meta["eps"], weight_decay=meta["weight_decay"], fused=True
    )
    optimizer = DualOptimizer(parameters, forget=make, retain=make)
    rates = {"forget": meta["forget_lr"], "retain": meta["retain_lr"]}
    expected = oracle["runs"][f"dual_adamw betas=({betas[0]},{betas[1]})"]
    for letter, values, step in zip(meta["schedule"], oracle["grads"], expected, strict=True):
        set_gradients(parameters, [torch.tensor(value) for value in values])
        optimizer.use(PHASE[letter], lr=rates[PHASE[letter]])
        optimizer.step()
        for parameter, published in zip(parameters, step["params"], strict=True):
            assert torch.allclose(parameter, torch.tensor(published), rtol=0, atol=1e-6)


def bank(optimizer, phase):
    return {
        (index, key): value.clone()
        for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
        for key, value in optimizer.state[parameter].items()
        if key.startswith(f"{phase}/") and isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize(("active", "other"), [("forget", "retain"), ("retain", "forget")])
def test_a_step_leaves_every_tensor_of_the_other_bank_unchanged(active, other):
    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=MAKERS["fused"], retain=MAKERS["fused"])
    for phase, values in zip("FR", gradients(2, parameters), strict=True):
        set_gradients(parameters, values)
        optimizer.use(PHASE[phase], lr=1e-3)
        optimizer.step()
    before_active, before_other = bank(optimizer, active), bank(optimizer, other)
    before_weights = [parameter.detach().clone() for parameter in parameters]
    set_gradients(parameters, gradients(1, parameters, seed=9)[0])
    optimizer.use(active, lr=1e-3)
    optimizer.step()
    after_active, after_other = bank(optimizer, active), bank(optimizer, other)
    assert before_other.keys() == after_other.keys()
    assert len(before_other) == 3 * len(parameters)  # exp_avg, exp_avg_sq, step
    assert all(torch.equal(before_other[key], after_other[key]) for key in before_other)
    assert all(not torch.equal(before_active[key], after_active[key]) for key in before_active)
    assert all(not torch.equal(a, b) for a, b in zip(before_weights, parameters, strict=True))


def test_a_parameter_without_a_gradient_keeps_its_own_counters():
    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=MAKERS["fused"], retain=MAKERS["fused"])
    for phase in "FRF":
        set_gradients(parameters, gradients(1, parameters)[0])
        parameters[0].grad = None if phase == "R" else parameters[0].grad
        optimizer.use(PHASE[phase], lr=1e-3)
        optimizer.step()
    assert [float(optimizer.state[p]["forget/step"]) for p in parameters] == [2, 2, 2, 2]
    assert [float(optimizer.state[p]["retain/step"]) for p in parameters] == [0, 1, 1, 1]


@pytest.mark.parametrize(("forget", "retain"), PAIRS)
def test_materialize_creates_both_banks_and_moves_nothing(forget, retain):
    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=MAKERS[forget], retain=MAKERS[retain])
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[1].grad = torch.ones_like(parameters[1])
    optimizer.materialize()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert parameters[0].grad is None
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    for parameter in parameters:
        state = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
        assert all(not value.any() for value in state.values())
    for phase, values in zip(PATTERN, gradients(len(PATTERN), parameters), strict=True):
        set_gradients(parameters, values)
        optimizer.use(PHASE[phase], lr=RATE[phase])
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, alternate_by_hand(forget, retain), strict=True))


@pytest.mark.parametrize(("forget", "retain"), PAIRS)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_saved_and_loaded_optimizer_continues_bitwise(forget, retain, stop, tmp_path):
    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=MAKERS[forget], retain=MAKERS[retain])
    all_gradients = gradients(len(PATTERN), parameters)
    for step, (phase, values) in enumerate(zip(PATTERN, all_gradients, strict=True)):
        if step == stop:
            torch.save({"optimizer": optimizer.state_dict(), "weights": parameters}, tmp_path / "state.pt")
            saved = torch.load(tmp_path / "state.pt", weights_only=False)
            parameters = saved["weights"]
            optimizer = DualOptimizer(parameters, forget=MAKERS[forget], retain=MAKERS[retain])
            optimizer.load_state_dict(saved["optimizer"])
            assert optimizer.phase == PHASE[PATTERN[stop - 1]]
        set_gradients(parameters, values)
        optimizer.use(PHASE[phase], lr=RATE[phase])
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, alternate_by_hand(forget, retain), strict=True))


def test_the_rate_is_read_from_the_groups():
    """Loaders set the rate there to zero and step once; a rate of its own would move the weights while loading."""
    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=MAKERS["fused"], retain=MAKERS["fused"])
    optimizer.use("forget", lr=1e-3)
    before = [parameter.detach().clone() for parameter in parameters]
    set_gradients(parameters, gradients(1, parameters)[0])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_parameters_exchanged_in_the_groups_are_followed():
    """ZeRO-3 replaces the parameters of the groups before each step; a composite that does not follow moves nothing."""
    optimizer = DualOptimizer(weights(), forget=MAKERS["fused"], retain=MAKERS["fused"])
    flat = torch.nn.Parameter(torch.ones(100))
    flat.grad = torch.ones(100)
    optimizer.param_groups = [{**group, "params": [flat]} for group in copy.copy(optimizer.param_groups)]
    optimizer.use("retain", lr=1e-2)
    optimizer.step()
    assert torch.allclose(flat, torch.full((100,), 1 - 1e-2), atol=1e-3)
    assert {key.split("/")[0] for key in optimizer.state[flat]} == {"forget", "retain"}


def test_groups_keep_their_own_decay_through_both_phases():
    decayed, free = weights()[3], weights()[3]
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [free], "weight_decay": 0.0}]
    optimizer = DualOptimizer(groups, forget=adamw(0.1, (0.9, 0.999)), retain=adamw(0.1, (0.9, 0.999)))
    start = free.detach().clone()
    for phase in ("forget", "retain"):
        decayed.grad, free.grad = torch.zeros_like(decayed), torch.zeros_like(free)
        optimizer.use(phase, lr=0.1)
        optimizer.step()
    assert torch.equal(free, start)
    assert torch.allclose(decayed, start * (1 - 0.1 * 0.5) ** 2)


class Operations(TorchDispatchMode):
    """Every operation on tensors, in their order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "profiler":
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_takes_the_operations_of_one_fused_adamw():
    parameters = weights()
    found = []
    for optimizer in (MAKERS["fused"](parameters), DualOptimizer(parameters, forget=MAKERS["fused"], retain=MAKERS["fused"])):
        for values in gradients(2, parameters):
            set_gradients(parameters, values)
            with Operations() as operations:
                optimizer.step()
        found.append(operations.seen)
    assert found[0] == found[1]
    assert len(found[0]) == 2  # counters, and everything else


def test_a_bank_is_lent_without_a_look_at_any_parameter():
    """What a step costs beside the inner optimizer does not grow with the number of tensors."""

    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    class Watched(defaultdict):
        looks = 0

        def __getitem__(self, key):
            Watched.looks += 1
            return super().__getitem__(key)

        get = __getitem__

    parameters = weights()
    optimizer = DualOptimizer(parameters, forget=Idle, retain=Idle)
    set_gradients(parameters, gradients(1, parameters)[0])
    optimizer.step()
    optimizer.state = Watched(dict, optimizer.state)
    optimizer.use("retain")
    optimizer.step()
    assert Watched.looks == 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown phase 'both'"):
        DualOptimizer(weights(), forget=MAKERS["fused"], retain=MAKERS["fused"]).use("both")
    for make in (torch.optim.NAdam, lambda groups: torch.optim.SGD(groups, momentum=0.9, dampening=0.5)):
        with pytest.raises(ValueError, match="the forget optimizer's state does not start at zero"):
            DualOptimizer(weights(), forget=make, retain=MAKERS["fused"])
    with pytest.raises(ValueError, match="the retain optimizer must keep the parameter groups"):
        DualOptimizer(
            [{"params": [p]} for p in weights()],
            forget=MAKERS["fused"],
            retain=lambda groups: torch.optim.SGD([p for group in groups for p in group["params"]]),
        )


def test_state_costs_sixteen_bytes_a_parameter():
    parameter = torch.nn.Parameter(torch.zeros(1000, 100))
    optimizer = DualOptimizer([parameter], forget=MAKERS["fused"], retain=MAKERS["fused"])
    optimizer.materialize()
    held = sum(value.nbytes for value in optimizer.state[parameter].values())
    assert math.isclose(held / parameter.numel(), 16, rel_tol=1e-3)


def test_state_of_a_constructor_follows_exchanged_parameters():
    """ZeRO-3 puts other parameters into the groups before a step; Adagrad makes its state in the constructor."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    make = lambda groups: torch.optim.Adagrad(groups, initial_accumulator_value=0.5)  # noqa: E731
    optimizer = DualOptimizer([first], forget=make, retain=make)
    optimizer.param_groups[0]["params"] = [second]
    second.grad = torch.full((3,), 2.0)
    optimizer.use("retain", lr=0.1)
    optimizer.step()
    reference = torch.nn.Parameter(torch.ones(3))
    reference.grad = torch.full((3,), 2.0)
    torch.optim.Adagrad([reference], lr=0.1, initial_accumulator_value=0.5).step()
    assert torch.equal(second, reference)
    assert set(optimizer.state) == {second}
    optimizer.state_dict()
