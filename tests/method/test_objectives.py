"""Objectives against the published code's numbers, closed forms, and their limits."""

import dataclasses
import math

import pytest
import torch
from losses import OBJECTIVES, TEXTS, examples_of, loss_of, mean_of, models, scores_of, scores_with_reference
from support import Bigram

from dualoptim import InputError, UnlearnArgs
from dualoptim.data.batches import pack, pad
from dualoptim.data.prompts import Example
from dualoptim.method.objectives import FORGET, RETAIN, Objective, flags_of, split_objectives
from dualoptim.method.scores import TokenScores, score


def oracle_examples(name: str, oracle) -> list[Example]:
    side = "forget" if name in FORGET else "retain"
    answers, refusals = (examples_of(oracle["batches"][batch]) for batch in (side, f"{side}_idk"))
    texts = {"answer": answers, "refusal": refusals, "mismatch": examples_of(oracle["batches"]["forget_mismatch"])}
    if "forget_alternate" in oracle["batches"]:
        texts["alternative"] = examples_of(oracle["batches"]["forget_alternate"])
    return [texts[text][row] for row in range(len(answers)) for text in OBJECTIVES[name].reads]


CASES = [(name, name.removesuffix("-floor"), None, None) for name in ("GA", "ME", "ME-floor", "IDK", "GD")]
CASES += [("AP", "AP_beta0.1", 0.1, None), ("AP", "AP_beta1", 1.0, None)]
CASES += [("NPO", f"{prefix}NPO_beta0.1", None, None) for prefix in ("", "OU_")] + [("NPO", "NPO_beta1", 1.0, None)]
CASES += [("DPO", f"{prefix}DPO_beta0.1", None, None) for prefix in ("", "OU_")] + [("DPO", "DPO_beta0.5", 0.5, None)]
CASES += [("SimNPO", "SimNPO_beta2.5_gamma0", None, None), ("SimNPO", "SimNPO_beta4.5_gamma0.3", 4.5, 0.3)]
CASES += [("WGA", "OU_WGA_beta1", None, None), ("WGA", "OU_WGA_beta0.5", 0.5, None)]
CASES += [
    ("SatImp", "OU_SatImp_5_1", None, None),
    ("SatImp", "OU_SatImp_0.5_2", 0.5, 2.0),
    ("CE-U", "OU_CEU_ignore1", None, None),
]
CASES += [("LLMU", "LLMU_forget", None, None)]


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize(("name", "key", "beta", "gamma"), CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_objectives_equal_the_published_code(name, key, beta, gamma, dtype, collate, shared_json):
    oracle = shared_json("oracles/losses_bigram.json")
    expected = oracle["losses"][key][dtype]
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=getattr(torch, dtype))) for weight in ("W", "W_ref"))
    batch = collate(oracle_examples(name, oracle))
    mean = mean_of(name, scores_with_reference(model, frozen, batch), batch, beta, gamma)
    mean.backward()
    assert mean.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert float(model.weight.grad.norm()) == pytest.approx(expected["grad_norm"], rel=1e-5)
    if expected["grad"] is not None:
        assert torch.allclose(model.weight.grad, torch.tensor(expected["grad"], dtype=model.weight.dtype), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("beta", [0.05, None, 0.5])  # None: .1 as published
def test_another_answer_is_preferred_as_in_the_published_code(beta, dtype, shared_json):
    oracle = shared_json("oracles/losses2.json")
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=getattr(torch, dtype))) for weight in ("W", "W_ref"))
    batch = pack(oracle_examples("AltPO", oracle))
    mean = mean_of("AltPO", scores_with_reference(model, frozen, batch), batch, beta)
    mean.backward()
    expected = oracle["losses"][f"AltPO_forget_beta{beta or 0.1}"]
    assert mean.item() == pytest.approx(expected[dtype]["loss"], rel=1e-5)
    assert float(model.weight.grad.norm()) == pytest.approx(expected[dtype]["grad_norm"], rel=1e-5)
    gradient = torch.tensor(expected["float64"]["grad"], dtype=model.weight.dtype)
    assert torch.allclose(model.weight.grad, gradient, rtol=1e-5, atol=1e-6)


