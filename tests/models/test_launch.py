"""What a launch needs around a run: a place to write to, a model prepared for training, and FSDP as it is needed here."""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from support import ROOT, WORKERS, environment, examples

from dualoptim import InputError, UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.models import current
from dualoptim.models import launch as launching
from dualoptim.models.current import Current
from dualoptim.models.launch import is_sharded, output_folder, prepared, release, say, start_accelerator, training
from dualoptim.models.load import load_model


@pytest.fixture
def args(tiny, tmp_path):
    return UnlearnArgs(model=str(tiny), data="demo", output_dir=str(tmp_path / "out"))


def test_threads_of_a_cpu_are_those_that_are_asked_for(args):
    before = torch.get_num_threads()
    try:
        start_accelerator(dataclasses.replace(args, threads=1))
        assert torch.get_num_threads() == 1
        start_accelerator(args)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_steps_on_the_host_take_its_cores_beside_a_gpu(args, deepspeed_file, monkeypatch):
    """`accelerate launch` sets OMP_NUM_THREADS=1 for every launch; nothing else than these steps needs more there."""
    monkeypatch.setattr(launching.Accelerator, "device", torch.device("cuda", 0))
    monkeypatch.setattr(launching.os, "sched_getaffinity", lambda _: range(6))
    before, found = torch.get_num_threads(), []
    try:
        for offload in ({}, {"offload_optimizer": {"device": "cpu"}}):
            deepspeed_file(zero_optimization={"stage": 3, **offload})
            monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
            torch.set_num_threads(1)
            start_accelerator(args)
            found.append(torch.get_num_threads())
            AcceleratorState._reset_state()
        assert found == [1, 3]
    finally:
        torch.set_num_threads(before)


def test_a_folder_is_named_and_not_created(args, tmp_path, monkeypatch):
    accelerator = start_accelerator(args)
    assert output_folder(args, accelerator) == tmp_path / "out"
    assert not (tmp_path / "out").exists()
    nameless = dataclasses.replace(args, output_dir=None)
    assert re.fullmatch(r"runs/\d{8}-\d{6}", str(output_folder(nameless, accelerator)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder(dataclasses.replace(args, output_dir="~/x"), accelerator) == tmp_path / "x"


def test_only_the_main_process_speaks(args, capsys):
    accelerator = start_accelerator(args)
    say(accelerator, "once")
    assert capsys.readouterr().out == "once\n"
    say(type("Other", (), {"is_main_process": False})(), "never")
    assert capsys.readouterr().out == ""


def test_training_prepares_a_model_and_release_gives_it_back(args):
    accelerator = start_accelerator(args)
    loaded = load_model(args, accelerator)
    assert not is_sharded(accelerator)
    assert prepared(loaded) is loaded.model
    args = dataclasses.replace(args, gradient_checkpointing=True)
    with training(loaded, args, kind_of(args).build(args)) as engine:
        assert engine.model.training
        assert loaded.model.is_gradient_checkpointing
        assert prepared(loaded) is engine.model
        assert accelerator.unwrap_model(engine.model) is loaded.model
        assert loaded.model.get_input_embeddings().sparse  # tied: the head brings the dense gradient
        assert len(accelerator._optimizers) == 1
    assert not loaded.model.is_gradient_checkpointing
    assert not loaded.model.get_input_embeddings().sparse
    assert prepared(loaded) is engine.model  # to be saved
    release(loaded)
    assert (accelerator._models, accelerator._optimizers) == ([], [])
    assert prepared(loaded) is loaded.model
    with torch.no_grad():
        loaded.model(loaded.batch(examples(2)).input_ids)


def test_a_second_training_of_a_model_computes_in_the_launchs_16_bits_too(sixteen_bits, args):
    """Relearning at several rates trains the same model again and again."""
    loaded, seen = load_model(args, start_accelerator(args)), []
    loaded.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, given, found: seen.append(found.dtype))
    for _ in range(3):
        seen.clear()
        with training(loaded, args, kind_of(args).build(args)) as engine:
            engine.model(loaded.batch(examples(2)).input_ids)
        release(loaded)
        assert seen == [torch.bfloat16]


def test_an_interrupted_training_leaves_the_model_as_it_was_set(args):
    loaded = load_model(args, start_accelerator(args))
    with pytest.raises(KeyboardInterrupt), training(loaded, args, kind_of(args).build(args)):
        raise KeyboardInterrupt
    assert not loaded.model.get_input_embeddings().sparse
    release(loaded)


def test_the_cache_of_the_device_is_emptied_when_nothing_holds_the_engine_any_more(monkeypatch):
    """Emptied before, it would keep all that ZeRO held, in large pieces, while a whole model is loaded."""
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2), optimizer=SimpleNamespace(masters=torch.ones(4)))
    masters, alive = weakref.ref(engine.optimizer.masters), []

    class Launch:
        distributed_type, _models = DistributedType.DEEPSPEED, [engine]

        def unwrap_model(self, model):
            return model.module

        def free_memory(self):
            self._models.clear()

    monkeypatch.setattr(launching, "clear_device_cache", lambda garbage_collection: alive.append(masters()))
    release(SimpleNamespace(accelerator=Launch(), model=engine.module))
    assert alive == [None]


