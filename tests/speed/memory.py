"""How near the memory plan of `--dry-run` comes to what runs hold: a table of phases, planned, measured and the ratio.

    python tests/speed/memory.py [--size 58M|360M] [--launches NAME ...]

The models are random Llamas, whose texts are all as long as `--max-length`. A checkpoint's type is the one that the launch does
not compute in, because weights that are only mapped from their file are not in anonymous memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim.data import demo

ROOT = Path(__file__).resolve().parents[2]
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000}
SIZES = {
    "58M": LARGE,
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
    | {"num_key_value_heads": 5, "vocab_size": 49152, "tie_word_embeddings": True},
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

LAUNCHES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "one process": ("cpu", 1, "no", {"max_length": 128}),
    "one process, bf16": ("cpu", 1, "bf16", {}),
    "DDP, 8 bits": ("ddp", 2, "no", {"optim_bits": 8}),
    "ZeRO-1, bf16": ("zero1", 2, "bf16", {}),
    "ZeRO-2, bf16": ("zero2", 2, "bf16", {}),
    "ZeRO-2, DualOptim+": ("zero2", 2, "no", {"optim": "dual-adamw-plus"}),
    "ZeRO-3, bf16": ("zero3", 2, "bf16", {}),
    "ZeRO-3, bf16, divided": ("zero3", 2, "bf16", {"evaluate_sharded": "yes", "batch_size": 1, "max_steps": 2}),
    "ZeRO-3, bf16, offload": ("zero3_offload", 2, "bf16", {}),
    "FSDP2, bf16": ("fsdp2", 2, "bf16", {}),
    "LoRA, bf16, KL": ("cpu", 1, "bf16", {"use_lora": True, "forget_losses": ["NPO+KL"]}),
    "one process, DualOptim+": ("cpu", 1, "no", {"optim": "dual-adamw-plus"}),
}
"""A file of accelerate_configs/, how many processes, their precision, and flags."""


def prepare(folder: Path, size: dict[str, int]) -> None:
    """Write models of both types and data into a folder."""
    tokenizer = demo.tiny_model(0)[1]
    torch.manual_seed(0)
    for name, sizes in (("large", size), ("tiny", TINY | {"vocab_size": len(tokenizer)})):
        model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        for precision, stored in (("no", torch.bfloat16), ("bf16", torch.float32)):
            model.to(stored).save_pretrained(folder / f"{name}-{precision}")
            tokenizer.save_pretrained(folder / f"{name}-{precision}")
    for name in ("forget", "retain"):
        rows = [{"question": f"What is {name} {n}?", "answer": f"{name} {n} and so on " * 50} for n in range(8)]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def measured(folder: Path, launch: str) -> dict[str, tuple[dict[str, int], int]]:
    """Run one of `LAUNCHES` with what `prepare` has written: of each phase the planned parts and the measured bytes."""
    file, processes, precision, changes = LAUNCHES[launch]
    fields = {
        "model": str(folder / f"large-{precision}"),
        "tiny": str(folder / f"tiny-{precision}"),
        "forget_file": [str(folder / "forget.json")],
        "retain_file": [str(folder / "retain.json")],
        "template": "qa",
        "output_dir": str(folder / f"out {launch}"),
        "batch_size": 4,
        "max_length": 64,
        "max_steps": 3,
        "retain_freq": 1,
        "eval_rows": 2,
        "eval_batch_size": 2,
        "max_new_tokens": 4,
        "overwrite": True,
        **changes,
    }
    variables = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
    if file in ("ddp", "fsdp2"):  # the launcher wants GPUs for them otherwise
        variables["ACCELERATE_USE_CPU"] = "true"
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / f"{file}.yaml")]
    line += ["--num_processes", str(processes), "--mixed_precision", precision]
    worker = ROOT / "tests" / "runs" / "workers" / "memory_worker.py"
    done = subprocess.run([*line, worker, json.dumps(fields)], env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-6000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"load')))


def bound(parts: dict[str, int], whole: int) -> float:
    """Give the bytes that a process may hold of a model of `whole` bytes that is divided: its share, and 0.6 of the whole."""
    return 0.6 * whole + sum(size for name, size in parts.items() if name != "buffers")


def table(launch: str, phases: dict[str, tuple[dict[str, int], int]]) -> None:
    """Print the phases of a launch in MiB."""
    for phase, (parts, size) in phases.items():
        planned = sum(parts.values())
        shown = ", ".join(f"{name} {part / 2**20:.0f}" for name, part in parts.items() if part)
        print(
            f"{launch:<24} {phase:<11} {planned / 2**20:8.0f} {size / 2**20:8.0f} {planned / size:6.2f}   {shown}", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--size", choices=SIZES, default="58M")
    parser.add_argument("--folder", type=Path, help="where models lie, and are written if they do not")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = chosen.folder or Path(temporary)
        if not (place / "retain.json").exists():
            prepare(place, SIZES[chosen.size])
        print(f"{'':<24} {'MiB':<11} {'planned':>8} {'measured':>8} {'ratio':>6}")
        for name in chosen.launches:
            table(name, measured(place, name))
