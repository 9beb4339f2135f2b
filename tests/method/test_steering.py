"""RMU and its relatives: the published numbers, with a direction for each corpus, over every token of the texts."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dualoptim.data.batches import pack, pad
from dualoptim.data.prompts import Example
from dualoptim.method import steering
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import Reference, score

CORPORA = {"A": "forget", "B": "forget_mismatch"}


class Bigram(torch.nn.Module):
    """A layer that puts out W[input_ids], which are the logits as well."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.weight[input_ids][:, logits_to_keep], hidden_states=[self.weight[input_ids]] * 2)


def scored_rows(batch) -> list[Example]:
    """The positions of the oracle's rows that have a label."""
    places = [[n for n, label in enumerate(labels) if label != -100] for labels in batch["labels"]]
    return [Example(ids[: own[-1] + 1], own[0]) for ids, own in zip(batch["input_ids"], places, strict=True)]


def scores_with_reference(model, frozen, batch):
    with torch.no_grad():
        before = score(frozen, batch, 0).hidden
    return dataclasses.replace(score(model, batch, 0), reference=Reference(hidden=before))


def whole_rows(batch) -> list[Example]:
    """Every position of the oracle's rows, padding too, which WMDP's code averages over."""
    return [Example(ids, 0) for ids in batch["input_ids"]]


@pytest.fixture
def oracle(shared_json, monkeypatch):
    """The published numbers, whose two directions are drawn."""
    found = shared_json("oracles/losses2.json")
    batches = shared_json("oracles/losses_bigram.json")["batches"]
    directions = [torch.tensor(found[name], dtype=torch.float64) for name in ("u_A", "u_B")]
    monkeypatch.setattr(
        steering, "_directed", lambda scores, length, corpus: length * directions[corpus].to(scores.hidden.dtype)
    )
    return found | {"batches": batches}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("corpus", list(CORPORA))
@pytest.mark.parametrize("key", ["RMU_WMDP", "RMU_adaptive", "RMU_adaptive_paper", "RMU_intended_tokenmean"])
def test_losses_equal_the_published_code(key, corpus, dtype, oracle):
    expected = oracle["losses"][f"{key}_corpus{corpus}"]
    model, frozen = (Bigram(torch.tensor(oracle[name], dtype=getattr(torch, dtype))) for name in ("W", "W_ref"))
    texts = scored_rows if "tokenmean" in key else whole_rows
    forget, retain = (pack(texts(oracle["batches"][name])) for name in (CORPORA[corpus], "retain"))
    names = {"RMU_intended_tokenmean": ("RMU", "EMBED"), "RMU_adaptive_paper": ("ARMU", "EMBEDQ")}.get(key, ("RMUQ", "EMBEDQ"))
    beta = expected["params"].get("c") or expected["params"]["scale beta"]
    if key == "RMU_adaptive":
        beta = expected["float32"]["coefficient"]
    steered, kept = FORGET[names[0]], RETAIN[names[1]]
    scores = scores_with_reference(model, frozen, forget)
    total = steered.loss(scores, beta=beta, corpus=list(CORPORA).index(corpus)) / steered.count(forget)
    total = total + 10 * kept(scores_with_reference(model, frozen, retain)) / kept.count(retain)
    total.backward()
    relative = 1e-9 if dtype == "float64" and key != "RMU_adaptive" else 1e-6
    assert total.item() == pytest.approx(expected[dtype]["loss"], rel=relative)
    assert float(model.weight.grad.norm()) == pytest.approx(expected[dtype]["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_the_first_token_counts_where_every_token_does(lay_out):
    model = Bigram(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    texts = [Example([3, 4, 5], 0), Example([6, 7, 8, 9, 1], 0)]
    batch = lay_out(texts)
    assert FORGET["RMUQ"].count(batch) == RETAIN["EMBEDQ"].count(batch) == 8
    hidden = score(model, batch, 0).hidden
    assert torch.equal(hidden, model.weight[[3, 4, 5, 6, 7, 8, 9, 1]])
    later = score(model, lay_out([dataclasses.replace(text, start=1) for text in texts]), 0)
    assert torch.equal(score(model, batch, 0).log_prob[[1, 2, 4, 5, 6, 7]], later.log_prob)


def test_each_corpus_has_a_direction_of_length_one():
    model, batch = Bigram(torch.zeros(64, 64)), pack([Example([1, 2], 0)])
    scores = score(model, batch, 0)
    first, second, third = (steering._directed(scores, 2.0, corpus) for corpus in range(3))
    assert [float(one.norm()) for one in (first, second, third)] == pytest.approx([2.0] * 3)
    assert all((one >= 0).all() for one in (first, second, third))
    assert len({float(first @ second), float(first @ third), float(second @ third)}) == 3
    assert float(first @ second) < 0.95 * 4
    alone = torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, 2.0 * alone / alone.norm())


def test_the_paper_s_adaptive_form_is_rmu_where_all_states_are_equally_long():
    weight = torch.nn.functional.normalize(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)), dim=-1) * 3
    scores = score(Bigram(weight), pack([Example([3, 4, 5], 0)]), 0)
    scores = dataclasses.replace(scores, reference=Reference(hidden=scores.hidden.detach()))
    assert float(steering.steer_away_per_token(scores, 2.0)) == pytest.approx(float(steering.steer_away(scores, 6.0)), rel=1e-5)


