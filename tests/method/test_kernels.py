"""Operations written out by hand: their values and gradients are those of torch's own."""

import pytest
import torch
from support import plain_statistics, plain_targets

from dualoptim.method import kernels
from dualoptim.method.kernels import AgainstTargets, Statistics, pieces, rows_at_once, widened


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_the_statistics_is_autograds(dtype):
    torch.manual_seed(0)
    logits = torch.randn(70, 33, dtype=dtype)  # more rows than are taken at once
    column = torch.cat([torch.arange(70), torch.tensor([3, 68, 3])]).flip(0)  # some rows predict several labels
    labels = torch.randint(33, (73,))
    factors = torch.randn(3, 73)
    gradients = []
    for statistics in (
        Statistics.apply,
        lambda z, *places: plain_statistics(z.float() if dtype == torch.bfloat16 else z, *places),
    ):
        z = logits.clone().requires_grad_()
        found = statistics(z, labels, column)
        sum((factor * value).sum() for factor, value in zip(factors, found, strict=False)).backward()
        gradients.append((z.grad, *(value.detach() for value in found)))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_comparisons_have_the_same_bits_in_any_number_of_rows(dtype, monkeypatch):
    """As a CPU takes them, a few at a time, and as other devices do, all of a batch at once: off and on."""
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 150, 40).to(dtype)
    column = torch.cat([torch.arange(150), torch.randint(150, (30,))])[torch.randperm(180)]
    labels = torch.randint(5, (180,))  # several of a row are the same one
    found = []
    for rows in (None, 37, rows_at_once("cuda", 40, 32)):
        if rows:
            monkeypatch.setattr(kernels, "rows_at_once", lambda *_, rows=rows: rows)
        z = logits.clone().requires_grad_()
        *values, correct = Statistics.apply(z, labels, column)
        against = AgainstTargets.apply(z, lambda part: widened(wanted[part]), True)
        (sum(factor * value.sum() for factor, value in zip((2, 3, 5), values, strict=True)) + against.sum()).backward()
        found.append([z.grad, correct, against.detach(), *(value.detach() for value in values)])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [True, False])
def test_the_gradient_against_targets_is_autograds(dtype, divergence, monkeypatch):
    monkeypatch.setattr(AgainstTargets, "rows", 8)
    torch.manual_seed(0)
    logits = torch.randn(21, 33, dtype=dtype)
    wanted = torch.randn(21, 33, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    wanted[:, 5] = -torch.inf  # as CE-U rules out the label
    factors = torch.randn(21)
    found = []
    for function in (AgainstTargets.apply, plain_targets):
        z = logits.clone().requires_grad_()
        values = function(z if function is not plain_targets else widened(z), wanted.__getitem__, divergence)
        (factors * values).sum().backward()
        found.append((values.detach(), z.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 4096.0), (torch.bfloat16, 1 / 499)])
def test_16_bit_gradients_against_targets_take_their_factor_in_32(dtype, factor):
    """A loss is divided by a count, and in fp16 scaled up: neither is rounded first, and small values wait for their scale."""
    torch.manual_seed(0)
    logits = torch.randn(4, 50_000).to(dtype).requires_grad_()
    targets = torch.randn(4, 50_000)
    (factor * AgainstTargets.apply(logits, targets.__getitem__, True)).sum().backward()
    expected = factor * (logits.detach().float().softmax(-1) - targets.softmax(-1))
    found = logits.grad.float()
    assert logits.grad.dtype == dtype
    # what all errors have in common, as a rounded factor would show
    assert float((found * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=5e-4)
    small = (expected.abs() < 1e-3) & (expected.abs() > 1e-4) if dtype == torch.float16 else expected.abs() > 0
    assert small.any()
    assert ((found - expected).abs()[small] / expected.abs()[small]).mean() < (2e-3 if dtype == torch.float16 else 5e-3)


def test_pieces_are_views_that_cover_a_parameter_and_its_state(monkeypatch):
    """In the order of its values; scales go with their blocks, counters and tables with all of them."""
    monkeypatch.setattr(kernels, "PIECE", 2 * kernels.BLOCK)
    weight = torch.nn.Parameter(torch.arange(5 * 256 + 7.0).reshape(-1, 3))
    weight.grad = -weight.detach()
    state = {"m": weight.detach() * 2, "m_scale": torch.arange(6), "absmax1": torch.arange(6), "qmap1": "table", "step": 4}
    found = list(pieces(weight, state))
    assert [len(piece) for piece, _, _ in found] == [512, 512, 263]
    for piece, gradient, own in found:
        assert torch.equal(gradient, -piece)
        assert torch.equal(own["m"], piece * 2)
        assert (own["qmap1"], own["step"]) == ("table", 4)
    assert [own["m_scale"].tolist() for _, _, own in found] == [own["absmax1"].tolist() for _, _, own in found] == [
        [0, 1], [2, 3], [4, 5],
    ]  # fmt: skip
    for piece, _, own in found:
        piece.zero_()
        own["m"].zero_()
    assert not weight.any()
    assert not state["m"].any()


def test_every_device_takes_large_parameters_in_pieces(monkeypatch):
    """What an update needs beside the state stays small; bitsandbytes' kernel, which needs nothing, takes all at once."""
    monkeypatch.setattr(kernels, "LARGE_PIECE", 4 * kernels.BLOCK)
    weight = torch.nn.Parameter(torch.empty(3000, device="meta"))
    weight.grad = torch.empty(3000, device="meta")
    assert [len(piece) for piece, _, _ in pieces(weight, {})] == [1024, 1024, 952]
    assert kernels.LARGE_PIECE % kernels.BLOCK == 0, "scales would be cut in two"


def test_a_small_parameter_is_one_piece_and_one_whose_values_are_out_of_order_too(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.ones(4, 6)
    state = {"m": torch.zeros(4, 6)}
    ((piece, _, own),) = pieces(weight, state)
    assert (piece.shape, own["m"].shape) == ((24,), (24,))
    monkeypatch.setattr(kernels, "PIECE", 5)
    assert [len(piece) for piece, _, _ in pieces(weight, state)] == [5, 5, 5, 5, 4]
    assert [len(piece) for piece, _, _ in pieces(weight, state, whole=True)] == [24]
    turned = torch.nn.Parameter(torch.ones(4, 6).t())
    turned.grad = torch.ones(6, 4)
    ((piece, _, _),) = pieces(turned, {"m": torch.zeros(6, 4)})
    assert piece.shape == (6, 4)


def test_only_half_precision_is_widened():
    for dtype, wider in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert widened(torch.ones(2, dtype=dtype)).dtype == wider
