"""What a task asks of the loop, from its rows and the arguments."""

import dataclasses
import itertools

import pytest
import torch

from dualoptim import InputError, UnlearnArgs
from dualoptim.data.prompts import Example
from dualoptim.data.rows import Corpus, Row
from dualoptim.data.tofu import tofu_source
from dualoptim.method.objectives import FORGET
from dualoptim.method.scores import Reference, score
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.work import TaskRows, _measured, check_objectives, freeze, layer_of, reference_folder, work_of

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

    rows = dataclasses.replace(ROWS, forget=[dataclasses.replace(row, alternatives=("Ann.", "Nobody.")) for row in ROWS.forget])

    def first(pair, phase, name, **changes):
        term = work_of(arguments(loaded, forget_losses=(pair,), **changes), rows, loaded).phases[phase].terms[name]
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
    _, other, *_ = first("AltPO+GD", "forget", "forget")
    assert decode(other.ids[other.start :], skip_special_tokens=True).strip() in ("Ann.", "Nobody.")
    text, *_ = first("JensUn+JSD", "forget", "forget")
    assert decode(text.ids[text.start :], skip_special_tokens=True).strip() in {row.answer for row in rows.forget}
    assert decode(text.labels, skip_special_tokens=True).strip().startswith(("No.", "I do not"))
    assert first("CBQ-orth+GD", "forget", "forget") == first("CBQ-orth+GD", "forget", "apart")
    forget, mismatch = (first("LLMU+GD", "forget", name)[0] for name in ("forget", "mismatch"))
    assert forget.ids[: forget.start] == mismatch.ids[: mismatch.start]
    assert forget.ids != mismatch.ids


def test_constants_and_the_layer_reach_the_objective(loaded):
    work = work_of(arguments(loaded, forget_losses=("RMU+EMBED",), beta=3.0, layer=0), ROWS, loaded)
    forget, retain = (work.phases[name].terms[name].objective for name in ("forget", "retain"))
    assert (forget.constants, forget.layer, retain.layer) == ({"beta": 3.0}, 0, 0)
    layers = loaded.model.config.num_hidden_layers
    assert layer_of(arguments(loaded), loaded) == layers // 2


def of_corpora(**corpora):
    """The same rows as those of several corpora, of which each has so many to forget."""
    forget, retain = [], []
    for name, (count, settings) in corpora.items():
        corpus = Corpus(name, **settings)
        forget += [dataclasses.replace(row, corpus=corpus) for row in ROWS.forget[:count]]
        retain += [dataclasses.replace(row, corpus=corpus) for row in ROWS.retain]
    return TaskRows(forget, retain, [])


def test_corpora_are_taken_in_turn_each_with_its_own_weight_and_direction(loaded):
    rows = of_corpora(bio=(12, {"beta": 6.5, "regularization_coeff": 1200.0}), cyber=(6, {}))
    args = arguments(loaded, forget_losses=("RMUQ+EMBEDQ",), optim="adamw", beta=3.0, regularization_coeff=2.0)
    work = work_of(args, rows, loaded)
    assert work.plan.cycle == (("joint bio", 1), ("joint cyber", 1))
    assert work.plan.steps_per_epoch == 2 * 3  # two rows a step, and the smaller corpus has six
    bio, cyber = (phase.terms for phase in work.phases.values())
    assert [terms["forget"].objective.constants["beta"] for terms in (bio, cyber)] == [6.5, 3.0]
    assert [terms["retain"].coefficient for terms in (bio, cyber)] == [1200.0, 2.0]
    texts = [next(terms["retain"].micro_batches.stream.window(0)) for terms in (bio, cyber)]
    assert texts[0] == texts[1], "as published both corpora see the same rows that are kept"
    assert {text.start for text in texts[0]} == {0}
    batch = next(bio["forget"].micro_batches(0))
    scores = score(loaded.model, batch, 1)
    same = [
        float(dataclasses.replace(terms["forget"].objective, constants={"beta": 50.0})(scores).detach())
        for terms in (bio, cyber)
    ]
    assert abs(same[0] - same[1]) > 0.01, "each has a direction of its own"
    alternating = work_of(dataclasses.replace(args, optim="dual-adamw", retain_freq=2), rows, loaded)
    assert alternating.plan.cycle == (("forget bio", 1), ("retain bio", 2), ("forget cyber", 1), ("retain cyber", 2))
    alone = work_of(args, of_corpora(bio=(12, {})), loaded)
    assert alone.plan.cycle == (("joint", 1),)


def test_adaptive_rmu_measures_how_long_states_are_once(shared_json):
    """By the published code's numbers: over every token, with padding as the oracle has it."""
    oracle = shared_json("oracles/losses2.json")
    weight = torch.tensor(oracle["W"], dtype=torch.float64)  # where its first step stands
    for corpus, name in (("A", "forget"), ("B", "forget_mismatch")):
        texts = [Example(ids, 0) for ids in shared_json("oracles/losses_bigram.json")["batches"][name]["input_ids"]]
        found = _measured(FORGET["ARMU-once"], lambda own, _: Reference(hidden=weight[own[0].ids]), texts)
        expected = oracle["losses"][f"RMU_adaptive_corpus{corpus}"]["float32"]["coefficient"]
        assert found.constants == {"beta": pytest.approx(expected, rel=1e-6)}
        assert found.reference is None


