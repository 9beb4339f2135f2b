"""The memory plan of a run: against what small runs hold, and as a user reads it."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from speed.memory import LARGE, measured, prepare
from support import ROOT, arguments
from transformers import AutoModelForCausalLM, LlamaConfig

from dualoptim import InputError, UnlearnArgs, run
from dualoptim.config.optimizers import kind_of
from dualoptim.memory_plan import advise, advise_bf16, describe, division_of, dry_run, plan
from dualoptim.method.groups import decay_groups
from dualoptim.models.launch import start_accelerator
from dualoptim.models.launches import Machine
from dualoptim.models.launches import planned as planned_phases
from dualoptim.models.measured import GIB
from dualoptim.models.memory import Division
from dualoptim.models.shapes import at_worst, demand_of, empty_model, shape_of


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


def phase(planned, name):
    (found,) = (one for one in planned.phases if one.name == name)
    return found


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw"])
def test_one_process_holds_what_the_plan_says(tiny, optim):
    args = UnlearnArgs(model=str(tiny), data="demo", optim=optim)
    planned = phase(plan(args, start_accelerator(args)), "first step").device
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
@pytest.mark.parametrize("name", ["ZeRO-3, bf16", "FSDP2, bf16"])
def test_two_processes_hold_what_the_plan_says(name, tmp_path):
    """Nearer where models are larger (tests/speed/README.md): some 40 MiB are of the libraries' own."""
    if "ZeRO" in name:
        pytest.importorskip("deepspeed")
    prepare(tmp_path, LARGE | {"num_hidden_layers": 4, "vocab_size": 16000})
    found = {phase: sum(parts.values()) / held for phase, (parts, held) in measured(tmp_path, name).items()}
    assert found["first step"] == pytest.approx(1, abs=0.15), found
    assert found["train"] == pytest.approx(1, abs=0.2), found


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
    assert planned.lengths.micro_batch == planned.lengths.scored == 4 * 2 * 500  # AP reads two texts a row
    assert phase(planned, "train").device.optimizer == 16 * planned.shape.total
    out = capsys.readouterr().out
    assert "6,738,415,616 parameters" in out
    assert "(every text is taken to have --max-length 500, for the data's are not known: --model ./llama-2-7b: " in out
    assert all(f"\n  {one.name} " in out for one in planned.phases)
    assert "100.41" in out
    assert ("does not fit: " in out) is not planned.fits
    assert [path.name for path in config_only.parent.rglob("*")] == ["llama-2-7b", "config.json"]
    assert planned.fits is (planned.largest.total <= planned.machine.host)


@pytest.mark.parametrize("pair", ["NPO+GD", "IDK+AP"])
def test_a_micro_batch_is_as_long_as_the_longest_that_the_run_takes(pair, tiny, tmp_path):
    changes = {"forget_losses": (pair,), "gradient_accumulation_steps": 1, "max_steps": 7, "num_epochs": 3}
    args = arguments(tiny, tmp_path, "dual-adamw", **changes)
    lengths = plan(args, start_accelerator(args)).lengths
    (task,) = run(args).tasks
    assert lengths.micro_batch == max(record["tokens"] for record in task.log)
    assert lengths.scored < lengths.micro_batch < 4 * args.max_length
    assert not lengths.why_not
    assert len(lengths.steps) == 1
    assert f"{len(task.log)} steps, " in lengths.steps[0]


def on_gpus(planned, device, processes=2, host=240):
    """The same run on GPUs of so many GiB."""
    place = Machine(processes, device * GIB, host * GIB, half=True, on_cuda=True)
    return dataclasses.replace(planned, machine=place)


