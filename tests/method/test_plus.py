"""DualOptim+ and the partly decoupled ablation: published trajectories, limits, bytes, and what a checkpoint brings back."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dualoptim.method.dual import DualOptimizer
from dualoptim.method.plus import DualAdamWPlus, PartlyDecoupledAdamW, plus_factors, plus_update

RATES = {"forget": 1e-3, "retain": 5e-4}
PHASES = ["forget" if step % 3 == 0 else "retain" for step in range(30)]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(64, 128, generator=generator) + (1 if PHASES[step] == "forget" else -0.5)


def follow(make, steps=30, bits=32, start=0, weight=None):
    """The weight and the optimizer after some steps of two opposed phases."""
    parameter = torch.nn.Parameter(
        torch.randn(64, 128, generator=torch.Generator().manual_seed(99)) if weight is None else weight
    )
    optimizer = make([{"params": [parameter], "bits": bits}])
    largest = []
    for step in range(start, steps):
        optimizer.use(PHASES[step], RATES[PHASES[step]])
        parameter.grad = gradients(step)
        optimizer.step()
        largest.append(float(getattr(optimizer, "largest_update", 0)))
    return parameter.detach(), optimizer, largest


def test_the_published_trajectory_of_dualoptim_plus(shared_json):
    oracle = shared_json("oracles/optimizer_trajectories.json")
    parameters = [torch.nn.Parameter(torch.tensor(values)) for values in oracle["init"]]
    optimizer = DualAdamWPlus(parameters, betas=(0.9, 0.95), base_betas=(0.9, 0.95), weight_decay=0.01)
    expected = oracle["runs"]["dual_adamw_plus betas=(0.9,0.95) base_betas=(0.9,0.95)"]
    for letter, values, after in zip(oracle["meta"]["schedule"], oracle["grads"], expected, strict=True):
        phase = "forget" if letter == "F" else "retain"
        optimizer.use(phase, RATES[phase])
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = torch.tensor(value)
        optimizer.step()
        for parameter, value in zip(parameters, after["params"], strict=True):
            assert torch.allclose(parameter.detach(), torch.tensor(value), rtol=0, atol=1e-6)


def test_with_a_constant_base_it_is_decoupled_adam():
    """dm is then the mean of g - c, so dm^ + c is Adam's own m^, whatever c is; the same with the squares."""
    betas, eps = (0.9, 0.99), 1e-8
    generator = torch.Generator().manual_seed(1)
    constant = torch.randn(50, generator=generator, dtype=torch.float64)
    base = [constant, constant.square()]
    delta, m, v = [torch.zeros(50, dtype=torch.float64) for _ in range(2)], 0.0, 0.0
    for k in range(1, 20):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        # base betas of zero: no correction of the bias, and what the base takes in is thrown away
        factors = torch.tensor([*plus_factors(betas, (0.0, 0.0), (k, k)), eps], dtype=torch.float64)
        ours = plus_update(gradient, [*delta, base[0].clone(), base[1].clone()], factors)
        m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
        adam = (m / (1 - betas[0] ** k)) / ((v / (1 - betas[1] ** k)).sqrt() + eps)
        if k > 1:
            assert not torch.allclose(delta[0] / (1 - betas[0] ** k), m / (1 - betas[0] ** k)), "the base has no part in it"
        assert torch.allclose(ours, adam, rtol=1e-9)


def test_the_bound_holds_and_the_largest_update_is_told():
    _, _, unbounded = follow(lambda groups: DualAdamWPlus(groups))
    bounded_weight, _, bounded = follow(lambda groups: DualAdamWPlus(groups, max_update=3.0))
    assert max(unbounded) > 30
    assert max(bounded) == 3
    free_weight, _, _ = follow(lambda groups: DualAdamWPlus(groups, max_update=1e9))
    published, _, _ = follow(lambda groups: DualAdamWPlus(groups))
    assert torch.equal(free_weight, published)
    assert not torch.equal(bounded_weight, published)


SHARED_V = ((0.999 * (1 - 0.999**24) + 0.001 * 1e-4) / (1 - 0.999**25)) ** 0.5
SHARED_M = (0.9 * (1 - 0.9**24) + 0.1 * 0.01) / (1 - 0.9**25)


@pytest.mark.parametrize(("decouple", "by_hand"), [("m", 0.01 / SHARED_V), ("v", SHARED_M / 0.01)])
def test_what_a_shared_moment_moves_is_told_and_bounded(decouple, by_hand):
    """A retain step with a hundredth of the gradient that 24 forget steps had moves 89 rates with their mean."""

    def moved(bound):
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = PartlyDecoupledAdamW([weight], decouple=decouple, weight_decay=0.0, max_update=bound)
        for phase, gradient in [*[("forget", 1.0)] * 24, ("retain", 0.01)]:
            before = weight.item()
            optimizer.use(phase, 1e-3)
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
        assert float(optimizer.largest_update) == pytest.approx((before - weight.item()) / 1e-3)
        return float(optimizer.largest_update)

    assert moved(0.0) == pytest.approx(by_hand, rel=1e-5)
    assert moved(by_hand / 2) == pytest.approx(by_hand / 2)


