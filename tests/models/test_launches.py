"""Which launch a run fits: the table of accelerate_configs/README.md, and that the arithmetic knows the files there."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from support import ROOT
from transformers import LlamaConfig

from dualoptim import UnlearnArgs
from dualoptim.models.launches import LAUNCHES, Machine, choices, enough_processes, launches, planned
from dualoptim.models.measured import GIB
from dualoptim.models.memory import Division
from dualoptim.models.shapes import at_worst, demand_of, empty_model, shape_of

CONFIGS = ROOT / "accelerate_configs"

LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8}
MODELS = {
    "Llama-3.2-1B": {**LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "heads": 32, "tied": True},
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
    "Llama-3-8B": {**LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "heads": 32},
    "Llama-2-13B": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "heads": 40},
    "Llama-3-70B": {**LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64},
}
"""Published numbers of the models, whose checkpoints are bfloat16."""

SIZES = {"Llama-3.2-1B": 1_235_814_400, "Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248, "Llama-3-70B": 70_553_706_496}

MACHINES = {"1 x 24 GB": (1, 24, 64), "1 x 80 GB": (1, 80, 240), "2 x 80 GB": (2, 80, 240), "8 x 80 GB": (8, 80, 240)}
"""Processes, GiB of a device, and of the host for each process."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("configs")
    for name, numbers in MODELS.items():
        numbers = {"vocab_size": 32000, **numbers}
        layers, heads, tied = numbers.pop("layers"), numbers.pop("heads"), numbers.pop("tied", False)
        shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "tie_word_embeddings": tied}
        LlamaConfig(**numbers, **shape, dtype="bfloat16").save_pretrained(folder / name)
    return folder


def machine(processes=1, device=80, host=240):
    return Machine(processes, device * GIB, host * GIB, half=True, on_cuda=True)


def demanded(args):
    return demand_of(args, at_worst(args, ""))


def cell(args, place, shapes) -> str:
    """The best choice, and the next one where that is slower or changes flags."""
    found = list(choices(args, place, shapes, at_worst(args, "")))
    plain = found and not found[0].changes and found[0].launch != "zero3_offload"
    return " or ".join(f"`{one}`".replace(".yaml", "") for one in found[: 1 if plain else 2]) or "no"


def test_the_readme_says_which_launch_holds_which_model(folders):
    lines = [f"| | {' | '.join(MACHINES)} |", "|---" * (1 + len(MACHINES)) + "|"]
    for name in MODELS:
        args, shapes = UnlearnArgs(model=str(folders / name)), {}
        lines.append(f"| {name} | {' | '.join(cell(args, machine(*sizes), shapes) for sizes in MACHINES.values())} |")
    table = "\n".join(lines)
    assert table in (CONFIGS / "README.md").read_text(encoding="utf-8"), f"the table of the README should be\n{table}"


@pytest.mark.parametrize("name", SIZES)
def test_the_shapes_are_those_of_the_models(name, folders):
    assert shape_of(empty_model(UnlearnArgs(model=str(folders / name)))).total == SIZES[name]


def test_the_arithmetic_knows_the_files():
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS.glob("*.yaml")}
    assert files.pop("cpu")["distributed_type"] == "NO"  # as single_gpu
    assert set(files) == set(LAUNCHES)
    for name, file in files.items():
        zero, known = file.get("deepspeed_config", {}), LAUNCHES[name]
        assert known.fsdp == (file["distributed_type"] == "FSDP")
        assert known.deepspeed == (file["distributed_type"] == "DEEPSPEED")
        assert known.stage == zero.get("zero_stage", 0)
        assert known.offload == (zero.get("offload_optimizer_device") == "cpu")


def test_a_faster_launch_comes_before_one_that_divides_more(folders):
    args = UnlearnArgs(model=str(folders / "Llama-3-8B"))
    first = next(choices(args, machine(processes=8), {}, at_worst(args, "")))
    assert (first.launch, first.changes) == ("zero2", {})
    shape = shape_of(empty_model(args))
    for name, fits in (("ddp", False), ("zero1", False), ("zero2", True), ("zero3", True), ("fsdp2", True)):
        division = dataclasses.replace(LAUNCHES[name], processes=8, half=True, on_cuda=True)
        place = machine(processes=8)
        assert place.holds(planned(demanded(args), shape, division, place)) == fits, name


def test_what_is_refused_is_not_proposed(folders):
    args, shapes = UnlearnArgs(model=str(folders / "Llama-2-7B")), {}
    for place in (machine(*sizes) for sizes in MACHINES.values()):
        for choice in choices(args, place, shapes, at_worst(args, "")):
            assert not (choice.changes.get("optim_bits") == 8 and choice.launch == "fsdp2")
            assert not ("load_in_4bit" in choice.changes and choice.launch in ("zero3", "fsdp2", "zero3_offload"))
    on_cpu = dataclasses.replace(machine(host=8), on_cuda=False)
    assert not [choice for choice in choices(args, on_cpu, shapes, at_worst(args, "")) if "load_in_4bit" in choice.changes]


def test_enough_processes_are_found_for_what_does_not_fit(folders):
    args = UnlearnArgs(model=str(folders / "Llama-2-13B"))
    processes, choice = enough_processes(args, machine(), {}, at_worst(args, ""))
    division = dataclasses.replace(LAUNCHES[choice.launch], processes=processes // 2, half=True, on_cuda=True)
    fewer = machine(processes=processes // 2)
    assert not fewer.holds(planned(demanded(args), shape_of(empty_model(args)), division, fewer))


def test_the_whole_model_is_measured_where_it_takes_half_of_a_device(folders):
    args = UnlearnArgs(model=str(folders / "Llama-2-13B"))
    shape, division = shape_of(empty_model(args)), Division(processes=8, deepspeed=True, stage=3, half=True, on_cuda=True)

    def weights(device, **changes):
        changed = dataclasses.replace(args, **changes)
        phases = planned(demanded(changed), shape, division, machine(processes=8, device=device))
        return next(phase.device.weights for phase in phases if phase.name == "evaluate")

    whole = 2 * shape.total
    assert weights(80) == whole
    assert weights(24) == -(-whole // 8)
    assert weights(80, evaluate_sharded="yes") == -(-whole // 8)
    assert weights(24, evaluate_sharded="no") == whole


def test_a_run_that_takes_whole_weights_is_offered_no_launch_that_divides_them():
    args = UnlearnArgs(sam_rho=0.05)
    assert [launches(args, *place) for place in ((1, False), (4, False), (4, True))] == [["single_gpu"], ["ddp"], []]


def test_a_run_that_averages_weights_is_offered_no_zero():
    args = UnlearnArgs(average_cycles=0.9)
    assert [launches(args, *place) for place in ((4, False), (4, True))] == [["ddp", "fsdp2"], []]
    assert demanded(args).moments.wide == demanded(UnlearnArgs()).moments.wide + 1, "the mean takes as much as a moment"
