"""Answers by vllm, of whose interface a stand-in takes the place: the same prompts, ends and answers, of the same weights."""

import dataclasses
import importlib.machinery
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from dualoptim import EvalArgs, InputError
from dualoptim.config import checks
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import vllm_answers


class LLM:
    """What vllm's class does, by the model in the folder that it is given."""

    made: ClassVar = []

    def __init__(self, model, **options):
        self.model, self.options, self.asked = AutoModelForCausalLM.from_pretrained(model), options, []
        LLM.made.append(self)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        outputs = []
        for prompt, settings in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            self.asked.append(ids)
            added = []
            while len(added) < settings.max_tokens and not set(added) & set(settings.stop_token_ids):
                added.append(int(self.model(torch.tensor([[*ids, *added]])).logits[0, -1].argmax()))
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(added))]))
        return outputs


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 80))
    monkeypatch.setattr(vllm_answers, "_engines", {})
    LLM.made.clear()
    return LLM.made


def rows_of(folder):
    return [json.loads(line) for path in sorted((folder / "eval").glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_vllm_gets_the_same_questions_and_gives_the_same_rows(stand_in, tiny, tmp_path, monkeypatch):
    """It is started once for all sets, on the weights that are scored; draws and attacks on these do not go through it.

    What a model knows word for word needs no generation, so that this one knows nothing.
    """
    common = {"model": str(tiny), "data": "demo", "eval_rows": 3, "max_new_tokens": 12, "sample": 2}
    evaluate(EvalArgs(**common, output_dir=str(tmp_path / "own")))
    monkeypatch.setattr("dualoptim.evaluate.check_generation", lambda *_: None)  # this machine may have no GPU
    args = EvalArgs(**common, output_dir=str(tmp_path / "vllm"), generate_with="vllm", paraphrase=True, quantize=(8,))
    evaluate(args)
    assert rows_of(tmp_path / "vllm") == rows_of(tmp_path / "own")
    draws = [(tmp_path / name / "eval/attacks/sample/forget.jsonl").read_text() for name in ("own", "vllm")]
    assert draws[0] == draws[1]
    (engine,) = stand_in
    assert engine.options["max_model_len"] == args.max_length + 12
    assert engine.options["dtype"] == "float32"
    assert engine.options["gpu_memory_utilization"] == pytest.approx(0.9 * 60 / 80)
    assert len(engine.asked) > 0
    weights = torch.nn.utils.parameters_to_vector(engine.model.parameters())
    assert torch.equal(weights, torch.nn.utils.parameters_to_vector(AutoModelForCausalLM.from_pretrained(tiny).parameters()))


def test_what_vllm_needs_is_told_in_one_line(taught, tmp_path, monkeypatch):
    args = EvalArgs(model=str(taught), data="demo", output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(checks, "_is_installed", lambda name: name != "vllm")
    with pytest.raises(InputError, match=r"^--generate-with vllm needs the package vllm; pip install vllm$"):
        dataclasses.replace(args, generate_with="vllm")
    monkeypatch.setattr(checks, "_is_installed", lambda _: True)
    for name in ("vllm", "compiled") if not torch.cuda.is_available() else ():
        with pytest.raises(InputError, match=f"^--generate-with {name} needs CUDA, and this run has none; drop the flag, or "):
            evaluate(dataclasses.replace(args, generate_with=name))
    several = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    with pytest.raises(InputError, match="is for one process, and this launch has 2; drop the flag, or add --num_processes 1"):
        vllm_answers.check_generation(dataclasses.replace(args, generate_with="vllm"), several)
    assert not (tmp_path / "out").exists()