@pytest.mark.parametrize(
    ("delta", "base", "bytes_per_parameter"), [(True, False, 12.1), (False, True, 18.1), (True, True, 6.1)]
)
@pytest.mark.parametrize(("max_update", "mean", "median"), [(0.0, 2.0, 0.4), (3.0, 0.5, 0.3)], ids=["published", "bounded"])
def test_eight_bits_stay_within_a_band(delta, base, bytes_per_parameter, max_update, mean, median):
    """The band after 30 steps, in rates of retain steps (measured: 1.04 and 0.18 as published, 0.32 and 0.16 bounded).

    As published, single weights are off by up to 170 rates: where the denominator comes near zero nothing small stays small.
    """
    pytest.importorskip("bitsandbytes")
    wide, _, _ = follow(lambda groups: DualAdamWPlus(groups, max_update=max_update))
    narrow, optimizer, _ = follow(
        lambda groups: DualAdamWPlus(groups, max_update=max_update, quantize_delta=delta, quantize_base=base), bits=8
    )
    gap = (wide - narrow).abs() / RATES["retain"]
    assert 0 < float(gap.mean()) < mean
    assert float(gap.median()) < median
    (state,) = optimizer.state.values()
    held = sum(value.numel() * value.element_size() for value in state.values())
    assert held / wide.numel() == pytest.approx(bytes_per_parameter, abs=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: DualAdamWPlus(groups),
        lambda groups: DualAdamWPlus(groups, quantize_delta=True, quantize_base=True),
        lambda groups: PartlyDecoupledAdamW(groups, decouple="m"),
        lambda groups: PartlyDecoupledAdamW(groups, decouple="v"),
    ],
    ids=["plus", "plus in bytes", "m", "v"],
)
def test_a_checkpoint_brings_everything_back(make):
    whole, _, _ = follow(make, bits=8)
    half, optimizer, _ = follow(make, 13, bits=8)
    saved = optimizer.state_dict()
    parameter = torch.nn.Parameter(half.clone())
    again = make([{"params": [parameter], "bits": 8}])
    again.materialize()
    again.load_state_dict(saved)
    for step in range(13, 30):
        again.use(PHASES[step], RATES[PHASES[step]])
        parameter.grad = gradients(step)
        again.step()
    assert torch.equal(whole, parameter.detach())


def adam_by_hand(own_m, own_v):
    """AdamW in float64, with moments of each phase or of both."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(99)).double()
    m, v, steps_m, steps_v = {}, {}, {}, {}
    for step, phase in enumerate(PHASES):
        g, lr = gradients(step).double(), RATES[phase]
        key_m, key_v = phase if own_m else "both", phase if own_v else "both"
        m[key_m] = 0.9 * m.get(key_m, 0) + 0.1 * g
        v[key_v] = 0.999 * v.get(key_v, 0) + 0.001 * g * g
        steps_m[key_m], steps_v[key_v] = steps_m.get(key_m, 0) + 1, steps_v.get(key_v, 0) + 1
        update = (m[key_m] / (1 - 0.9 ** steps_m[key_m])) / ((v[key_v] / (1 - 0.999 ** steps_v[key_v])).sqrt() + 1e-8)
        weight = (1 - lr * 0.01) * weight - lr * update
    return weight


@pytest.mark.parametrize("decouple", ["m", "v"])
def test_one_decoupled_moment_by_hand(decouple):
    weight, _, _ = follow(lambda groups: PartlyDecoupledAdamW(groups, decouple=decouple))
    by_hand = adam_by_hand(decouple == "m", decouple == "v")
    assert float((weight.double() - by_hand).abs().mean()) < 1e-6
    both = follow(
        lambda groups: DualOptimizer(
            groups,
            forget=lambda g: torch.optim.AdamW(g, weight_decay=0.01),
            retain=lambda g: torch.optim.AdamW(g, weight_decay=0.01),
        )
    )[0]
    assert float((both.double() - adam_by_hand(True, True)).abs().mean()) < 1e-6
    assert float((weight - both).abs().mean()) > 1e-4


def test_mistakes_are_named():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="unknown phase 'other'"):
        DualAdamWPlus([weight]).use("other")
    with pytest.raises(ValueError, match="decouple 'w' is unknown"):
        PartlyDecoupledAdamW([weight], decouple="w")


@pytest.fixture(params=[0, 7])
def eight_processes(request):
    """A mesh of eight processes of which this is the first or the last one; nothing is ever sent."""
    pytest.importorskip("torch", "2.8")  # older ones send shares where a tensor is divided, and models are loaded whole there
    torch.distributed.init_process_group("fake", rank=request.param, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [DualAdamWPlus, PartlyDecoupledAdamW])
def test_a_process_may_hold_nothing_of_a_divided_tensor(eight_processes, make, monkeypatch):
    """Ten rows on eight processes leave the last ones without any, and no tensor is gathered for the largest update."""
    monkeypatch.setattr(DTensor, "full_tensor", None)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(10, 3, generator=generator), torch.randn(16, 3, generator=generator)]
    gradients = [torch.randn(10, 3, generator=generator), torch.randn(16, 3, generator=generator)]
    divided = [
        torch.nn.Parameter(distribute_tensor(weight, eight_processes, [Shard(0)], src_data_rank=None)) for weight in whole
    ]
    plain = [torch.nn.Parameter(parameter.to_local().detach().clone()) for parameter in divided]
    found = []
    for parameters in (divided, plain):
        optimizer = make(parameters, lr=1e-3)
        for phase in ("forget", "retain", "forget"):
            optimizer.use(phase)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                own = distribute_tensor(gradient, eight_processes, [Shard(0)], src_data_rank=None)
                parameter.grad = own if isinstance(parameter, DTensor) else own.to_local()
            optimizer.step()
        found.append(([getattr(p, "to_local", p.clone)() for p in parameters], float(getattr(optimizer, "largest_update", 1))))
    (ours, largest), (expected, same) = found
    assert [len(one) for one in ours] in ([2, 2], [0, 2])
    assert largest == same > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
