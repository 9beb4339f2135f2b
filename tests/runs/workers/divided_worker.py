"""Started by `accelerate launch` in a test: what a model says whole, and with its parameters divided among the processes.

The one argument is JSON: {"model": folder, "output": folder, "rows": evaluation sets of [question or null, answer, ...]}.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from distributed_worker import switch_fsdp_on

from dualoptim import EvalArgs
from dualoptim.config.cli import main
from dualoptim.data.rows import Row
from dualoptim.evaluation.generation import sample
from dualoptim.evaluation.measure import measure
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def divide(model, accelerator):
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                stack = []

                def pre(m, a, own=own, stack=stack):
                    stack.append(deepspeed.zero.GatheredParameters(own))
                    stack[-1].__enter__()

                def post(m, a, o, stack=stack):
                    stack.pop().__exit__(None, None, None)

                module.register_forward_pre_hook(pre)
                module.register_forward_hook(post)


def work(spec):
    args = EvalArgs(model=spec["model"], data="demo", max_new_tokens=16, eval_batch_size=4)
    accelerator = start_accelerator(args)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        switch_fsdp_on(accelerator)
    loaded = load_model(args, accelerator)
    sets = {name: [Row(*row) for row in rows] for name, rows in spec["rows"].items()}
    output = Path(spec["output"])
    for way in ("whole", "divided"):
        if way == "divided":
            divide(loaded.model, accelerator)
            loaded = dataclasses.replace(loaded, divided=True)
            type(loaded).weights_hash = lambda self: "x"
            torch.manual_seed(0)
        scoring = ScoringPass(loaded, args)
        measure(scoring, sets, output / way)
        drawn = sample(scoring, sets["forget"], 2, 1.0)
        if accelerator.is_main_process:
            (output / way / "sample.json").write_text(json.dumps(drawn))
    print(f"process {accelerator.process_index} done", flush=True)


if __name__ == "__main__":
    sys.argv, spec = sys.argv[:1], json.loads(sys.argv[1])
    main(EvalArgs, lambda _: work(spec))
