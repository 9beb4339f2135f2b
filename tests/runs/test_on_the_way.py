"""A model that is measured and saved between its steps trains as if it were not, and the best one is kept."""

import dataclasses
import json

import pytest
import torch
from support import FOLDER, arguments, launch, records, same_end, state_of, stop_and_resume

from dualoptim import EvalArgs, FinetuneArgs, InputError, UnlearnArgs, run
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.summary import Summary
from dualoptim.finetune import finetune
from dualoptim.memory_plan import plan
from dualoptim.models.checkpoint import discard_after
from dualoptim.models.launch import start_accelerator
from dualoptim.on_the_way import goodness
from dualoptim.report import ReportArgs, report

QUICK = {"eval": True, "eval_rows": 2, "max_new_tokens": 3}
DROPOUT = {"use_lora": True, "lora_dropout": 0.3}


def same_weights(one, other):
    first, second = state_of(one), state_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("more", [{}, DROPOUT], ids=["whole", "dropout"])
def test_training_goes_on_at_the_same_bits(tiny, tmp_path, more):
    plain = arguments(tiny, tmp_path / "plain", "dual-adamw", max_steps=6, save_every=3, **more)
    run(plain)
    run(dataclasses.replace(plain, output_dir=str(tmp_path / "way"), eval_every=2, save_model_every=4, **QUICK))
    same_end(tmp_path / "plain", tmp_path / "way")
    steps = tmp_path / "way" / FOLDER / "steps"
    found = sorted(str(path.relative_to(steps)) for path in steps.glob("*/*"))
    assert found == ["step-2/eval", "step-4/eval", "step-4/model"]  # what follows the last step is there anyway
    run(dataclasses.replace(plain, output_dir=str(tmp_path / "four"), max_steps=4))
    assert same_weights(tmp_path / "four" / FOLDER / "model", steps / "step-4" / "model")
    args = EvalArgs(model=str(steps / "step-4" / "model"), data="demo", eval_rows=2, max_new_tokens=3)
    again = evaluate(dataclasses.replace(args, output_dir=str(tmp_path / "again")))
    measured = Summary.read(steps / "step-4" / "eval" / "summary.json")
    for name, scores in measured.sets.items():
        assert again.sets[name] == pytest.approx(scores, abs=1e-5)


def test_a_killed_run_measures_again_what_follows_its_checkpoint(tiny, tmp_path):
    changes = {"max_steps": 7, "save_every": 3, "eval_every": 2, "save_model_every": 2, "keep_best": 1.0, **QUICK}
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", **changes)
    run(args)
    stop_and_resume(args, tmp_path, 5)
    same_end(tmp_path / "whole", tmp_path / "parts")
    for step in (2, 4, 6):
        one, two = (tmp_path / part / FOLDER / "steps" / f"step-{step}" for part in ("whole", "parts"))
        assert same_weights(one / "model", two / "model")
        assert (one / "eval" / "summary.json").read_text() == (two / "eval" / "summary.json").read_text()
    best = [json.loads((tmp_path / part / FOLDER / "best.json").read_text()) for part in ("whole", "parts")]
    assert best[0] == best[1]
    task = tmp_path / "parts" / FOLDER
    measured = {step: Summary.read(task / "steps" / f"step-{step}" / "eval" / "summary.json") for step in (2, 4, 6)}
    on_the_way = max(measured, key=lambda step: goodness(measured[step], 1.0))
    assert same_weights(task / "best", task / "steps" / f"step-{on_the_way}" / "model")
    assert (best[0]["step"], best[0]["folder"]) in ((7, "model"), (on_the_way, "best"))
    report(ReportArgs(runs=(str(tmp_path / "whole"),), output_dir=str(tmp_path / "page")))
    assert "by optimizer steps" in (tmp_path / "page" / "report.md").read_text()
    discard_after(task, 4)
    assert sorted(path.name for path in (task / "steps").iterdir()) == ["step-2", "step-4"]
    run(
        dataclasses.replace(args, output_dir=str(tmp_path / "parts"), overwrite=True, eval_every=0, keep_best=None, max_steps=1)
    )
    assert not (task / "best.json").exists()


