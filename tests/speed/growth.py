"""How time and memory of whole runs grow: with the data, the vocabulary, the tasks, and the parameters of the model.

Parts `growth` and `sizes` of speed.py.
"""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import Contestant
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim.data import demo

SIZES: dict[str, tuple[int, int]] = {"10M": (256, 6), "40M": (512, 10), "135M": (768, 17), "360M": (1024, 27)}
"""Width and depth of random Llamas with a vocabulary of 16,384 and tied embeddings."""


def written(folder: Path, **size: Any) -> int:
    """Save a random Llama that reads the demo's texts; returns how many parameters it has."""
    _, tokenizer = demo.tiny_model(0)
    model = LlamaForCausalLM(LlamaConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def growth(threads: int) -> None:
    """Whole runs of a small model: how seconds and peak memory grow with the data, the vocabulary and the tasks."""

    def run(
        folder: Path, rows: int = 200, words: int = 40, vocabulary: int = 4096, tasks: int = 1
    ) -> tuple[float, float, float]:
        """Seconds after the imports, and MB of memory at its peak and of stored references on disk."""
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        written(folder / "model", vocab_size=vocabulary, **shape)
        for name in ("forget", "retain"):
            lines = [
                {"question": f"{name} {n}?", "answer": f"{n}" + " the" * words, "task_id": n % tasks + 1}
                for n in range(rows * tasks)
            ]
            (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        args = {
            "model": str(folder / "model"),
            "forget_file": str(folder / "forget.jsonl"),
            "retain_file": str(folder / "retain.jsonl"),
            "task_list": list(range(1, tasks + 1)),
            "output_dir": str(folder / "out"),
            "forget_losses": ["NPO+KL"],
            "retain_freq": 1,
            "num_epochs": 1,
            "batch_size": 8,
            "eval": False,
            "threads": threads,
        }
        started = time.time()
        one = Contestant("run", args)
        while one.step():
            pass
        one.end()
        stored = sum(path.stat().st_size for path in (folder / "out" / "reference").rglob("*.safetensors"))
        return time.time() - started - one.first["spent"]["imports"], one.last["peak"] / 1e6, stored / 1e6

    print("\ngrowth of NPO+KL, a model of two layers: seconds after the imports, peak memory, stored references")
    variants: dict[str, tuple[str, tuple[int, ...]]] = {
        "rows": ("rows", (200, 600, 1800)),
        "tokens a row": ("words", (40, 120, 360)),
        "vocabulary": ("vocabulary", (4096, 16384, 65536)),
        "tasks": ("tasks", (1, 2, 4)),
    }
    for title, (name, values) in variants.items():
        found = []
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                found.append(run(Path(folder), **{name: value}))
        texts = [
            f"{value}: {s:.1f} s, {peak:.0f} MB, {stored:.1f} MB"
            for value, (s, peak, stored) in zip(values, found, strict=True)
        ]
        exponents = [
            exponent(values, numbers) for numbers in ([s for s, _, _ in found], [peak - kept for _, peak, kept in found])
        ]
        print(
            f"  {title:<14} {'; '.join(texts)}; exponents: time {exponents[0]:.2f}, memory beyond those {exponents[1]:.2f}",
            flush=True,
        )


def sizes(threads: int) -> None:
    """Steps of NPO+GD over the same texts by models of 10 to 360 million parameters."""
    found: list[list[float]] = []
    print("\ngrowth with the parameters, eight texts a step, both states in float32")
    print(f"  {'':<5} {'parameters':>11} {'s a step':>9} {'peak, GB':>9} {'bytes a parameter':>18} {'s to the first step':>20}")
    for name, (width, depth) in SIZES.items():
        with tempfile.TemporaryDirectory() as place:
            shape = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": depth}
            parameters = written(
                Path(place) / "model",
                vocab_size=16384,
                num_attention_heads=width // 64,
                tie_word_embeddings=True,
                **shape,
            )
            args = {
                "model": f"{place}/model",
                "data": "demo",
                "output_dir": f"{place}/out",
                "forget_losses": ["NPO+GD"],
                "learning_rates": [1e-6],
                "retain_freq": 1,
                "batch_size": 8,
                "max_steps": 100,
                "eval": False,
                "threads": threads,
            }
            one = Contestant("run", args)
            for _ in range(6):
                one.step()
            one.end()
        seconds = statistics.median(seconds for _, seconds, _ in one.times[2:])
        until = one.first["start"] - one.first["step"]
        found.append([float(parameters), seconds, one.last["peak"], until])
        gigabytes, bytes_each = one.last["peak"] / 1e9, one.last["peak"] / parameters
        print(f"  {name:<5} {parameters:>11,} {seconds:>9.3f} {gigabytes:>9.2f} {bytes_each:>18.1f} {until:>20.1f}", flush=True)
    counts, *columns = zip(*found, strict=True)
    titles = ("time of a step", "peak memory", "seconds to the first step")
    slopes = (f"{title} {exponent(counts, list(values)):.2f}" for title, values in zip(titles, columns, strict=True))
    print(f"  exponents: {', '.join(slopes)}", flush=True)


def exponent(sizes: tuple[float, ...], values: list[float]) -> float:
    """The slope of a straight line through log(value) against log(size), by least squares."""
    x, y = ([math.log(v) for v in numbers] for numbers in (sizes, values))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
