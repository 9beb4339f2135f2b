"""What a task asks of the loop, from its rows and the arguments."""

import dataclasses
import itertools

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.data.rows import Row
from dualoptim.data.tofu import tofu_source
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.work import TaskRows, check_objectives, freeze, layer_of, reference_folder, work_of

SOURCE = tofu_source("demo")
ROWS = TaskRows(SOURCE.task_rows("forget05", 1), SOURCE.retain_rows("forget05", [1]), ["No.", "I do not know."])


@pytest.fixture(scope="module")
def loaded(tiny):
    args = UnlearnArgs(model=str(tiny), data="demo")
    return load_model(args, start_accelerator(args))


def arguments(loaded, tmp_path=None, **changes):
    common = {"model": "a/model", "data": "demo", "learning_rates": (1e-4,), "batch_size": 2, "output_dir": str(tmp_path)}
    return UnlearnArgs(**common | changes)


def test_phases_that_alternate_have_a_term_each(loaded):
    changes = {"forget_lr": 3e-4, "forget_max_grad_norm": 0.5, "forget_coeff": 0.1, "regularization_coeff": 2.0}
    work = work_of(arguments(loaded, **changes, retain_freq=3), ROWS, loaded)
    forget, retain = work.phases["forget"], work.phases["retain"]
    assert [list(phase.terms) for phase in (forget, retain)] == [["forget"], ["retain"]]
    assert [(phase.learning_rate, phase.max_grad_norm) for phase in (forget, retain)] == [(3e-4, 0.5), (1e-4, 1.0)]
    assert [forget.terms["forget"].coefficient, retain.terms["retain"].coefficient] == [0.1, 2.0]
    assert work.plan.cycle == (("forget", 1), ("retain", 3))
    assert work.plan.steps_per_epoch == 10 * 4  # 20 rows, two a step, three retain steps after each


def test_one_rate_and_norm_are_those_of_both_phases(loaded):
    phases = work_of(arguments(loaded), ROWS, loaded).phases
    assert {(phase.learning_rate, phase.max_grad_norm) for phase in phases.values()} == {(1e-4, 1.0)}
    free = work_of(arguments(loaded, forget_max_grad_norm=0.0), ROWS, loaded).phases
    assert [phase.max_grad_norm for phase in free.values()] == [0.0, 1.0]


def test_both_losses_stand_in_every_step_of_plain_adamw(loaded):
    work = work_of(arguments(loaded, optim="adamw", forget_losses=("LLMU+KL",)), ROWS, loaded)
    assert {name: list(phase.terms) for name, phase in work.phases.items()} == {"joint": ["forget", "mismatch", "retain"]}
    assert work.plan.cycle == (("joint", 1),)
    assert work.plan.steps_per_epoch == 10


def test_with_nothing_to_retain_there_are_forget_steps_alone(loaded):
    work = work_of(arguments(loaded, forget_losses=("LLMU+none",)), ROWS, loaded)
    assert {name: list(phase.terms) for name, phase in work.phases.items()} == {"forget": ["forget", "mismatch"]}
    assert work.plan.cycle == (("forget", 1),)


def test_the_texts_of_each_term(loaded):
    """Refusals in place of answers, the question scored without the mask (never in the retain loss), and KLQ's whole text."""

    def first(pair, phase, name, **changes):
        term = work_of(arguments(loaded, forget_losses=(pair,), **changes), ROWS, loaded).phases[phase].terms[name]
        return next(term.micro_batches.stream.window(0))

    decode = loaded.tokenizer.decode
    (text, _) = first("IDK+GD", "forget", "forget")
    assert decode(text.ids[text.start :], skip_special_tokens=True).strip() in ROWS.refusals
    answer, refusal, *_ = first("DPO+GD", "forget", "forget")
    assert answer.ids[: answer.start] == refusal.ids[: refusal.start]
    for pair, mask, starts in (
        ("ME+GD", True, (False, False)),
        ("ME+GD", False, (True, False)),
        ("ME+KLQ", True, (False, True)),
    ):
        found = [first(pair, phase, phase, mask=mask)[0].start == 1 for phase in ("forget", "retain")]
        assert tuple(found) == starts, (pair, mask)
    forget, mismatch = (first("LLMU+GD", "forget", name)[0] for name in ("forget", "mismatch"))
    assert forget.ids[: forget.start] == mismatch.ids[: mismatch.start]
    assert forget.ids != mismatch.ids