def every_position(rows):
    """A padded batch of token ids with all its positions scored, which published code averages over in KL.

    Position p is scored by the logits at p, so every text gets one more token at its end.
    """
    return pack([Example([*row, 0], 1) for row in rows])


def one_later(rows):
    """Texts whose answers' own tokens are the ones that predict, as published code takes them in PDU."""
    return pack([Example([*text.ids, 0], text.start + 1) for text in rows])


def one_earlier(rows):
    """Texts scored from one token earlier, so that what CE-U leaves out is not of the answer."""
    return pack([Example(text.ids, text.start - 1) for text in rows])


def test_every_oracle_is_compared_with(shared_json):
    """UNDIAL's are errors of the published code, which takes -100 for a token."""
    losses = shared_json("oracles/losses_bigram.json")["losses"]
    compared = {key for _, key, _, _ in CASES} | {"KL", "OU_KL", "OU_PDU_forget", "OU_CEU_ignore0", "mismatch", "LLMU_reg"}
    assert compared == {key for key, value in losses.items() if "error" not in value["float64"]}


@pytest.mark.parametrize("key", ["KL", "OU_KL", "OU_PDU_forget", "OU_CEU_ignore0"])
def test_averages_over_other_positions_equal_the_published_code(key, shared_json):
    oracle = shared_json("oracles/losses_bigram.json")
    expected = oracle["losses"][key]["float64"]
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=torch.float64)) for weight in ("W", "W_ref"))
    batches = oracle["batches"]
    forget = examples_of(batches["forget"])
    name, positions = {
        "OU_PDU_forget": ("PDU", one_later(forget)),
        "OU_CEU_ignore0": ("CE-U", one_earlier(forget)),
    }.get(key, ("KL", every_position(batches["retain"]["input_ids"])))
    mean = mean_of(name, scores_with_reference(model, frozen, positions), positions)
    mean.backward()
    assert mean.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert float(model.weight.grad.norm()) == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_the_second_half_of_llmu_equals_the_published_code(shared_json):
    """Its regularization is the loss of another question's answer plus KL, each with a mean of its own."""
    oracle = shared_json("oracles/losses_bigram.json")
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=torch.float64)) for weight in ("W", "W_ref"))
    also = FORGET["LLMU"].also
    batch = pack(examples_of(oracle["batches"]["forget_mismatch"]))
    mismatch = also(score(model, batch)) / also.count(batch)
    assert also.reads == ("mismatch",)
    assert mismatch.item() == pytest.approx(oracle["losses"]["mismatch"]["float64"]["loss"], rel=1e-9)
    positions = every_position(oracle["batches"]["retain"]["input_ids"])
    kl = mean_of("KL", scores_with_reference(model, frozen, positions), positions)
    assert (mismatch + kl).item() == pytest.approx(oracle["losses"]["LLMU_reg"]["float64"]["loss"], rel=1e-9)