def test_what_does_not_fit_is_said_with_what_would(config_only):
    args = UnlearnArgs(model=str(config_only), dry_run=True)
    planned = plan(args, start_accelerator(args))
    many = dataclasses.replace(planned, lengths=dataclasses.replace(planned.lengths, steps=("one",) * 8))
    assert describe(many, args).count("\n  one") == 6
    assert "\n  and 2 more such\n" in describe(many, args)
    assert on_gpus(planned, 200).fits
    full = on_gpus(planned, 80)
    assert not full.fits
    assert describe(full, args).splitlines()[-1].startswith("does not fit: 151.31 of 80.00 GiB of the GPU, ")
    said = advise(full, args).splitlines()
    assert said[0] == "what would fit, best first:"
    assert said[1:] == [
        "  zero2.yaml --gradient-checkpointing --optim-bits 8",
        "  zero3_offload.yaml",
        "  ddp.yaml --gradient-checkpointing --use-lora",
        "  zero2.yaml, with --num_processes 4 on as many such devices",
        "  dualoptim launch-file NAME prints where such a file lies, for accelerate launch --config_file",
    ]


def test_adapters_are_planned_on_what_lies_frozen(config_only):
    """In a 16-bit launch the base has two bytes a weight; in 4 bits all but embeddings and output head have half a byte."""
    place, division = Machine(1, 24 * GIB, 64 * GIB, half=True, on_cuda=True), Division(half=True, on_cuda=True)
    total, around = 6_738_415_616, 2 * 32000 * 4096
    for flags, expected in (({}, 2 * total), ({"load_in_4bit": True}, 2 * around + 0.516 * (total - around))):
        args = UnlearnArgs(model=str(config_only), use_lora=True, **flags)
        shape = shape_of(empty_model(args))
        weights = {
            one.name: one.device.weights for one in planned_phases(demand_of(args, at_worst(args, "")), shape, division, place)
        }
        assert weights["train"] == pytest.approx(expected + 4 * shape.trainable, rel=0.002)
        assert weights["evaluate"] == pytest.approx(expected + 2 * shape.trainable, rel=0.002)


def test_fsdp_is_a_launch_that_the_plan_knows(config_only):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace())
    launch = {"distributed_type": DistributedType.FSDP, "num_processes": 8, "mixed_precision": "bf16", "state": state}
    found = division_of(SimpleNamespace(**launch, device=torch.device("cuda")))
    assert found == Division(processes=8, fsdp=True, half=True, on_cuda=True)


def test_the_demo_and_the_command(tmp_path):
    command = [str(ROOT / "train_unlearn.py"), "--dry-run", "--output-dir", str(tmp_path / "out")]
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "demo: 1,279,840 parameters" in out
    assert (
        "a micro-batch has at most 119 tokens, 52 of them scored; the evaluation's longest text has 146 with its answer" in out
    )
    assert "\nfits: " in out
    columns = "weights gradients optimizer buffers activations device host".split()  # those with anything in them
    (head,) = [line for line in out.splitlines() if line.split() == columns]
    assert len(head) <= 80
    assert not (tmp_path / "out").exists()


def test_bf16_is_advised_where_the_cpu_has_units_for_it(monkeypatch):
    here = Machine(1, 8 * GIB, 8 * GIB, half=False, on_cuda=False)
    for flags, said in (("fpu avx512f", ""), ("fpu amx_bf16 avx512_bf16", "avx512_bf16"), ("fp asimd bf16", "(bf16)")):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: f"flags\t: {flags}\n")
        assert bool(said) == bool(advise_bf16(here))
        assert said in advise_bf16(here)
        for started, script in (
            ("runs/train_unlearn.py", "runs/train_unlearn.py"),
            ("dualoptim unlearn", "-m dualoptim unlearn"),
        ):
            monkeypatch.setattr("sys.argv", [started, "--dry-run"])
            launch = f"  accelerate launch --mixed_precision bf16 {script}, and the same flags"
            assert not said or launch == advise_bf16(here).splitlines()[-1]
        assert advise_bf16(dataclasses.replace(here, half=True)) == advise_bf16(dataclasses.replace(here, on_cuda=True)) == ""


def test_a_gguf_file(gguf):
    args = UnlearnArgs(model=str(gguf), dry_run=True)
    assert plan(args, start_accelerator(args)).shape.total == 134_515_008


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"call dualoptim\.memory_plan\.dry_run"):
        run(UnlearnArgs(dry_run=True))
    with pytest.raises(InputError, match=r"no config\.json"):
        dry_run(UnlearnArgs(model=str(tmp_path), dry_run=True))
