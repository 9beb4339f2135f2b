"""Objectives against the published code's numbers, closed forms, and their limits."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import shared_json

from dualoptim.data import Example, pack, pad
from dualoptim.losses import FORGET, RETAIN
from dualoptim.scores import TokenScores, score

OBJECTIVES = {**FORGET, **RETAIN}


class Bigram(torch.nn.Module):
    """logits = W[input_ids], with the calling convention of a transformers model."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, input_ids, position_ids=None, attention_mask=None, logits_to_keep=None, use_cache=False):
        return SimpleNamespace(logits=self.weight[input_ids][:, logits_to_keep])


def examples_of(batch) -> list[Example]:
    """Oracle rows (ids and labels with -100) as examples: the scored tokens are those with a label."""
    examples = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        scored = [position for position, label in enumerate(labels) if label != -100]
        assert scored == list(range(scored[0], scored[-1] + 1))
        assert [ids[p] for p in scored] == [labels[p] for p in scored]
        examples.append(Example(ids[: scored[-1] + 1], scored[0]))
    return examples


def oracle_examples(name: str, oracle) -> list[Example]:
    side = "forget" if name in FORGET else "retain"
    answers, refusals = (examples_of(oracle["batches"][batch]) for batch in (side, f"{side}_idk"))
    texts = {"answer": answers, "refusal": refusals}
    return [texts[text][row] for row in range(len(answers)) for text in OBJECTIVES[name].reads]


CASES = [("GA", "GA", 0.1), ("ME", "ME", 0.1), ("IDK", "IDK", 0.1), ("GD", "GD", 0.1)]
CASES += [("AP", "AP_beta0.1", 0.1), ("AP", "AP_beta1", 1.0)]


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize(("name", "key", "beta"), CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_objectives_equal_the_published_code(name, key, beta, dtype, collate):
    oracle = shared_json("oracles/losses_bigram.json")
    expected = oracle["losses"][key][dtype]
    model = Bigram(torch.tensor(oracle["W"], dtype=getattr(torch, dtype)))
    total, count = OBJECTIVES[name].loss(score(model, collate(oracle_examples(name, oracle))), beta)
    (total / count).backward()
    assert float(total / count) == pytest.approx(expected["loss"], rel=1e-5)
    assert float(model.weight.grad.norm()) == pytest.approx(expected["grad_norm"], rel=1e-5)
    if expected["grad"] is not None:
        assert torch.allclose(model.weight.grad, torch.tensor(expected["grad"], dtype=model.weight.dtype), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_count_is_known_before_the_forward_pass(name):
    texts = [Example([1, 2, 3, 4], 2), Example([5, 6, 7], 1), Example([3, 1], 1), Example([9, 8, 7, 6, 5], 3)]
    batch = pack(texts)
    _, count = OBJECTIVES[name].loss(score(Bigram(torch.randn(12, 12)), batch), 0.1)
    assert OBJECTIVES[name].count(batch) == count


def scores_of(logits, labels, sequence=None):
    sequence = torch.zeros(len(labels), dtype=torch.long) if sequence is None else torch.tensor(sequence)
    logits = torch.tensor(logits, dtype=torch.float64)
    logsumexp = logits.logsumexp(-1)
    log_prob = logits.gather(-1, torch.tensor(labels)[:, None])[:, 0] - logsumexp
    correct = logits.argmax(-1) == torch.tensor(labels)
    return TokenScores(log_prob, logsumexp, logits.mean(-1), correct, sequence, int(sequence.max()) + 1, logits.shape[-1])


def test_maximum_entropy_is_the_divergence_from_uniform():
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    total, count = FORGET["ME"].loss(scores_of(logits.tolist(), [0, 1]), 0.1)
    uniform = torch.full_like(logits, 0.25)
    by_definition = (uniform * (uniform.log() - logits.log_softmax(-1))).sum()
    assert count == 2
    assert float(total) == pytest.approx(float(by_definition), abs=1e-12)
    flat, _ = FORGET["ME"].loss(scores_of([[2.0] * 7], [3]), 0.1)
    assert float(flat) == pytest.approx(0, abs=1e-12)  # the minimum: every token equally likely


def test_gradient_ascent_is_minus_gradient_descent():
    scores = scores_of([[0.3, -1.2, 2.0], [1.0, 0.5, 0.1]], [0, 2])
    assert FORGET["GA"].loss(scores, 0.1)[0] == -RETAIN["GD"].loss(scores, 0.1)[0]


def test_answer_preservation_by_hand_and_at_its_limits():
    # log p = log(3/4) for the answer's token and log(1/4) for the refusal's; beta 2: -1/2 log sigmoid(2 log 3)
    scores = scores_of([[math.log(3), 0.0], [0.0, math.log(3)]], [0, 0], sequence=[0, 1])
    total, count = RETAIN["AP"].loss(scores, 2.0)
    assert count == 1
    assert float(total) == pytest.approx(math.log(1 + 1 / 9) / 2)
    even, _ = RETAIN["AP"].loss(scores_of([[0.0, 0.0], [0.0, 0.0]], [0, 1], sequence=[0, 1]), 0.1)
    assert float(even) == pytest.approx(math.log(2) / 0.1)
    # swapping answer and refusal negates the argument of the sigmoid: softplus(x) - softplus(-x) = x
    swapped, _ = RETAIN["AP"].loss(scores_of([[0.0, math.log(3)], [math.log(3), 0.0]], [0, 0], sequence=[0, 1]), 2.0)
    assert float(swapped - total) == pytest.approx(math.log(3))
