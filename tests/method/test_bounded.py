"""JensUn and the inverted hinge: the published numbers, by definition, and where their gradients end."""

import math

import pytest
import torch
from losses import OBJECTIVES, TEXTS, examples_of, loss_of, mean_of, models, scores_of, scores_with_reference
from support import Bigram

from dualoptim.data.batches import pack, pad
from dualoptim.data.prompts import Example
from dualoptim.method.jensen import JensenShannon
from dualoptim.method.scores import score


def teaching(texts, tokens) -> list[Example]:
    """The texts with these tokens as their labels, again and again."""
    return [Example(text.ids, text.start, labels=(tokens * 9)[: len(text.ids) - text.start]) for text in texts]


CASES = [("JensUn", "JensUn_forget_tokens_3", [3]), ("JensUn", "JensUn_forget_tokens_10_11", [10, 11])]
CASES += [("IHL", "IHL_forget", None), ("JSD", "JensUn_retain", None), ("KL", "JensUn_retain_KL", None)]


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "key", "tokens"), CASES)
def test_losses_equal_the_published_code(name, key, tokens, dtype, collate, shared_json):
    oracle = shared_json("oracles/losses2.json")
    expected = oracle["losses"][key]
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=getattr(torch, dtype))) for weight in ("W", "W_ref"))
    texts = examples_of(oracle["batches"]["retain" if "retain" in key else "forget"])
    batch = collate(teaching(texts, tokens) if tokens else texts)
    mean = mean_of(name, scores_with_reference(model, frozen, batch), batch)
    mean.backward()
    assert mean.item() == pytest.approx(expected[dtype]["loss"], rel=1e-5)
    assert float(model.weight.grad.norm()) == pytest.approx(expected[dtype]["grad_norm"], rel=1e-5)
    assert torch.allclose(model.weight.grad, torch.tensor(expected["float64"]["grad"], dtype=model.weight.dtype), atol=1e-6)


@pytest.mark.parametrize("key", ["JensUn_total", "IHL_total_GD"])
def test_both_halves_together_equal_the_published_code(key, shared_json):
    oracle = shared_json("oracles/losses2.json")
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=torch.float64)) for weight in ("W", "W_ref"))
    forget, retain = (examples_of(oracle["batches"][name]) for name in ("forget", "retain"))
    names = ("JensUn", "JSD") if key == "JensUn_total" else ("IHL", "GD")
    batches = pack(teaching(forget, [10, 11]) if key == "JensUn_total" else forget), pack(retain)
    total = 0
    for name, batch in zip(names, batches, strict=True):
        total = total + mean_of(name, scores_with_reference(model, frozen, batch), batch)
    total.backward()
    assert total.item() == pytest.approx(oracle["losses"][key]["float64"]["loss"], rel=1e-6)
    assert float(model.weight.grad.norm()) == pytest.approx(oracle["losses"][key]["float64"]["grad_norm"], rel=1e-6)


def divergence(p, q):
    """JSD of two distributions, from its definition."""
    middle = (p + q) / 2
    return (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).sum(-1) / 2


def test_jensun_is_the_divergence_from_one_token_between_nothing_and_log_2():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [3, 0, 8, 3, 1]
    by_definition = divergence(logits.softmax(-1), torch.nn.functional.one_hot(torch.tensor(labels), 9).double()).sum()
    assert float(loss_of("JensUn", scores_of(logits.tolist(), labels))) == pytest.approx(float(by_definition), rel=1e-12)
    for label, expected in ((0, 0.0), (1, math.log(2))):
        assert float(loss_of("JensUn", scores_of([[200.0, 0.0, 0.0]], [label]))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 128])
def test_the_kernel_equals_its_definition_however_it_is_cut(rows, dtype, monkeypatch):
    monkeypatch.setattr("dualoptim.method.kernels.rows_at_once", lambda *_: rows)
    z, other = (torch.randn(2, 7, 33, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    z, weights = z.requires_grad_(), torch.arange(1.0, 8.0)
    values = JensenShannon.apply(z, lambda part: other[part])
    (gradient,) = torch.autograd.grad((values * weights).sum(), z)
    wide = z.detach().double().requires_grad_()
    expected = divergence(wide.softmax(-1), other.double().softmax(-1))
    (by_autograd,) = torch.autograd.grad((expected * weights.double()).sum(), wide)
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert torch.allclose(values.double(), expected, atol=near)
    assert torch.allclose(gradient.double(), by_autograd, atol=7 * near)
    assert gradient.dtype == dtype
    assert float(values.detach().max()) < math.log(2)


def test_the_inverted_hinge_by_hand_and_where_its_gradient_ends():
    third = math.log(2)
    assert float(loss_of("IHL", scores_of([[third, 0.0, 0.0]], [0]))) == pytest.approx(1 + 1 / 2 - 1 / 4)
    assert float(loss_of("IHL", scores_of([[third, 0.0, 0.0]], [1]))) == pytest.approx(1 + 1 / 4 - 1 / 2)
    assert float(loss_of("IHL", scores_of([[0.0, 0.0]], [1]))) == pytest.approx(1)  # as likely as the likeliest other
    assert float(loss_of("IHL", scores_of([[90.0, 0.0]], [0]))) == pytest.approx(2)
    z = torch.zeros(12, 12, dtype=torch.float64)
    z[:, 3] = 40.0  # every next token is certain to be another than the label
    model = Bigram(z)
    loss_of("IHL", score(model, pack([Example([1, 2], 1)]))).backward()
    assert float(model.weight.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["JensUn", "IHL"])
def test_texts_that_share_tokens_lose_as_much_as_apart(name):
    """Their rows of logits are fewer than their scored tokens then."""
    model, _ = models()
    texts = [Example([1, 2, 3, 4], 2), Example([1, 2, 3, 7, 5], 2)]
    found = []
    for share in (False, True):
        model.weight.grad = None
        batch = pack(texts, share)
        scores = score(model, batch)
        assert share == (len(scores.raw_logits) < len(scores.labels))
        loss_of(name, scores).backward()
        found.append(model.weight.grad)
    assert torch.allclose(*found)


def test_labels_of_their_own_are_what_is_scored_and_nothing_else_changes():
    model, _ = models()
    taught = score(model, pack(teaching(TEXTS, [10, 11])))
    plain = score(model, pack(TEXTS))
    assert taught.labels.tolist() == [10, 11, 10, 11, 10, 11, 10, 10, 11]
    assert torch.equal(taught.logits, plain.logits)
    expected = plain.logits.log_softmax(-1).gather(-1, taught.labels[:, None])[:, 0]
    assert torch.allclose(taught.log_prob, expected)
    assert OBJECTIVES["JensUn"].count(pack(teaching(TEXTS, [10, 11]))) == 9
