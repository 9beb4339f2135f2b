"""The optimizers that a bank is made of: AdamW piece by piece and in 8 bits, and sign SGD."""

import pytest
import torch
from support import use_phase

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.method.adamw import SMALLEST_QUANTIZED, SignSGD, adamw


def test_sign_sgd_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = SignSGD([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.tensor([3.0, -0.01, 0.0])
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.tensor([0.95 - 0.1, -1.9 + 0.1, 2.85]))


def test_it_is_torchs_adamw_fused():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw(0.1, (0.5, 0.6), eps=1e-6)([{"params": [weight]}])
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.1, (0.5, 0.6), 1e-6, True)


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw", "dual-adamw-plus", "m", "v"])
def test_where_the_values_of_a_tensor_lie_changes_no_step(optim):
    """A strided view, a transposed tensor and a transposed gradient, of which fused kernels would mix the values up."""
    args = UnlearnArgs(decouple=optim) if optim in "mv" else UnlearnArgs(optim=optim)

    def after_some_steps(lay_weights, lay_gradient):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(lay_weights(torch.randn(6, 8, generator=generator)))
        optimizer = kind_of(args).build(args)([{"params": [weight], "weight_decay": 0.01, "decayed": True, "bits": 32}])
        for step in range(6):
            use_phase(optimizer, ("forget", "retain")[step % 2], 0.1)
            weight.grad = lay_gradient(torch.randn(weight.shape, generator=generator))
            optimizer.step()
        return weight.detach()

    def transposed(tensor):
        return tensor.t().contiguous().t()

    half = lambda tensor: tensor[:, ::2]  # noqa: E731
    expected = after_some_steps(lambda tensor: half(tensor).clone(), torch.clone)
    for lay in ((half, torch.clone), (lambda tensor: transposed(half(tensor)), torch.clone)):
        assert torch.allclose(after_some_steps(*lay), expected, rtol=0, atol=1e-6)
    assert torch.equal(after_some_steps(lambda tensor: half(tensor).clone(), transposed), expected)


def test_in_8_bits_only_groups_that_say_so_are_kept_in_bytes():
    pytest.importorskip("bitsandbytes")
    weights = [torch.nn.Parameter(torch.ones(size)) for size in (SMALLEST_QUANTIZED, SMALLEST_QUANTIZED, 256)]
    groups = [{"params": [weights[0], weights[2]], "bits": 8}, {"params": [weights[1]], "bits": 32}]
    optimizer = adamw(0.1, (0.9, 0.999), bits=8)(groups)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [{str(value.dtype) for key, value in optimizer.state[weight].items() if key == "state1"} for weight in weights]
    assert kept == [{"torch.uint8"}, {"torch.float32"}, {"torch.float32"}]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", ["dual-adamw", "dual-adamw-plus"])
def test_a_step_in_pieces_is_the_step(kind, bits, monkeypatch):
    """A CPU takes large tensors piece by piece, which need not fill the last one, nor its last block."""
    args, found = UnlearnArgs(optim=kind, optim_bits=bits), []
    for piece in (10**9, 1024):
        monkeypatch.setattr("dualoptim.method.kernels.PIECE", piece)
        generator = torch.Generator().manual_seed(0)
        shapes = ((70, 99), (512,), (4, 1024), (3, 4099))
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [{"params": parameters, "weight_decay": 0.01, "decayed": True, "bits": bits}]
        optimizer = kind_of(args).build(args)(groups)
        for phase in ("forget", "retain", "forget", "retain", "retain"):
            use_phase(optimizer, phase, 1e-3)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        state = [optimizer.state[parameter] for parameter in parameters]
        assert set(optimizer.state) == set(parameters)
        found.append((parameters, state, getattr(optimizer, "largest_update", None)))
    (whole, expected, largest), (pieces, state, same) = found
    assert largest == same
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(expected, state, strict=True):
        assert (int(other["forget/step"]), int(other["retain/step"])) == (2, 3)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
