"""Launches in 16 bits: two bytes a weight of what is measured or frozen, and one precision from before to the attacks."""

import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from support import FOLDER, arguments, launch, state_of

from dualoptim import EvalArgs, InputError, run, target
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.summary import Summary
from dualoptim.models import current, load
from dualoptim.report import ReportArgs, report

UNCHANGED = 2 / 0.1 * math.log(2)
"""NPO's loss, with its published beta, of a model that is its reference."""

ROWS = {"eval_rows": 3, "max_new_tokens": 4}
MEASURED = {"eval": True, "max_steps": 2, **ROWS}


@pytest.fixture
def loads(monkeypatch):
    """The use and the precision of every model that a run loads, of which no two are in memory."""
    found, models, original = [], [], load.load_model

    def counted(args, accelerator, use="train", quantization=None):
        gc.collect()
        assert [model() for model in models if model() is not None] == []
        loaded = original(args, accelerator, use, quantization)
        models.append(weakref.ref(loaded.model))
        found.append((use, loaded.precision))
        return loaded

    monkeypatch.setattr(current, "load_model", counted)
    return found


def test_a_float32_launch_loads_a_model_once(tiny, tmp_path, loads):
    run(arguments(tiny, tmp_path, "dual-adamw", forget_losses=("NPO+KL",), task_list=(1, 2), **MEASURED))
    assert loads == [("measure", "float32")]


def test_what_is_measured_has_two_bytes_a_weight_and_what_trains_four(sixteen_bits, tiny, tmp_path, loads):
    args = arguments(tiny, tmp_path / "run", "adamw", forget_losses=("NPO+KL",), task_list=(1, 2), **MEASURED)
    earlier, task = run(args).tasks
    half, whole = ("measure", "bfloat16"), ("train", "float32")
    assert loads == [half, whole, half, whole, half]
    assert {weight.dtype for weight in state_of(task.model).values()} == {torch.float32}
    # the reference was scored as training computes: nothing has been unlearned at the first step
    first = task.log[0]
    assert first["forget_loss"] == pytest.approx(UNCHANGED, abs=1e-3)
    assert first["retain_loss"] == pytest.approx(0, abs=1e-5)
    # after the first task is before the second; after the second is what the saved model scores
    assert task.before["sets"]["real_authors"] == earlier.after["sets"]["real_authors"]
    again = evaluate(EvalArgs(model=str(task.model), data="demo", output_dir=str(tmp_path / "again"), task=2, **ROWS))
    assert again["sets"]["forget"] == task.after["sets"]["forget"]
    assert again["precision"] == task.after["precision"] == "bfloat16"


def test_an_adapter_trains_in_float32_on_a_base_of_two_bytes(sixteen_bits, tiny, tmp_path, loads):
    args = arguments(tiny, tmp_path, "adamw", forget_losses=("NPO+KL",), use_lora=True, **MEASURED)
    task = run(args).tasks[0]
    assert loads == [("measure", "bfloat16")]  # which serves both
    first = task.log[0]
    assert first["forget_loss"] == pytest.approx(UNCHANGED, abs=1e-3)
    assert first["retain_loss"] == pytest.approx(0, abs=1e-5)
    assert {weight.dtype for weight in state_of(task.model).values()} == {torch.float32}


def test_attacks_measure_in_the_precision_of_what_they_are_compared_with(sixteen_bits, tiny, tmp_path, monkeypatch):
    seen, original = [], target.measure

    def measured(scoring, *rest):
        seen.append((scoring.loaded.precision, "forward" in vars(scoring.loaded.model)))  # weights, and Accelerate's products
        return original(scoring, *rest)

    monkeypatch.setattr(target, "measure", measured)
    flags = {
        "quantize": (8,),
        "relearn": 2,
        "relearn_every": 1,
        "relearn_lr": 1e-2,
        "paraphrase": True,
        "sample": 1,
        "mia_gradnorm": True,
    }
    summary = evaluate(EvalArgs(model=str(tiny), data="demo", output_dir=str(tmp_path), **flags, **ROWS))
    assert seen == [("bfloat16", False)] * 4  # other questions, fewer bits, two steps of relearning
    assert summary["attacks"]["relearn"]["curve"][1]["sets"]["forget"] != summary["sets"]["forget"]
    assert 0 <= summary["privacy"]["mia_gradnorm"] <= 1


def test_precisions_are_not_mixed_without_a_word(sixteen_bits, tiny, tmp_path, monkeypatch, capsys):
    """A run goes on in the precision in which it began; a report says so, and what is compared with a retain-only model."""
    args = arguments(tiny, tmp_path / "half", "dual-adamw", **MEASURED)
    run(args)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    message = r"^--resume: task1 was begun with --mixed_precision bf16, and this launch has no; give it --mixed_precision bf16$"
    with pytest.raises(InputError, match=message):
        run(dataclasses.replace(args, resume="newest"))
    logs = str(tmp_path / "half" / FOLDER)
    run(dataclasses.replace(args, output_dir=str(tmp_path / "whole"), retain_logs=logs))
    assert f"--retain-logs {logs} is in bfloat16, and this launch measures in float32" in capsys.readouterr().out
    summary = Summary.read(tmp_path / "whole" / FOLDER / "eval" / "summary.json")
    assert (summary.precision, summary.retain_only.precision) == (None, "bfloat16")
    folder = report(ReportArgs(runs=(str(tmp_path / "half"), str(tmp_path / "whole")), output_dir=str(tmp_path / "report")))
    text = (folder / "report.md").read_text()
    assert "Not all were measured in the same precision: half/" in text
    assert "task1 in bfloat16, whole/" in text


@pytest.mark.launch
@pytest.mark.parametrize(
    "config", ["ddp", "zero3", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("zero1", "zero2", "fsdp2"))]
)
def test_the_reference_is_scored_as_training_computes(config, tiny, tmp_path):
    """Nothing has been unlearned at the first step, so that the model is its own reference."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    args = arguments(tiny, tmp_path, "adamw", forget_losses=("NPO+KL",), batch_size=2, max_steps=1)
    launch(config, {"runs": [dataclasses.asdict(args)]}, precision="bf16")
    folder = tmp_path / "NPO+KL_lr0.001" / "task1"
    (first,) = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert first["forget_loss"] == pytest.approx(UNCHANGED, abs=1e-3)
    assert first["retain_loss"] == pytest.approx(0, abs=1e-5)
