"""The memory plan of a run: against what small runs hold, and as a user reads it."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from support import ROOT, launch
from transformers import AutoModelForCausalLM, LlamaConfig

from dualoptim import InputError, UnlearnArgs, run
from dualoptim.config.optimizers import kind_of
from dualoptim.memory_plan import describe, dry_run, plan
from dualoptim.method.groups import decay_groups
from dualoptim.models.launch import start_accelerator


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw"])
def test_one_process_holds_what_the_plan_says(tiny, optim):
    args = UnlearnArgs(model=str(tiny), data="demo", optim=optim)
    planned = plan(args, start_accelerator(args)).device
    model = AutoModelForCausalLM.from_pretrained(tiny)
    optimizer = kind_of(args).build(args)(decay_groups(model, 0.01))
    ids = torch.arange(20)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    state = size(value for state in optimizer.state.values() for value in state.values())
    assert planned.weights == pytest.approx(size(model.parameters()), rel=0.05)
    assert planned.gradients == pytest.approx(size(p.grad for p in model.parameters()), rel=0.05)
    assert planned.optimizer == pytest.approx(state, rel=0.05)


@pytest.mark.launch
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_hold_what_the_plan_says(stage, tiny):
    pytest.importorskip("deepspeed")
    done = launch(f"zero{stage}", str(tiny), script="partition_worker.py", precision="bf16")
    planned, measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert planned.keys() == measured.keys()
    for name in planned:
        assert planned[name] == pytest.approx(measured[name], rel=0.05), name


@pytest.fixture
def config_only(tmp_path):
    """A folder with nothing but a config.json, of the shape of Llama-2-7b."""
    LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ).save_pretrained(tmp_path / "llama-2-7b")
    return tmp_path / "llama-2-7b"


def test_a_configuration_is_enough_and_nothing_is_written(config_only, monkeypatch, capsys):
    monkeypatch.chdir(config_only.parent)
    planned = dry_run(UnlearnArgs(model="./llama-2-7b", dry_run=True, forget_losses=("ME+GD", "IDK+AP")))
    assert planned.shape.total == 6_738_415_616
    assert planned.tokens == 4 * 2 * 500  # AP reads two texts a row
    assert planned.device.optimizer == 16 * planned.shape.total
    out = capsys.readouterr().out
    assert "6,738,415,616 parameters" in out
    assert "32-bit 100.41" in out
    assert ("does not fit: " in out) is not planned.fits
    assert [path.name for path in config_only.parent.rglob("*")] == ["llama-2-7b", "config.json"]
    assert planned.fits is (planned.needed <= planned.capacity)


def test_what_does_not_fit_is_said(config_only):
    args = UnlearnArgs(model=str(config_only), dry_run=True)
    planned = plan(dataclasses.replace(args, optim_bits=8), start_accelerator(args))
    assert planned.device.optimizer == planned.optimizer_by_bits[8] < planned.optimizer_by_bits[32] / 3
    small = dataclasses.replace(planned, capacity=planned.needed - 1)
    assert not small.fits
    assert dataclasses.replace(planned, capacity=planned.needed).fits
    assert describe(small, args).splitlines()[-1].startswith("does not fit: ")


def test_the_demo_and_the_command(tmp_path):
    command = [str(ROOT / "train_unlearn.py"), "--dry-run", "--output-dir", str(tmp_path / "out")]
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "demo: 1,319,520 parameters" in out
    assert out.splitlines()[-1].startswith("fits: ")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file(gguf):
    args = UnlearnArgs(model=str(gguf), dry_run=True)
    assert plan(args, start_accelerator(args)).shape.total == 134_515_008


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"call dualoptim\.memory_plan\.dry_run"):
        run(UnlearnArgs(dry_run=True))
    with pytest.raises(InputError, match=r"no config\.json"):
        dry_run(UnlearnArgs(model=str(tmp_path), dry_run=True))
