"""Windows made ahead of their step: they are what they would have been, and nothing counts that is not stepped."""

import itertools

import torch
from accelerate import Accelerator
from support import MODELS, examples

from dualoptim.data.batches import pack
from dualoptim.method.engine import prepare
from dualoptim.method.loop import steps
from dualoptim.method.objectives import RETAIN
from dualoptim.method.schedule import Plan
from dualoptim.method.window import Phase, Term, make_ahead

PLAN = Plan((("forget", 1), ("retain", 2)), steps_per_epoch=3, num_epochs=2)


def phases(made):
    """Two phases that take note of which of their windows are made."""

    def batches(name, index):
        made.append((name, index))
        return iter([pack(examples(2, seed=index))])

    return {
        name: Phase({"own": Term(RETAIN["GD"], lambda index, name=name: batches(name, index))}, 1e-2, 0.0)
        for name in ("forget", "retain")
    }


def test_a_window_is_made_once_while_the_step_before_it_is_taken():
    made, model = [], MODELS["llama"]()
    engine = prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))
    seen = []
    for _ in steps(engine, phases(made), PLAN):
        seen.append(len(made))
    assert made == [("forget", 0), ("retain", 0), ("retain", 1), ("forget", 1), ("retain", 2), ("retain", 3)]
    assert seen == [2, 3, 4, 5, 6, 6]


def test_it_is_made_before_the_numbers_of_the_step_are_read(monkeypatch):
    """The device has all its work by then, and the host has time."""
    made, model, order = [], MODELS["llama"](), []
    engine = prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda one: order.append(len(made)) or read(one))
    next(steps(engine, phases(made), PLAN))
    assert order[-1] == 2


def test_a_window_that_was_made_and_not_stepped_is_the_first_of_what_goes_on():
    """From the same phases, where it lies, and from new ones, as after an interruption."""
    logs = []
    for cut in (None, "same", "new"):
        torch.manual_seed(0)
        model, own = MODELS["llama"](), phases([])
        engine = prepare(Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))
        records = list(itertools.islice(steps(engine, own, PLAN), None if cut is None else 2))
        records += steps(engine, own if cut == "same" else phases([]), PLAN, len(records))
        logs.append([{key: value for key, value in one.items() if key != "seconds"} for one in records])
    assert len(logs[0]) == 6
    assert logs[0] == logs[1] == logs[2]


def test_nothing_is_made_beyond_the_plan():
    made = []
    make_ahead(phases(made), PLAN, 6)
    assert made == []
    make_ahead(phases(made), PLAN, 5)
    assert made == [("retain", 3)]
