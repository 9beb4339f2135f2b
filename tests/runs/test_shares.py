"""ZeRO-3 and FSDP2 from load to save: no process ever holds the whole model, and what comes out is what one process makes."""

import dataclasses

import pytest
from speed.memory import SIZES, bound, measured, prepare
from support import FOLDER, RATE, arguments, difference, launch, records, state_of

from dualoptim import run

SIZE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8, "vocab_size": 2048}


def bounded(folder, size):
    """Make sure that no process holds more of a divided model than is said of it, and say what it held."""
    pytest.importorskip("deepspeed")
    prepare(folder, size)
    phases = measured(folder, "ZeRO-3, bf16, divided")
    whole = (folder / "large-bf16" / "model.safetensors").stat().st_size  # in float32
    print(f"MiB: whole {whole / 2**20:.0f}; bound, and held:")
    for name, (planned, size) in phases.items():
        # what DeepSpeed gathers, lays out and sends comes on top where an engine is made and where it computes
        most = bound(planned, whole) + (planned["buffers"] if name in ("prepare", "train") else 0)
        print(f"{name}: {most / 2**20:.0f}, {size / 2**20:.0f}")
        assert 0.2 * whole < size <= most, name


@pytest.mark.launch
def test_no_process_holds_the_whole_model(tmp_path):
    """Anonymous memory above what there was before loading: 0.6 of the float32 model, and what the plan says for a share."""
    bounded(tmp_path, SIZE | {"tie_word_embeddings": True})


@pytest.mark.campaign
def test_no_process_holds_the_whole_of_a_larger_model(tmp_path):
    """The same with 360 million parameters; 12 GB of memory and of disk."""
    bounded(tmp_path, SIZES["360M"])


REFERENCES = {"forget_losses": ("NPO+KL", "UNDIAL+GD"), "max_steps": 4}
CASES = {"references": REFERENCES, "adapter": {"use_lora": True, "max_steps": 6, "gradient_checkpointing": True}}


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_references_and_adapters_are_those_of_one_process(config, tiny, tmp_path):
    """The frozen head of KL, JSD and UNDIAL lies in shares; adapters are divided beside their base."""
    if config == "zero3":
        pytest.importorskip("deepspeed")
    runs = {name: arguments(tiny, tmp_path / name, "dual-adamw", **changes) for name, changes in CASES.items()}
    alone = {name: run(dataclasses.replace(args, output_dir=f"{args.output_dir}-alone")) for name, args in runs.items()}
    specs = [dataclasses.asdict(dataclasses.replace(args, batch_size=2)) for args in runs.values()]
    launch(config, {"runs": specs})
    for name, result in alone.items():
        for task in result.tasks:
            place = tmp_path / name / task.folder.parent.name / "task1"
            largest, mean = difference(state_of(place / "model"), state_of(task.model))
            assert largest <= 0.02 * RATE, (name, task.losses)
            assert mean <= 1e-4 * RATE, (name, task.losses)
    ours, other = records(tmp_path / "adapter"), records(tmp_path / "adapter-alone")
    assert [one["loss"] for one in ours] == pytest.approx([one["loss"] for one in other], rel=1e-4)
    assert (tmp_path / "adapter" / FOLDER / "model" / "adapter_config.json").is_file()