def test_a_measured_length_asks_for_the_texts_of_the_first_step_alone(loaded, tmp_path):
    args = arguments(loaded, tmp_path, forget_losses=("ARMU-once+GD",), optim="adamw", max_steps=5)
    rows = of_corpora(bio=(12, {}), cyber=(6, {}))
    work = work_of(args, rows, loaded)
    assert [len(list(texts)) for *_, texts in work.referring()] == [2, 2]
    frozen = freeze([work], args, lambda: loaded)
    lengths = [phase.terms["forget"].objective.constants["beta"] for phase in work.with_reference(frozen).phases.values()]
    assert lengths[0] != lengths[1]
    assert all(0 < length < 5 for length in lengths)
    adaptive = work_of(dataclasses.replace(args, forget_losses=("ARMU+GD",)), rows, loaded)
    assert [len(list(texts)) for *_, texts in adaptive.referring()] == [2 * 3, 2 * 2]


@pytest.mark.parametrize(("optim", "steps"), [("adamw", 1), ("dual-adamw", 6)])
def test_a_corpus_whose_turn_never_comes_is_not_measured(optim, steps, loaded, tmp_path):
    args = arguments(loaded, tmp_path, forget_losses=("ARMU-once+EMBEDQ",), optim=optim, max_steps=steps)
    work = work_of(args, of_corpora(bio=(12, {}), cyber=(6, {})), loaded)
    referred = work.with_reference(freeze([work], args, lambda: loaded))
    lengths = [terms["forget"].objective for terms in (p.terms for p in referred.phases.values()) if "forget" in terms]
    assert [objective.reference for objective in lengths] == [None, "hidden"]


def test_a_flag_that_every_corpus_overrides_is_refused(loaded, tmp_path):
    rows = of_corpora(bio=(3, {"beta": 6.5}), cyber=(3, {"beta": 2.0}))
    args = arguments(loaded, tmp_path, forget_losses=("RMUQ+EMBEDQ",), beta=3.0, layer=0)
    with pytest.raises(InputError, match=r"--beta 3: each corpus of --benchmark None has beta of its own; drop the flag"):
        check_objectives(args, [rows], loaded)
    check_objectives(dataclasses.replace(args, beta=None), [rows], loaded)
    kept = TaskRows(rows.forget, [row for row in rows.retain if row.corpus.name == "bio"], [])
    with pytest.raises(InputError, match=r"RMUQ\+EMBEDQ needs rows to keep"):
        check_objectives(dataclasses.replace(args, beta=None), [kept], loaded)


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
        ("ME+AP", ROWS.forget, [PASSAGE], r"take GA, ME, .* with GD, KL, KLQ, JSD, EMBED, EMBEDQ, EMBEDQ-norm or"),
        ("JensUn+JSD", [PASSAGE], ROWS.retain, "passages of text have none; take GA"),
        ("LLMU+none", [PASSAGE], [PASSAGE], "passages of text have none"),
        ("ME+GD", ROWS.forget, [], r"ME\+GD needs rows to keep; give --retain-file, or a pair such as NPO\+none"),
        ("LLMU+none", ROWS.forget, [], r"LLMU\+none needs rows to keep"),
        ("AltPO+GD", ROWS.forget, ROWS.retain, r"AltPO\+GD needs other answers of the rows to forget; name their column in"),
        ("CBQ+none", ROWS.forget, ROWS.retain, r"--layer 9: CBQ\+none takes one of the model's layers 0 to \d"),
        ("RMU+none", ROWS.forget, ROWS.retain, r"--layer 9: RMU\+none takes one of the model's layers 0 to \d"),
    ],
)
def test_rows_and_models_that_cannot_serve_a_pair(pair, forget, retain, message, loaded, tmp_path):
    args = arguments(loaded, tmp_path, forget_losses=(pair,), layer=9 if pair in ("RMU+none", "CBQ+none") else None)
    with pytest.raises(InputError, match=message):
        check_objectives(args, [TaskRows(forget, retain, ROWS.refusals)], loaded)


def test_rows_and_models_that_serve_a_pair(loaded, tmp_path):
    for pair, rows in itertools.product(("GA+none", "NPO+GD", "ME+KLQ"), (ROWS, dataclasses.replace(ROWS, forget=[PASSAGE]))):
        check_objectives(arguments(loaded, tmp_path, forget_losses=(pair,)), [rows], loaded)


def test_a_run_says_its_steps_examples_and_rates(loaded):
    changes = {"forget_lr": 3e-4, "retain_freq": 3, "num_epochs": 2, "gradient_accumulation_steps": 2}
    assert work_of(arguments(loaded, **changes), ROWS, loaded).in_words() == (
        "40 steps, 20 an epoch: 10 forget steps of 4 rows (40 examples) at rate 0.0003, 30 retain steps of 4 rows "
        "(120 examples) at rate 0.0001; published schedule over 40 steps, 20 of them warm-up"
    )
    joint = work_of(arguments(loaded, optim="adamw", max_steps=60, lr_schedule="linear"), ROWS, loaded).in_words()
    assert joint.startswith("60 steps, 10 an epoch: 60 joint steps of 2 rows (120 examples) at rate 0.0001; linear schedule")


def test_a_run_that_ends_within_its_warm_up_says_so(loaded):
    """Of 20 steps of warm-up it takes 6, so that the last one has 0.3 of the rate; a single step has no plural."""
    changes = {"retain_freq": 3, "num_epochs": 2, "gradient_accumulation_steps": 2}
    said = work_of(arguments(loaded, **changes, max_steps=6), ROWS, loaded).in_words()
    assert said.endswith("rates reach 0.3 of what they say; give --warmup-steps 0")
    assert "1 forget step of 4 rows" in work_of(arguments(loaded, **changes, max_steps=1), ROWS, loaded).in_words()
    for more in ({"max_steps": 30}, {"max_steps": 6, "warmup_steps": 0}, {"max_steps": 1, "warmup_steps": 1}):
        assert "warm-up, so" not in work_of(arguments(loaded, **changes, **more), ROWS, loaded).in_words()
