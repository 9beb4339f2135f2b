"""Launches of two GPUs: `pytest -m multigpu`."""

import json

import pytest
import torch
from speed.gpu import apart
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.multigpu


@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_two_processes_train_as_one_and_save_what_loads(bench, config):
    (plain,) = bench.runs(bench.fields(batch_size=8))
    (one,) = bench.runs(bench.fields(batch_size=4), config=config, processes=2)
    assert apart(one["losses"], plain["losses"]) < 2e-2
    weights = AutoModelForCausalLM.from_pretrained(one["models"][0], dtype=torch.float32).state_dict()
    others = AutoModelForCausalLM.from_pretrained(plain["models"][0], dtype=torch.float32).state_dict()
    assert max(float((weights[name] - others[name]).abs().mean()) for name in others) < 1e-5  # a step is 1e-5 at most


def test_shares_that_are_empty_take_steps(bench):
    narrow = bench.fields(use_lora=True, lora_rank=1, optim="dual-adamw-plus", max_update=1.0)
    (one,) = bench.runs(narrow, config="fsdp2", processes=2)
    assert one["error"] is None
    assert len(one["losses"]) == 6


def test_one_process_that_fails_ends_all(bench, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "Who?", "answer": "She."}))
    rest = ["train_unlearn.py", "--model", str(bench.model()), "--forget-file", str(rows), "--forget-losses", "NPO+none"]
    done = bench.launch("ddp", "bf16", *rest, "--learning-rates", "1e9", "--output-dir", str(tmp_path / "out"), processes=2)
    assert done.returncode != 0