UNITS = {
    **dict.fromkeys(
        ("GA", "ME", "ME-floor", "IDK", "ALT", "WGA", "SatImp", "UNDIAL", "PDU", "RMU", "LLMU", "GD", "KL", "KLQ", "EMBED"), 7
    ),
    **dict.fromkeys(("RMUQ", "ARMU", "ARMU-once", "EMBEDQ", "CB", "CBQ", "CBQ-orth", "EMBEDQ-norm", "JensUn", "IHL", "JSD"), 7),
    **dict.fromkeys(("NPO", "SimNPO"), 4),  # texts
    **dict.fromkeys(("DPO", "AltPO", "AP"), 2),  # pairs of texts
    "CE-U": 3,  # all tokens but each text's first
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_count_is_known_before_the_forward_pass(name):
    """Seven scored tokens in four texts."""
    texts = [Example([1, 2, 3, 4], 2), Example([5, 6, 7], 1), Example([3, 1], 1), Example([9, 8, 7, 6, 5], 3)]
    assert OBJECTIVES[name].count(pack(texts)) == UNITS[name]


def test_twice_the_texts_are_twice_the_sum_and_twice_the_count():
    """So the mean goes over what the count counts; SimNPO and others weigh units, but all of them add up."""
    model, frozen = models()
    for name, objective in OBJECTIVES.items():
        found = []
        for texts in (TEXTS, TEXTS + TEXTS):
            batch = pack(texts)
            found.append((float(loss_of(name, scores_with_reference(model, frozen, batch, 0))), objective.count(batch)))
        (once, units), (twice, more) = found
        assert more == 2 * units, name
        assert twice == pytest.approx(2 * once, rel=1e-9), name


def test_maximum_entropy_is_the_divergence_from_uniform():
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    total = loss_of("ME", scores_of(logits.tolist(), [0, 1]))
    uniform = torch.full_like(logits, 0.25)
    by_definition = (uniform * (uniform.log() - logits.log_softmax(-1))).sum()
    assert float(total) == pytest.approx(float(by_definition), abs=1e-12)
    flat = loss_of("ME", scores_of([[2.0] * 7], [3]))
    assert float(flat) == pytest.approx(0, abs=1e-12)  # the minimum: every token equally likely


def test_gradient_ascent_is_minus_gradient_descent():
    scores = scores_of([[0.3, -1.2, 2.0], [1.0, 0.5, 0.1]], [0, 2])
    assert loss_of("GA", scores) == -loss_of("GD", scores)


def test_answer_preservation_by_hand_and_at_its_limits():
    # log p = log(3/4) for the answer's token and log(1/4) for the refusal's; beta 2: -1/2 log sigmoid(2 log 3)
    scores = scores_of([[math.log(3), 0.0], [0.0, math.log(3)]], [0, 0], sequence=[0, 1])
    total = loss_of("AP", scores, 2.0)
    assert float(total) == pytest.approx(math.log(1 + 1 / 9) / 2)
    even = loss_of("AP", scores_of([[0.0, 0.0], [0.0, 0.0]], [0, 1], sequence=[0, 1]))
    assert float(even) == pytest.approx(math.log(2) / 0.1)
    # swapping answer and refusal negates the argument of the sigmoid: softplus(x) - softplus(-x) = x
    swapped = loss_of("AP", scores_of([[0.0, math.log(3)], [math.log(3), 0.0]], [0, 0], sequence=[0, 1]), 2.0)
    assert float(swapped - total) == pytest.approx(math.log(3))


def gradient(name, beta=None, gamma=None, texts=TEXTS):
    model, frozen = models()
    loss_of(name, scores_with_reference(model, frozen, pack(texts), 0), beta, gamma).backward()
    return model.weight.grad


def test_npo_tends_to_gradient_ascent_over_sequences():
    """d NPO = 2 sigmoid(beta log(p/ref)) d log p, and the sigmoid tends to one half."""
    ascent = gradient("GA")
    gaps = [float((gradient("NPO", beta) - ascent).norm() / ascent.norm()) for beta in (1.0, 1e-2, 1e-4, 1e-6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-5


@pytest.mark.parametrize("name", ["DPO", "AP"])
def test_swapping_the_two_answers_negates_the_argument_of_the_sigmoid(name):
    """softplus(x) - softplus(-x) = x, so the two losses differ by their margins alone."""
    model, frozen = models()
    factor, pairs = (2 / 0.3 if name == "DPO" else 1 / 0.3), len(TEXTS) // 2
    swapped = [TEXTS[1], TEXTS[0], TEXTS[3], TEXTS[2]]
    losses, margins = [], []
    for texts in (TEXTS, swapped):
        scores = scores_with_reference(model, frozen, pack(texts))
        losses.append(float(loss_of(name, scores, 0.3)))
        ratio = scores.per_sequence(scores.log_prob - (scores.reference.log_prob if name == "DPO" else 0))
        margin = ratio[1::2] - ratio[0::2] if name == "DPO" else ratio[0::2] - ratio[1::2]
        margins.append(margin)
    assert len(margins[0]) == pairs
    assert torch.allclose(margins[0], -margins[1])
    assert losses[1] - losses[0] == pytest.approx(factor * 0.3 * float(margins[0].sum()), rel=1e-9)


def test_limits_of_the_weighted_forms():
    assert torch.allclose(gradient("SatImp", 1.0, 0.0), gradient("WGA", 1.0))
    assert torch.allclose(gradient("WGA", 1e-12), gradient("GA"))
    assert not torch.allclose(gradient("WGA", 1.0), gradient("GA"))


def test_a_model_that_has_not_changed_loses_nothing_of_what_it_keeps():
    model, _ = models()
    scores = scores_with_reference(model, model, pack(TEXTS), 0)
    for name in ("KL", "EMBED", "JSD", "EMBEDQ-norm"):
        assert float(loss_of(name, scores)) == pytest.approx(0, abs=1e-9)
    # -(2/beta) log sigmoid(0) per question
    assert float(loss_of("NPO", scores)) == pytest.approx(len(TEXTS) * 2 / 0.1 * math.log(2))
    # UNDIAL with nothing lowered is the entropy, whose gradient at the reference is zero
    model.weight.grad = None
    loss_of("UNDIAL", scores, 0.0).backward()
    assert float(model.weight.grad.abs().max()) < 1e-12


def test_undial_by_definition_lowers_the_label_alone():
    model, frozen = models()
    scores = scores_with_reference(model, frozen, pack(TEXTS))
    total = loss_of("UNDIAL", scores, 3.0)
    target = scores.reference.logits(slice(None)) - 3.0 * torch.nn.functional.one_hot(scores.labels, 12)
    by_definition = -(target.softmax(-1) * scores.logits.log_softmax(-1)).sum()
    assert float(total) == pytest.approx(float(by_definition), rel=1e-12)


def test_rmu_steers_towards_one_fixed_direction_of_the_given_length():
    model, frozen = models()
    scores = scores_with_reference(model, frozen, pack(TEXTS), 0)
    direction = torch.rand(12, generator=torch.Generator().manual_seed(0)).double()
    there = dataclasses.replace(scores, hidden=(5 * direction / direction.norm()).expand_as(scores.hidden))
    assert float(loss_of("RMU", there, 5.0)) == pytest.approx(0, abs=1e-12)
    assert float(loss_of("RMU", there, 2.0)) == pytest.approx(len(scores.labels) * 9 / 12)


def test_constants_are_the_published_ones_or_those_that_are_given():
    given = {"beta": 3.0, "gamma": None}
    assert FORGET["SimNPO"].resolved(given, 0).constants == {"beta": 3.0, "gamma": 0.0}
    assert FORGET["NPO"].resolved({"beta": None, "gamma": 9.0}, 0).constants == {"beta": 0.1}
    assert FORGET["ME"].resolved(given, 5) == FORGET["ME"]
    assert (FORGET["RMU"].resolved(given, 5).layer, FORGET["RMU"].layer) == (5, None)


def test_flags_of_an_objective_are_those_that_change_it():
    assert [FORGET[name].flags for name in ("GA", "NPO", "SimNPO")] == [set(), {"beta", "fix_ref_model"}, {"beta", "gamma"}]
    assert (FORGET["RMU"].flags, RETAIN["EMBED"].flags) == ({"beta", "layer"}, {"layer", "fix_ref_model"})
    assert flags_of(split_objectives("SatImp+KL")) == {"beta", "gamma", "fix_ref_model"}
    assert flags_of(split_objectives("GA+none")) == set()


def test_a_pair_names_two_objectives():
    assert split_objectives("ME+GD") == (FORGET["ME"], RETAIN["GD"])
    assert split_objectives("RMU+none") == (FORGET["RMU"], None)
    for pair in ("ME", "ME+", "GD+ME", "me+gd", "ME+GD+AP", "none+GD"):
        with pytest.raises(InputError, match=f"--forget-losses {pair!r} is not FORGET".replace("+", r"\+")):
            split_objectives(pair)


def test_a_new_objective_is_a_function_and_an_entry(monkeypatch):
    """It takes part in a pair and gets its constant; the README of the room has the same with an example that runs."""

    def squared_confidence(scores: TokenScores, beta: float) -> torch.Tensor:
        return beta * scores.log_prob.exp().square().sum()

    monkeypatch.setitem(FORGET, "SQ", Objective(squared_confidence, "beta p^2 per token", constants={"beta": 1.0}))
    assert UnlearnArgs(forget_losses=("SQ+GD",), beta=2.0).forget_losses == ("SQ+GD",)
    scores = scores_of([[0.0, math.log(3)]], [1])
    assert float(FORGET["SQ"](scores)) == pytest.approx((3 / 4) ** 2)
    assert float(FORGET["SQ"].resolved({"beta": 2.0, "gamma": None}, 0)(scores)) == pytest.approx(2 * (3 / 4) ** 2)
