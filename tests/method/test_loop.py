"""The loop: what a step computes, what must not change it, and how it stops."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from support import MODELS, examples

from dualoptim import NonFiniteError, UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.data.batches import pack
from dualoptim.data.rows import Row
from dualoptim.data.stream import ExampleBuilder, Stream
from dualoptim.data.tofu import tofu_source
from dualoptim.method.engine import prepare
from dualoptim.method.loop import steps, take_step
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.schedule import Plan
from dualoptim.method.window import Phase, Term
from dualoptim.models.launch import release, start_accelerator, training
from dualoptim.models.load import load_model
from dualoptim.models.loaded import MicroBatches


@functools.cache
def loaded_once(model, packing):
    args = UnlearnArgs(model=model, data="demo", batch_size=8, packing=packing)
    return load_model(args, start_accelerator(args))


def one_step(taught, batch_size, accumulation, name="ME", packing=True, max_grad_norm=0.0):
    """The gradient of one step over the same eight rows of unequal length, however they are cut."""
    args = UnlearnArgs(
        model=str(taught), data="demo", batch_size=batch_size, gradient_accumulation_steps=accumulation, packing=packing
    )
    loaded = loaded_once(str(taught), packing)
    rows = [
        *tofu_source("demo").task_rows("forget05", 1)[:7],
        Row("Why is the author so silent?", "Because " + "of the rain and " * 9),
    ]
    objective = {**FORGET, **RETAIN}[name].resolved({"beta": None, "gamma": None}, 0)
    refusals = ["No.", "I really do not know that, sorry."]
    stream = Stream.of(
        args, "forget", ExampleBuilder(rows, loaded.formatter, objective.reads, args.seed, refusals), loaded.share
    )
    phases = {"forget": Phase({"forget": Term(objective, MicroBatches(stream, loaded.layout), 0.5)}, 0.0, max_grad_norm)}
    gradients = {}
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
        for name, parameter in loaded.model.named_parameters()
    ]
    with training(loaded, args, kind_of(args).build(args)) as engine:
        (record,) = steps(engine, phases, Plan((("forget", 1),), 1, 1))
    release(loaded)
    for handle in handles:
        handle.remove()
    return torch.cat([gradient.flatten() for gradient in gradients.values()]), record


@pytest.mark.parametrize("name", ["ME", "GD", "AP", "IDK", "SimNPO", "CE-U", "IHL", "RMU"])
def test_accumulation_and_padding_change_nothing(taught, name):
    reference, record = one_step(taught, 8, 1, name)
    assert record["grad_norm"] > 1e-3
    for batch_size, accumulation, packing in ((4, 2, True), (2, 4, True), (1, 8, True), (8, 1, False), (2, 4, False)):
        gradient, other = one_step(taught, batch_size, accumulation, name, packing)
        difference = (gradient - reference).abs()
        place = f"{batch_size} x {accumulation}, packing {packing}"
        assert float(difference.max()) <= 1e-5, place
        assert float(difference.mean()) <= 1e-6, place  # a lost micro-batch is a drift to one side
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-6, abs=1e-5), place
        assert (other["count"], other["tokens"]) == (record["count"], record["tokens"]), place


def test_the_log_has_the_loss_before_its_coefficient_and_the_norm_before_clipping(taught):
    free, record = one_step(taught, 8, 1, "GD")
    clipped, record_clipped = one_step(taught, 8, 1, "GD", max_grad_norm=1e-3)
    assert record == pytest.approx({**record_clipped, "seconds": record["seconds"]})
    assert record["grad_norm"] == pytest.approx(float(free.double().norm()), rel=1e-4)
    assert torch.equal(free, clipped)  # the hook sees gradients before they are clipped


def bare_phases():
    """An untrained model's engine, and two phases of one micro-batch a step."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    engine = prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))

    def phase(objective, rate):
        return Phase({"own": Term(objective, lambda step: iter([pack(examples(3, seed=step))]))}, rate, 0.0)

    return engine, {"forget": phase(FORGET["GA"], 1e-2), "retain": phase(RETAIN["GD"], 1e-1)}


def without_time(log):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in log]


PLAN = Plan((("forget", 1), ("retain", 2)), steps_per_epoch=3, num_epochs=2)


def test_a_step_is_taken_whenever_its_record_is_asked_for():
    engine, phases = bare_phases()
    start = [parameter.detach().clone() for parameter in engine.model.parameters()]
    records = steps(engine, phases, PLAN)
    assert all(torch.equal(a, b) for a, b in zip(start, engine.model.parameters(), strict=True))
    first = next(records)
    assert not all(torch.equal(a, b) for a, b in zip(start, engine.model.parameters(), strict=True))
    log = [first, *records]
    assert [(record["step"], record["phase"]) for record in log] == [
        (1, "forget"), (2, "retain"), (3, "retain"), (4, "forget"), (5, "retain"), (6, "retain"),
    ]  # fmt: skip
    assert [record["epoch"] for record in log] == [0.3333, 0.6667, 1.0, 1.3333, 1.6667, 2.0]
    assert [record["lr"] for record in log] == pytest.approx(
        [1e-2, 5 / 6 * 1e-1, 4 / 6 * 1e-1, 3 / 6 * 1e-2, 2 / 6 * 1e-1, 1 / 6 * 1e-1]
    )
    assert list(log[1]) == ["step", "epoch", "phase", "lr", "loss", "grad_norm", "count", "tokens", "seconds"]


def test_the_rest_of_a_plan_goes_on_as_if_nothing_had_been_between():
    engine, phases = bare_phases()
    whole = list(steps(engine, phases, PLAN))
    engine, phases = bare_phases()
    parts = list(itertools.islice(steps(engine, phases, PLAN), 4))
    parts += steps(engine, phases, PLAN, taken=4)
    assert without_time(parts) == without_time(whole)


def test_whether_a_signal_ends_the_run_goes_along_with_the_counts():
    engine, phases = bare_phases()
    before = take_step(engine, phases["retain"], 0, "")
    assert not engine.stops
    engine, phases = bare_phases()
    engine.asked_to_stop = lambda: True
    assert take_step(engine, phases["retain"], 0, "") == before
    assert engine.stops


def test_a_spoiled_loss_is_named_and_moves_nothing():
    engine, phases = bare_phases()
    term = phases["forget"].terms["own"]
    spoiled = dataclasses.replace(term.objective, loss=lambda scores: scores.log_prob.sum() * math.inf)
    phase = dataclasses.replace(phases["forget"], terms={"own": dataclasses.replace(term, objective=spoiled)})
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    with pytest.raises(NonFiniteError, match=r"step 3 \(forget\): loss -inf, gradient norm nan; lower the rate"):
        take_step(engine, phase, 0, "step 3 (forget)")
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_several_terms_are_one_loss_with_a_mean_each():
    """Weighted by their coefficients; each mean is over what its own objective counts."""
    engine, phases = bare_phases()
    ascent = take_step(engine, phases["forget"], 0, "")["loss"]
    engine, phases = bare_phases()
    terms = {
        name: dataclasses.replace(phase.terms["own"], coefficient=factor)
        for (name, phase), factor in zip(phases.items(), (0.5, 3.0), strict=True)
    }
    record = take_step(engine, Phase(terms, 0.0, 0.0), 0, "")
    assert [record["forget_loss"], record["retain_loss"]] == pytest.approx([ascent, -ascent], rel=1e-6)
    assert record["loss"] == pytest.approx(0.5 * record["forget_loss"] + 3 * record["retain_loss"], rel=1e-6)
    assert record["count"] == 2 * len(pack(examples(3, seed=0)).labels)
