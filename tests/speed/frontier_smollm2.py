"""The same campaign for SmolLM2-135M and rows of TOFU: the best optimizer of each family, two pairs, two ratios of rates.

    accelerate launch --mixed_precision bf16 tests/speed/frontier_smollm2.py --data $TOFU --output-dir runs/smollm2-frontier

The model learns 40 rows to forget and 300 to keep, of which retain steps see 200; the other hundred are *unseen*. A run takes
some seconds on a GPU, and several share one (--at-once 8); on a core of a CPU five minutes.
"""

import functools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frontier
from frontier import Measuring, Part, Task
from gpu import write_model

from dualoptim import EvalArgs, FinetuneArgs
from dualoptim.data.own import open_source
from dualoptim.data.rows import Row
from dualoptim.finetune import finetune

FORGET, SEEN, UNSEEN, GENERAL = 40, 200, 100, 100
BEST = (1, 5, 9, 2, 0, 8, 4)
"""Contenders by their places, the most telling first."""
PARTS = [Part(pair, (seed,), BEST, start) for seed in (1, 2, 3) for pair, start in (("ME+GD", -10), ("NPO+GD", -8))]


@dataclass(frozen=True)
class SmolLM2(Task):
    """SmolLM2-135M, taught rows of TOFU from `data`."""

    levels: tuple[float, float] = (0.3, 0.05)
    known: float = 0.15
    relearn: tuple[tuple[int, float], ...] = ((20, 5e-5), (60, 1e-4))
    data: Path = Path("tofu")

    def prepare(self) -> None:
        """Write the files of rows, and teach the model all of them, and another one all but those to forget."""
        kept = _lines(self.data / "retain90.json")
        rows = {"forget": _lines(self.data / "forget01.json")[:FORGET], "seen": kept[:SEEN]}
        rows["unseen"] = kept[SEEN : SEEN + UNSEEN]
        general = [line for name in ("real_authors", "world_facts") for line in _lines(self.data / f"{name}_perturbed.json")]
        for name, lines in {**rows, "general": general[:: max(1, len(general) // GENERAL)]}.items():
            own = [{key: json.loads(line)[key] for key in ("question", "answer")} for line in lines]
            self.file(name).write_text("\n".join(map(json.dumps, own)))
        if not (self.folder / "smollm2").is_dir():
            write_model(self.folder / "smollm2", "small")
        taught = {self.folder: "full", self.folder / "retain_only": "retain"}
        with ProcessPoolExecutor(len(taught), multiprocessing.get_context("spawn")) as pool:
            for teaching in [pool.submit(self.teach, *one) for one in taught.items() if not (one[0] / "model").is_dir()]:
                teaching.result()

    def teach(self, folder: Path, splits: str) -> None:
        """Teach rows until their mean loss says that they are known."""
        recipe = {"learning_rate": 1e-4, "num_epochs": 12, "batch_size": 16, "target_loss": 0.1, "overwrite": True}
        files = {"forget_file": (str(self.file("forget")),), "retain_file": (str(self.file("seen")), str(self.file("unseen")))}
        model, splits_ = str(self.folder / "smollm2"), (splits,)
        finetune(FinetuneArgs(model=model, splits=splits_, template="qa", output_dir=str(folder), **files, **recipe))

    def file(self, name: str) -> Path:
        """Name a file of rows."""
        return self.folder / f"{name}.jsonl"

    def flags(self, part: Part) -> dict[str, Any]:
        rows = {"forget_file": (str(self.file("forget")),), "retain_file": (str(self.file("seen")),), "template": "qa"}
        return {"model": str(self.folder / "model"), "num_epochs": 2, **rows}

    def measuring(self, tasks: int) -> Measuring:
        files = {"forget_file": (str(self.file("forget")),), "retain_file": (str(self.file("seen")),), "template": "qa"}
        args = EvalArgs(model=str(self.folder / "model"), relearn=(1,), **files)
        asked = {name: [Row(**json.loads(line)) for line in _lines(self.file(name))] for name in frontier.COLUMNS[:4]}
        return Measuring(args, open_source(args), asked, self.relearn)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


if __name__ == "__main__":
    at = sys.argv.index("--data")
    data = Path(sys.argv.pop(at + 1)).resolve()
    del sys.argv[at]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    frontier.main(functools.partial(SmolLM2, data=data), PARTS)
