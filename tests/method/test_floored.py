"""ME as released, with its floor under the probabilities, and every other published loss on logits of a real model's range."""

import math

import pytest
import torch
from torch.nn import functional as F

from dualoptim.method.floored import MeanLog
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import Reference, TokenScores

TEXTS, LENGTH, VOCABULARY = 4, 6, 20000
OBJECTIVES = FORGET | RETAIN


def logits(seed, scale=5.0):
    """Of so wide a range that a good part of the vocabulary lies below 1e-12, as a real model's do."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(TEXTS * LENGTH, VOCABULARY, generator=generator)


LABELS = torch.randint(VOCABULARY, (TEXTS * LENGTH,), generator=torch.Generator().manual_seed(7))
SEQUENCE = torch.arange(TEXTS).repeat_interleave(LENGTH)


def scores_of(z, frozen):
    """What the loop gives an objective."""
    parts = []
    for values in (z, frozen):
        logsumexp = values.logsumexp(-1)
        parts.append((values.gather(-1, LABELS[:, None])[:, 0] - logsumexp, logsumexp, values.mean(-1)))
    reference = Reference(parts[1][0], frozen.__getitem__, None)
    return TokenScores(
        *parts[0], z.argmax(-1) == LABELS, SEQUENCE, TEXTS, LABELS, z, torch.arange(len(LABELS)), None, reference
    )


def with_gradient(loss, z):
    z = z.detach().clone().requires_grad_(True)
    value = loss(z)
    value.backward()
    return float(value.detach()), z.grad


def released_maximum_entropy(z):
    uniform = torch.full_like(z, 1 / VOCABULARY)
    return F.kl_div((F.softmax(z, dim=-1) + 1e-12).log(), uniform, reduction="none").sum()


def objective(name, frozen):
    resolved = OBJECTIVES[name].resolved({"beta": None, "gamma": None}, 0)
    return lambda z: resolved(scores_of(z, frozen))


def test_the_floor_is_that_of_the_released_code():
    z, frozen = logits(0), logits(1)
    below = float((z.softmax(-1) < 1e-12).float().mean())
    assert 0.05 < below < 0.3
    released, gradient = with_gradient(released_maximum_entropy, z)
    value, own = with_gradient(objective("ME-floor", frozen), z)
    assert value == pytest.approx(released, rel=1e-6)
    assert float((own - gradient).norm() / gradient.norm()) < 1e-5
    whole, steeper = with_gradient(objective("ME", frozen), z)
    assert 0.9 * whole < value < 0.99 * whole
    assert own.norm() < 0.98 * steeper.norm()
    assert F.cosine_similarity(own.flatten(), steeper.flatten(), dim=0) > 0.95


def test_on_small_logits_the_floor_does_not_show():
    z, frozen = logits(0, scale=1.0), logits(1)
    (value, gradient), (floored, own) = (with_gradient(objective(name, frozen), z) for name in ("ME", "ME-floor"))
    assert floored == pytest.approx(value, rel=1e-5)
    assert float((own - gradient).norm() / gradient.norm()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_of_logarithms_in_every_precision(dtype):
    z = logits(0)[:3].to(dtype)
    wide = z.double().clone().requires_grad_(True)
    expected = (wide.softmax(-1) + 1e-12).log().mean(-1)
    expected.sum().backward()
    narrow = z.clone().requires_grad_(True)
    found = MeanLog.apply(narrow, 1e-12)
    (VOCABULARY * found).sum().backward()  # the loss is scaled up before it comes back through fp16
    assert torch.allclose(found.double(), expected, rtol=1e-6)
    assert narrow.grad.dtype == dtype
    error = (narrow.grad.double() / VOCABULARY - wide.grad).norm() / wide.grad.norm()
    assert error < (1e-12 if dtype == torch.float64 else 0.01)


def released(name, frozen):
    """The published losses as their code has them, with torch's functions: none but ME has a floor, a clamp or an epsilon."""

    def nll(z):
        return F.cross_entropy(z, LABELS, reduction="none")

    def per_text(values):
        return values.view(TEXTS, LENGTH).sum(-1)

    def of_pairs(values):
        return per_text(values)[0::2] - per_text(values)[1::2]

    def without_label(z):
        return z.detach().scatter(-1, LABELS[:, None], -math.inf).softmax(-1)

    def later(values):
        return values.view(TEXTS, LENGTH)[:, 1:].sum()

    one_hot = torch.zeros_like(frozen).scatter(-1, LABELS[:, None], 1.0)
    return {
        "GA": lambda z: -nll(z).sum(),
        "GD": lambda z: nll(z).sum(),
        "NPO": lambda z: -(F.logsigmoid(0.1 * per_text(nll(z) - nll(frozen))) * 2 / 0.1).sum(),
        "DPO": lambda z: -(F.logsigmoid(0.1 * of_pairs(nll(z) - nll(frozen))) * 2 / 0.1).sum(),
        "AP": lambda z: -(F.logsigmoid(-0.1 * of_pairs(nll(z))) / 0.1).sum(),
        "SimNPO": lambda z: -(F.logsigmoid(2.5 * per_text(nll(z)) / LENGTH) * 2 / 2.5).sum(),
        "WGA": lambda z: -((-nll(z)).exp().detach() * nll(z)).sum(),
        "SatImp": lambda z: -((-nll(z)).exp().detach() ** 5 * (1 - (-nll(z)).exp().detach()) * nll(z)).sum(),
        "UNDIAL": lambda z: F.cross_entropy(z, (frozen - 10 * one_hot).softmax(-1), reduction="sum"),
        "KL": lambda z: F.kl_div(z.log_softmax(-1), frozen.log_softmax(-1), reduction="sum", log_target=True),
        "CE-U": lambda z: later(F.cross_entropy(z, without_label(z), reduction="none")),
        "PDU": lambda z: ((z.max(-1).values - z.mean(-1)) ** 2).sum(),
    }[name]


@pytest.mark.parametrize("name", ["GA", "GD", "NPO", "DPO", "AP", "SimNPO", "WGA", "SatImp", "UNDIAL", "KL", "CE-U", "PDU"])
def test_every_other_published_loss_is_ours_on_logits_of_a_real_range(name):
    z, frozen = logits(0), logits(1)
    z[torch.arange(0, len(z), 3), LABELS[::3]] += 25  # some labels are likely, others as good as impossible
    expected, gradient = with_gradient(released(name, frozen), z)
    value, own = with_gradient(objective(name, frozen), z)
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert float((own - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6