def test_a_model_that_is_dropped_is_gone_before_the_cache_is_emptied(args, monkeypatch):
    accelerator, alive = start_accelerator(args), []
    models = Current(accelerator)
    model = weakref.ref(models.get(args, "train").model)
    monkeypatch.setattr(current, "clear_device_cache", lambda garbage_collection: alive.append((gc.collect(), model())))
    models.drop()
    assert [one for _, one in alive] == [None]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("version", "printed"),
    [("2", "sums in torch.float32, whole models: True"), ("1", "the launch asks for FSDP version 1; set fsdp_version: 2")],
)
def test_fsdp_settings_that_would_spoil_a_run(version, printed):
    """bf16 sums, empty models on all processes but the first, and the first version, from which parameters come flattened."""
    script = """
import os
import torch
from distributed_worker import UnlearnArgs, main, start_accelerator, switch_fsdp_on
from dualoptim import InputError

def check(args):
    switch_fsdp_on(start_accelerator(args))
    plugin = start_accelerator(args).state.fsdp_plugin
    whole = not plugin.cpu_ram_efficient_loading and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"
    try:
        start_accelerator(UnlearnArgs(optim_bits=8))
    except InputError as error:
        print(error)
    try:
        start_accelerator(UnlearnArgs(use_lora=True, load_in_4bit=True))
    except InputError as error:
        print(error)
    try:
        start_accelerator(UnlearnArgs(sam_rho=0.05))
    except InputError as error:
        print(error)
    print(f"sums in {plugin.mixed_precision_policy.reduce_dtype}, whole models: {whole}")

torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
main(UnlearnArgs, check)
"""
    settings = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": version}
    settings |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{WORKERS}"}
    if version == "2":
        settings["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**environment("fsdp2"), **settings}, timeout=120
    )
    assert done.returncode == (0 if version == "2" else 2)
    assert printed in done.stdout + done.stderr
    moved = "--sam-rho 0.05 moves whole weights, which ZeRO and FSDP divide; launch with ddp.yaml, or drop it"
    for refused in ("--optim-bits 8 cannot divide its states under FSDP", "--load-in-4bit keeps weights in", moved):
        assert (refused in done.stdout) == (version == "2")
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------- the environment of a launch


@pytest.fixture
def fresh():
    """Let Accelerate read the environment anew, before and after a test."""

    def clear():
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()

    clear()
    yield
    clear()