def circuit_breakers(oracle, batch, texts, dtype=torch.float64):
    """The model, and the means of the two forget losses and the retain loss over all positions of a batch's rows."""
    model, frozen = (Bigram(torch.tensor(oracle[name], dtype=dtype)) for name in ("W", "W_ref"))
    packed = pack(texts(batch))
    scores = scores_with_reference(model, frozen, packed)
    found = {"CBQ": FORGET["CBQ"], "apart": FORGET["CBQ-orth"].also.resolved({"beta": None, "gamma": None}, 0)}
    found["EMBEDQ-norm"] = RETAIN["EMBEDQ-norm"]
    return model, {name: objective(scores) / objective.count(packed) for name, objective in found.items()}


def attended(batch) -> list[Example]:
    return [Example(ids[: sum(mask)], 0) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("key", "name", "batch"),
    [
        ("cb_forget", "CBQ", "forget"),
        ("cb_orth_pairs", "apart", "forget"),
        ("cb_retain_over_attended", "EMBEDQ-norm", "retain"),
    ],
)
def test_circuit_breakers_equal_what_is_published(key, name, batch, dtype, oracle):
    expected = oracle["losses"][key]
    model, losses = circuit_breakers(oracle, oracle["batches"][batch], attended, getattr(torch, dtype))
    losses[name].backward()
    assert losses[name].item() == pytest.approx(expected[dtype]["loss"], rel=1e-6)
    gradient = torch.tensor(expected["float64"]["grad"], dtype=model.weight.dtype)
    assert torch.allclose(model.weight.grad, gradient, atol=1e-6)


@pytest.mark.parametrize("key", ["circuit_breaker_EL_progress0.5", "circuit_breaker_orthogonal_EL_progress0.5"])
def test_the_published_sum_is_made_of_the_three(key, oracle):
    """Its code multiplies the pairs by the tokens of a row, and divides the retain loss by the padding of its batch too."""
    expected = oracle["losses"][key]
    params, s = expected["params"], 0.5
    model, forget = circuit_breakers(oracle, oracle["batches"]["forget"], attended, torch.float32)
    tokens = [sum(mask) for mask in oracle["batches"]["forget"]["attention_mask"]]
    weight = params["orth_coef"] * s * sum(tokens) / len(tokens)
    total = params["remove_coef"] * (1 - 0.25 * s) * forget["CBQ"] + weight * forget["apart"]
    frozen, batch = Bigram(torch.tensor(oracle["W_ref"])), oracle["batches"]["retain"]
    scores = scores_with_reference(model, frozen, pack(attended(batch)))
    positions = sum(map(len, batch["attention_mask"]))
    total = total + params["retain_coef"] * s * RETAIN["EMBEDQ-norm"](scores) / positions
    total.backward()
    assert total.item() == pytest.approx(expected["float32"]["loss"], rel=1e-5)
    assert float(model.weight.grad.norm()) == pytest.approx(expected["float32"]["grad_norm"], rel=1e-5)


def test_circuits_are_whole_before_the_first_step_and_broken_at_a_right_angle():
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = score(Bigram(weight), pack([Example([3, 4, 5], 0), Example([6, 7], 0)]), 0)
    turned = scores.hidden.detach().clone()
    turned[:, ::2], turned[:, 1::2] = -scores.hidden[:, 1::2], scores.hidden[:, ::2]
    for states, expected in ((scores.hidden.detach() * 3, 5.0), (turned, 0.0), (-scores.hidden.detach(), 0.0)):
        before = dataclasses.replace(scores, reference=Reference(hidden=states))
        assert float(FORGET["CB"](before)) == pytest.approx(expected, abs=1e-12)
    alone = score(Bigram(weight), pack([Example([3, 4, 5], 0)]), 0)
    assert float(steering.apart(alone, 1.0)) == 0
    alike = score(Bigram(torch.ones(12, 12)), pack([Example([3, 4], 0), Example([5], 0), Example([6], 0)]), 0)
    assert float(steering.apart(alike, 2.0)) == pytest.approx(2 * 6)  # each of three rows to both others


def test_states_that_have_not_moved_pull_nowhere():
    """The norm has no gradient there, and torch takes it to be zero."""
    model = Bigram(torch.randn(12, 12, generator=torch.Generator().manual_seed(3)))
    steering.matching_norm(scores_with_reference(model, model, pack([Example([3, 4, 5], 0)]))).backward()
    assert torch.equal(model.weight.grad, torch.zeros(12, 12))