def test_epochs_are_counted_in_their_steps(tiny, tmp_path):
    """20 forget rows in batches of 8 are 3 forget steps an epoch, with two retain steps each."""
    args = arguments(tiny, tmp_path / "out", "dual-adamw", num_epochs=3, max_steps=0, gradient_accumulation_steps=2)
    run(dataclasses.replace(args, eval_every_epochs=1, save_model_every_epochs=2, **QUICK))
    steps = tmp_path / "out" / FOLDER / "steps"
    found = sorted(str(path.relative_to(steps)) for path in steps.glob("*/*"))
    per_epoch = len(records(tmp_path / "out")) // 3
    assert found == sorted([f"step-{per_epoch}/eval", f"step-{2 * per_epoch}/eval", f"step-{2 * per_epoch}/model"])
    assert per_epoch == 9
    taught = {"model": str(tiny), "data": "demo", "splits": ("forget05",), "batch_size": 8, "num_epochs": 3}
    one = FinetuneArgs(**taught, save_model_every_epochs=1, output_dir=str(tmp_path / "taught"))
    finetune(one)
    saved = sorted(path.parent.name for path in (tmp_path / "taught" / "steps").glob("*/model"))
    assert len(saved) == 2
    last = int(saved[-1].removeprefix("step-"))
    two = finetune(
        dataclasses.replace(one, save_model_every_epochs=0, num_epochs=3, max_steps=last, output_dir=str(tmp_path / "two"))
    )
    assert same_weights(two.model, tmp_path / "taught" / "steps" / saved[-1] / "model")
    finetune(dataclasses.replace(one, overwrite=True, save_model_every_epochs=0, max_steps=1))
    assert not (tmp_path / "taught" / "steps").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval_every": 2, "eval_every_epochs": 1},
            "--eval-every-epochs 1 takes the place of --eval-every 2; give one of them",
        ),
        ({"save_model_every": 2, "save_model_every_epochs": 1}, "takes the place of --save-model-every 2; give one of them"),
        ({"eval_every_epochs": -1}, "--eval-every-epochs -1 is out of range; give 0 or more"),
        ({"eval_every_epochs": 0.5}, "0.5 has the wrong type; give int"),
        ({"eval_every_epochs": 1, "eval": False}, "--eval-every-epochs 1 has no effect with --no-eval"),
        ({"keep_best": 0.5}, "--keep-best 0.5 chooses among models that are measured on the way; give --eval-every"),
        ({"eval_every_epochs": 1, "mia_gradnorm": True}, "which --eval-every cannot take between steps; drop one of them"),
    ],
)
def test_what_makes_no_sense_together_is_refused(changes, message):
    with pytest.raises(InputError) as error:
        UnlearnArgs(**changes)
    assert message in str(error.value)
    assert UnlearnArgs(eval_every_epochs=1, keep_best=0.5).measures_on_the_way


def summary(forget, retain, utility):
    return Summary(sets={"forget": {"probability": forget}, "retain": {"probability": retain}}, model_utility=utility)


def test_the_best_is_the_most_useful_of_those_that_have_forgotten():
    models = {
        "knows all": summary(0.9, 0.9, 0.9),
        "has forgotten": summary(0.1, 0.8, 0.6),
        "is useless": summary(0.0, 0.1, 0.1),
        "utility not measured": summary(0.1, 0.7, None),
    }

    def best(level):
        return max(models, key=lambda name: goodness(models[name], level))

    assert best(1.0) == "knows all"
    assert best(0.5) == "utility not measured"
    del models["utility not measured"]
    assert best(0.5) == "has forgotten"
    assert best(0.05) == "is useless"
    del models["is useless"]
    assert best(0.05) == "has forgotten", "none is below: the one that knows the least"


def test_the_plan_has_the_evaluation_between_steps(tiny):
    args = arguments(tiny, "out", "dual-adamw", eval=True, eval_every=2)
    planned = plan(args, start_accelerator(args))
    by_name = {phase.name: phase.device for phase in planned.phases}
    assert by_name["midway"].optimizer == by_name["train"].optimizer
    assert by_name["midway"].activations == by_name["evaluate"].activations
    without = plan(dataclasses.replace(args, eval_every=0), start_accelerator(args))
    assert "midway" not in [phase.name for phase in without.phases]


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_two_processes_measure_and_save_on_the_way(config, tiny, tmp_path):
    if config == "zero3":
        pytest.importorskip("deepspeed")
    plain = arguments(tiny, tmp_path / "plain", "dual-adamw", batch_size=2, max_steps=3, threads=1)
    way = {"output_dir": str(tmp_path / "way"), "eval_every": 2, "save_model_every": 2, "keep_best": 0.5, **QUICK}
    launch(config, {"runs": [dataclasses.asdict(args) for args in (plain, dataclasses.replace(plain, **way))]})
    assert records(tmp_path / "plain") == records(tmp_path / "way")
    task = tmp_path / "way" / FOLDER
    assert same_weights(tmp_path / "plain" / FOLDER / "model", task / "model")
    assert (task / "steps" / "step-2" / "eval" / "summary.json").is_file()
    assert same_weights(task / "best", task / "steps" / "step-2" / "model")
    assert json.loads((task / "best.json").read_text())["step"] in (2, 3)
