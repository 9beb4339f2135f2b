"""Runs with low-rank adapters: what they save, that they learn, and that they go on where they stopped."""

import dataclasses
import shutil

import pytest
import torch
from support import arguments, same_end, state_of, stop_and_resume
from transformers import AutoModelForCausalLM

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.evaluate import evaluate


@pytest.fixture(scope="module")
def adapted(taught, tmp_path_factory):
    """Two tasks unlearned with an adapter, evaluated on a few rows."""
    args = UnlearnArgs(
        model=str(taught), data="demo", learning_rates=(2e-3,), use_lora=True, task_list=(1, 2), max_steps=20, eval_rows=4,
        retain_freq=1, output_dir=str(tmp_path_factory.mktemp("lora")),
    )  # fmt: skip
    return args, run(args)


def test_the_adapter_alone_is_saved_and_says_where_its_base_lies(adapted, taught):
    _, result = adapted
    model = result.tasks[0].model
    assert {path.name for path in model.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "prompt.json", "README.md", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all("lora_" in name for name in state_of(model))
    assert AutoModelForCausalLM.from_pretrained(model).config.model_type == "llama"


def test_the_adapter_forgets_and_the_next_task_goes_on_with_it(adapted):
    _, result = adapted
    first, second = result.tasks
    assert first.after["sets"]["forget"]["probability"] < 0.7 * first.before["sets"]["forget"]["probability"]
    one, two = state_of(first.model), state_of(second.model)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert first.log[0]["state_bytes_per_parameter"] == pytest.approx(16, abs=0.05)  # of what trains


def test_evaluation_and_training_take_an_adapter_folder(adapted, tmp_path):
    args, result = adapted
    last = result.tasks[1]
    merged = evaluate(EvalArgs(model=str(last.model), data="demo", task=2, eval_rows=4, output_dir=str(tmp_path / "eval")))
    for name, scores in merged["sets"].items():
        assert scores["probability"] == pytest.approx(last.after["sets"][name]["probability"], rel=1e-4)
    on = dataclasses.replace(args, model=str(last.model), task_list=(3,), eval=False, eval_rows=0, max_steps=2)
    with_adapter = run(dataclasses.replace(on, output_dir=str(tmp_path / "on")))
    assert state_of(with_adapter.tasks[0].model).keys() == state_of(last.model).keys()
    without = run(dataclasses.replace(on, use_lora=False, output_dir=str(tmp_path / "merged")))
    assert not any("lora_" in name for name in state_of(without.tasks[0].model))


def test_an_adapter_folder_without_weights_is_refused_in_one_line(adapted, tmp_path):
    args, result = adapted
    shutil.copytree(result.tasks[0].model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter: its adapter cannot be loaded .* give the whole folder") as error:
        run(dataclasses.replace(args, model=str(tmp_path / "adapter"), output_dir=str(tmp_path / "out")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(adapted, tmp_path):
    args, result = adapted
    again = run(
        dataclasses.replace(
            args, gradient_checkpointing=True, task_list=(1,), eval=False, eval_rows=0, output_dir=str(tmp_path / "out")
        )
    )
    for ours, reference in zip(again.tasks[0].log, result.tasks[0].log, strict=True):
        assert ours["grad_norm"] > 0
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_lora_resume_is_exact(tiny, tmp_path):
    changes = {"use_lora": True, "lora_dropout": 0.1, "save_every": 3, "max_steps": 9}
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", **changes)
    run(args)
    stop_and_resume(args, tmp_path, 4)
    same_end(tmp_path / "whole", tmp_path / "parts")