@pytest.mark.parametrize("steps", [None, "1", "4"])
def test_a_variable_of_the_launch_divides_no_gradient(steps, args, fresh, monkeypatch):
    if steps:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    accelerator = start_accelerator(args)
    assert accelerator.gradient_accumulation_steps == 1
    weight = torch.nn.Parameter(torch.ones(3))
    accelerator.backward((weight * 2).sum())
    assert weight.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("precision", ["fp16", "FP16", "fp8", "half"])
def test_a_precision_that_skips_steps_is_refused(precision, args, fresh, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(InputError, match=rf"^the launch asks for --mixed_precision {precision.lower()}; give bf16, or no$"):
        start_accelerator(args)


@pytest.mark.parametrize("version", ["missing", "0.18.9"])
def test_deepspeed_that_is_missing_or_too_old_is_asked_for_in_one_line(version, args, fresh, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(launching, "is_deepspeed_available", lambda: version != "missing")
    if version != "missing":
        monkeypatch.setattr(launching, "compare_versions", lambda name, _, floor: (name, floor) == ("deepspeed", "0.19"))
    with pytest.raises(InputError, match=r"^the launch asks for DeepSpeed 0\.19 or newer, .* pip install 'deepspeed>=0\.19'$"):
        start_accelerator(args)


STAGE = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}


@pytest.fixture
def deepspeed_file(fresh, tmp_path, monkeypatch):
    """Write the DeepSpeed file of a launch."""
    pytest.importorskip("deepspeed")

    def write(**sections):
        told = {name: section for name, section in (STAGE | sections).items() if section}
        (tmp_path / "ds.json").write_text(json.dumps(told))
        settings = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    yield write
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "has a section 'optimizer', .*; remove it there"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "has a section 'scheduler', .*; remove it there"),
        ({"fp16": {"enabled": True}}, 'enables fp16; give "bf16": {"enabled": true} there instead'),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "offloads the optimizer to NVMe, where no checkpoint finds it; give cpu there",
        ),
        ({"zero_optimization": None}, None),
    ],
)
def test_a_deepspeed_file_that_cannot_be_is_refused_at_once(sections, said, args, deepspeed_file, tmp_path):
    deepspeed_file(**sections)
    with pytest.raises(InputError, match=f"^the launch's DeepSpeed file {said}$" if said else "^Accelerate refuses the launch"):
        start_accelerator(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_in_4_bits_are_not_divided(stage, args, deepspeed_file):
    deepspeed_file(zero_optimization={"stage": stage})
    args = dataclasses.replace(args, use_lora=True, load_in_4bit=True)
    if stage == 2:
        start_accelerator(args)
        return
    with pytest.raises(InputError, match=r"^--load-in-4bit keeps .*, which ZeRO-3 .* cannot divide; launch with ddp.yaml or"):
        start_accelerator(args)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sam_rho": 0.05}, "--sam-rho 0.05 moves whole weights, which ZeRO and FSDP divide; launch with ddp.yaml"),
        ({"average_cycles": 0.9}, "--average-cycles 0.9 keeps a mean .*, and ZeRO lays .*; launch with ddp.yaml or fsdp2.yaml"),
    ],
)
def test_what_takes_weights_as_they_are_is_refused_where_zero_lays_them_otherwise(stage, changes, said, args, deepspeed_file):
    deepspeed_file(zero_optimization={"stage": stage})
    with pytest.raises(InputError, match=f"^{said}"):
        start_accelerator(dataclasses.replace(args, **changes))


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_a_deepspeed_file_of_a_tutorial_gets_what_it_lacks(name, args, deepspeed_file):
    deepspeed_file(
        **{name: {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 3}, "train_batch_size": 32},
        gradient_accumulation_steps=4,
        gradient_clipping=1.0,
    )
    config = start_accelerator(args).state.deepspeed_plugin.deepspeed_config
    assert config[name] == {"enabled": True, "check_grad_overflow": True}
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    given = (config["gradient_accumulation_steps"], config["gradient_clipping"], config["train_batch_size"])
    assert given == (1, 0.0, "auto")