def test_constants_and_the_layer_reach_the_objective(loaded):
    work = work_of(arguments(loaded, forget_losses=("RMU+EMBED",), beta=3.0, layer=0), ROWS, loaded)
    forget, retain = (work.phases[name].terms[name].objective for name in ("forget", "retain"))
    assert (forget.constants, forget.layer, retain.layer) == ({"beta": 3.0}, 0, 0)
    layers = loaded.model.config.num_hidden_layers
    assert layer_of(arguments(loaded), loaded) == layers // 2


def test_only_what_asks_is_referred(loaded, tmp_path):
    args = arguments(loaded, tmp_path, forget_losses=("NPO+KL",), max_steps=6)
    work = work_of(args, ROWS, loaded)
    asked = {(phase, name, objective.reference): len(list(texts)) for phase, name, objective, texts in work.referring()}
    assert asked == {("forget", "forget", "log_prob"): 1 * 2, ("retain", "retain", "logits"): 5 * 2}
    quiet = work_of(arguments(loaded, tmp_path), ROWS, loaded)
    assert list(quiet.referring()) == []
    assert freeze([quiet], arguments(loaded, tmp_path), lambda: loaded) is None
    assert not reference_folder(args).exists()
    frozen = freeze([work], args, lambda: loaded)
    assert reference_folder(args) == tmp_path / "reference"
    assert len(list(reference_folder(args).iterdir())) == 2
    reading = work.with_reference(frozen)
    (batch,) = reading.phases["forget"].terms["forget"].micro_batches(0)
    assert batch.reference().log_prob.shape == batch.labels.shape
    (plain,) = work.phases["forget"].terms["forget"].micro_batches(0)
    assert plain.reference is None  # the work itself is not changed


def test_references_of_several_runs_lie_in_one_folder(loaded, tmp_path):
    assert reference_folder(arguments(loaded, tmp_path, reference_dir=f"{tmp_path}/shared")) == tmp_path / "shared"


PASSAGE = Row(None, "All of this is one passage.")


@pytest.mark.parametrize(
    ("pair", "forget", "retain", "message"),
    [
        (
            "IDK+none",
            [PASSAGE],
            [],
            "IDK.none: it compares answers to a question, and passages of text have none; take GA",
        ),
        ("ME+AP", ROWS.forget, [PASSAGE], r"take GA, ME, .* with GD, KL, KLQ, EMBED or none"),
        ("LLMU+none", [PASSAGE], [PASSAGE], "passages of text have none"),
        ("ME+GD", ROWS.forget, [], r"ME\+GD needs rows to keep; give --retain-file, or a pair such as NPO\+none"),
        ("LLMU+none", ROWS.forget, [], r"LLMU\+none needs rows to keep"),
        ("RMU+none", ROWS.forget, ROWS.retain, r"--layer 9: RMU\+none takes one of the model's layers 0 to \d"),
    ],
)
def test_rows_and_models_that_cannot_serve_a_pair(pair, forget, retain, message, loaded, tmp_path):
    args = arguments(loaded, tmp_path, forget_losses=(pair,), layer=9 if "RMU" in pair else None)
    with pytest.raises(InputError, match=message):
        check_objectives(args, [TaskRows(forget, retain, ROWS.refusals)], loaded)


def test_rows_and_models_that_serve_a_pair(loaded, tmp_path):
    for pair, rows in itertools.product(("GA+none", "NPO+GD", "ME+KLQ"), (ROWS, dataclasses.replace(ROWS, forget=[PASSAGE]))):
        check_objectives(arguments(loaded, tmp_path, forget_losses=(pair,)), [rows], loaded)
