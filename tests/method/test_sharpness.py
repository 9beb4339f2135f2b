"""Sharpness-aware steps: the published numbers, and weights that are what they were."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from losses import examples_of
from support import MODELS, Bigram, examples

from dualoptim.data.batches import pack
from dualoptim.method.engine import prepare
from dualoptim.method.loop import take_step
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import Reference, score
from dualoptim.method.window import Phase, Term


def engine_of(model):
    """With plain SGD at rate 1, whose step is the gradient."""
    return prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=1.0))


def one_step(model, phase):
    """The record of a step, and its gradients."""
    before = [weight.detach().clone() for weight in model.parameters()]
    record = take_step(engine_of(model), phase, 0, "")
    return record, [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize(("key", "name"), [("paper", "NPO"), ("ga", "GA")])
def test_gradients_are_those_of_the_published_code(key, name, shared_json):
    oracle = shared_json("oracles/losses2.json")
    expected = oracle["sam"][key]
    batch = pack(examples_of(oracle["batches"]["forget"]))
    model, frozen = (Bigram(torch.tensor(oracle[weight], dtype=torch.float64)) for weight in ("W", "W_ref"))
    with torch.no_grad():
        reference = Reference(score(frozen, batch).log_prob)
    batch = dataclasses.replace(batch, reference=lambda: reference)
    phase = Phase({"forget": Term(FORGET[name], lambda step: iter([batch]))}, 1.0, 0.0, expected["rho"])
    record, (gradient,) = one_step(model, phase)
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6), "where the weights are"
    assert record["grad_norm"] == pytest.approx(expected["perturbed_grad_norm"], rel=1e-6)
    assert torch.allclose(gradient, torch.tensor(expected["perturbed_grad"], dtype=torch.float64), atol=1e-8)


def phase_of(rho, coefficient=1.0, micro_batches=1):
    texts = examples(6, seed=1)
    size = len(texts) // micro_batches
    parts = [pack(texts[start : start + size]) for start in range(0, len(texts), size)]
    return Phase({"forget": Term(RETAIN["GD"], lambda step: iter(parts), coefficient)}, 1.0, 0.0, rho)


def test_a_second_pass_by_hand_over_all_tensors_together():
    """Written out with torch's own gradients; accumulation changes nothing, and no factor of the loss how far weights move."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    batch = pack(examples(6, seed=1))
    weights = dict(model.named_parameters())
    loss = RETAIN["GD"](score(model, batch)) / len(batch.labels)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    length = torch.cat([one.flatten() for one in gradients]).norm()
    moved = {name: weight.detach() + 0.5 * g / length for (name, weight), g in zip(weights.items(), gradients, strict=True)}
    state = {name: weight.detach().clone() for name, weight in weights.items()}
    model.load_state_dict(moved, strict=False)
    expected = torch.autograd.grad(RETAIN["GD"](score(model, batch)) / len(batch.labels), list(weights.values()))
    for micro_batches, coefficient in ((1, 1.0), (3, 1.0), (1, 0.25)):
        model.load_state_dict(state, strict=False)
        record, found = one_step(model, phase_of(0.5, coefficient, micro_batches))
        assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, coefficient * other, atol=1e-5)


def test_weights_are_what_they_were_to_the_bit_and_without_it_nothing_moves():
    torch.manual_seed(0)
    model = MODELS["llama"]()
    for rho in (0.0, 3.0):
        state = [weight.detach().clone() for weight in model.parameters()]
        phase = phase_of(rho)
        engine = prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.0))
        take_step(engine, phase, 0, "")
        assert all(map(torch.equal, state, model.parameters()))
