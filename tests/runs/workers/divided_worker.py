"""Started by `accelerate launch` in tests: what a model says whole, and divided among the processes.

The one argument is JSON: {"model": folder, "output": folder, "rows": evaluation sets of [question or null, answer, ...]},
or {"evaluation": EvalArgs fields} for a whole one.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from distributed_worker import switch_fsdp_on

from dualoptim import EvalArgs
from dualoptim.config.cli import main
from dualoptim.data.rows import Row
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.generation import sample
from dualoptim.evaluation.measure import measure
from dualoptim.evaluation.scoring import ReferenceLosses, ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def work(spec: dict) -> None:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in spec.get("evaluation", {}).items()}
    args = EvalArgs(**fields)
    accelerator = start_accelerator(args)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        switch_fsdp_on(accelerator)
    if fields:
        evaluate(args)
    else:
        both_ways(spec, accelerator)
    print(f"process {accelerator.process_index} done", flush=True)


def both_ways(spec: dict, accelerator: Accelerator) -> None:
    args = EvalArgs(model=spec["model"], data="demo", max_new_tokens=12, eval_batch_size=2)
    sets = {name: [Row(*row) for row in rows] for name, rows in spec["rows"].items()}
    for choice in ("no", "yes"):
        args = dataclasses.replace(args, evaluate_sharded=choice)
        loaded = load_model(args, accelerator, "measure")
        assert loaded.divided == (choice == "yes")
        assert loaded.answering.together == "refilled"  # of two texts at once
        scoring = ScoringPass(loaded, args, membership=True)
        losses = {name: scoring.losses(name, rows) for name, rows in sets.items()}
        folder = Path(spec["output"]) / choice
        measure(dataclasses.replace(scoring, reference=ReferenceLosses("its own", losses)), sets, folder)
        drawn = sample(scoring, sets["forget"], 2, 1.0)
        if accelerator.is_main_process:
            (folder / "drawn.jsonl").write_text("\n".join(json.dumps({"drawn": one}) for one in drawn))
        del loaded, scoring


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main(EvalArgs, lambda _: work(spec), ["--model", "its own", "--data", "demo"])
