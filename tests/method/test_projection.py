"""The forget gradient against the retain state's first moment: the published numbers, by hand, and where it stays."""

import pytest
import torch
from accelerate import Accelerator

from dualoptim.method.dual import DualOptimizer
from dualoptim.method.engine import Engine
from dualoptim.method.plus import DualAdamWPlus, PartlyDecoupledAdamW
from dualoptim.method.projection import project

NO_SUMS = torch.zeros(0)


class Tensors(torch.nn.Module):
    """Parameters of these shapes, which nothing computes with."""

    def __init__(self, *values):
        super().__init__()
        self.own = torch.nn.ParameterList(torch.zeros_like(value) for value in values)


def engine_of(make, values, over):
    torch.manual_seed(0)
    model = Tensors(*values)
    engine = Engine(Accelerator(cpu=True), model, make(model.parameters()))
    engine.project_forget = over
    return engine


def two_banks(parameters):
    make = lambda groups: torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))  # noqa: E731
    return DualOptimizer(parameters, forget=make, retain=make)


def with_momentum(parameters):
    return DualOptimizer(parameters, forget=torch.optim.SGD, retain=lambda groups: torch.optim.SGD(groups, momentum=0.9))


def take(engine, phase, gradients):
    """A step of a phase with these gradients; what is left of them after projection and before the update."""
    engine.use_phase(phase, 1e-3)
    for parameter, gradient in zip(engine.model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    left = []
    engine.raw_optimizer.register_step_pre_hook(lambda *_: left.append([p.grad.clone() for p in engine.model.parameters()]))
    engine.step(0.0, NO_SUMS)
    return left[0]


def projected(gradients, moments, over):
    """By hand, from the formula."""

    def one(g, m):
        flat_g, flat_m = (torch.cat([part.flatten() for part in parts]) for parts in (g, m))
        dot = flat_g @ flat_m
        return [a - min(0.0, float(dot)) / float(flat_m @ flat_m) * b for a, b in zip(g, m, strict=True)]

    if over == "global":
        return one(gradients, moments)
    return [one([g], [m])[0] for g, m in zip(gradients, moments, strict=True)]


def close(found, expected, near=1e-6):
    return all(torch.allclose(a, b, rtol=near, atol=near) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("over", ["global", "tensor"])
@pytest.mark.parametrize("key", ["conflict", "no_conflict"])
@pytest.mark.parametrize("make", [two_banks, with_momentum, DualAdamWPlus, lambda own: PartlyDecoupledAdamW(own, decouple="m")])
def test_gradients_are_those_of_the_published_code(make, key, over, shared_json):
    """After one retain step its moment is a multiple of that step's gradient, which is all that counts."""
    oracle = shared_json("oracles/losses2.json")["gradient_projection"][key]
    forget, retain = ([torch.tensor(one) for one in oracle[name]] for name in ("g_f", "g_r"))
    engine = engine_of(make, forget, over)
    take(engine, "retain", retain)
    expected = oracle["projected" if over == "global" else "derived_projection_per_tensor"]
    assert close(take(engine, "forget", forget), [torch.tensor(one) for one in expected])


def test_a_large_gradient_is_that_of_the_published_code_on_a_bigram(shared_json):
    oracle = shared_json("oracles/losses2.json")
    found = oracle["gradient_projection"]["GA_on_forget_against_GD_on_retain"]
    ascent, descent = (oracle_gradient(oracle, name) for name in ("forget", "retain"))
    engine = engine_of(two_banks, [ascent], "global")
    take(engine, "retain", [descent])
    (left,) = take(engine, "forget", [-ascent])
    assert torch.allclose(left, torch.tensor(found["projected"], dtype=torch.float64), atol=1e-9)


def oracle_gradient(oracle, name):
    """Of the mean -log p over scored tokens."""
    batch = oracle["batches"][name]
    ids, labels = (torch.tensor(batch[key]) for key in ("input_ids", "labels"))
    weight = torch.tensor(oracle["W"], dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(weight[ids[:, :-1]].flatten(0, 1), labels[:, 1:].flatten())
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("over", ["global", "tensor"])
@pytest.mark.parametrize("make", [two_banks, DualAdamWPlus])
def test_the_moment_is_that_of_all_retain_steps(make, over):
    """Written out over three cycles, with the base of DualOptim+ as it stands at each forget step."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4,))]  # noqa: E731
    engine = engine_of(make, draw(), over)
    own, base = ([torch.zeros(shape, dtype=torch.float64) for shape in ((3, 2), (4,))] for _ in range(2))
    retained = turned = 0
    for seen in range(12):
        gradients, forgets = draw(), seen % 4 == 0
        left = take(engine, "forget" if forgets else "retain", gradients)
        if forgets and retained:
            moments = own if make is two_banks else [
                d / (1 - 0.9**retained) + m / (1 - 0.9**seen) for d, m in zip(own, base, strict=True)
            ]  # fmt: skip
            assert close(left, projected(gradients, moments, over), 1e-9)
            turned += any(not torch.equal(a, b) for a, b in zip(left, gradients, strict=True))
        else:
            assert all(map(torch.equal, left, gradients))  # a retain step's own, and what comes before the first one
        if not forgets:
            shift = [m / (1 - 0.9**seen) if seen and make is DualAdamWPlus else 0 for m in base]
            own = [0.9 * d + 0.1 * (g - s) for d, g, s in zip(own, gradients, shift, strict=True)]
            retained += 1
        base = [0.9 * m + 0.1 * g for m, g in zip(base, left, strict=True)]
    assert turned


def test_a_step_without_a_conflict_and_one_without_the_flag_change_nothing():
    for over, sign in (("global", 1), ("tensor", 1), ("none", -1)):
        engine = engine_of(two_banks, [torch.ones(2)], over)
        take(engine, "retain", [torch.ones(2)])
        assert torch.equal(take(engine, "forget", [sign * torch.ones(2)])[0], sign * torch.ones(2))
    engine = engine_of(two_banks, [torch.ones(2)], "tensor")
    take(engine, "retain", [torch.ones(2)])
    assert close(take(engine, "forget", [-torch.ones(2)]), [torch.zeros(2)]), "and with it all of the gradient goes"


def test_what_has_no_gradient_is_left_alone_and_what_is_not_finite_stays_so():
    engine = engine_of(two_banks, [torch.ones(2), torch.ones(3)], "global")
    first, second = engine.model.parameters()
    engine.use_phase("retain", 1e-3)
    first.grad = torch.ones(2)
    engine.step(0.0, NO_SUMS)
    engine.use_phase("forget", 1e-3)
    first.grad = -torch.ones(2)
    project(engine)
    assert close([first.grad], [torch.zeros(2)])
    assert second.grad is None
    first.grad = torch.tensor([-1.0, torch.nan])
    project(engine)
    assert not torch.isfinite(first.grad).all()
