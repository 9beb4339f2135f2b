"""Started by `accelerate launch` in a test: how many float32 masters differ from the loaded weights, as JSON.

Before any step, and after one at rate zero. The one argument is the folder of a model, as JSON.
"""

import json
import os
import sys

import torch
from distributed_worker import switch_fsdp_on
from transformers import AutoModelForCausalLM

from dualoptim import UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.config.optimizers import kind_of
from dualoptim.models.launch import prepared, release, start_accelerator, training
from dualoptim.models.load import load_model
from dualoptim.models.masters import trained


def differing(loaded, weights) -> dict[str, int]:
    """Count elements of the masters that are not those of `weights`, and those that 16 bits would round."""
    masters = trained(loaded, prepared(loaded), weights.keys())
    pairs = [(master.float().cpu().clone(), weights[name]) for name, master in masters]
    return {
        "tensors": len(pairs),
        "differing": sum(int((master != weight).sum()) for master, weight in pairs),
        "rounded": sum(int((weight.bfloat16().float() != weight).sum()) for _, weight in pairs),
    }


def work(folder: str) -> None:
    args = UnlearnArgs(model=folder, data="demo", eval=False)
    accelerator = start_accelerator(args)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        switch_fsdp_on(accelerator)
    loaded = load_model(args, accelerator)
    names = [name for name, _ in loaded.model.named_parameters()]
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # DeepSpeed's own may be rounded already
    weights = {name: weight for name, weight in stored.named_parameters() if name in names}
    with training(loaded, args, kind_of(args).build(args)) as engine:
        found = {"divided": loaded.divided, "prepared": differing(loaded, weights)}
        engine.use_phase("forget", 0.0)
        ids = torch.arange(8)[None]
        with engine.micro_batch(is_last=True):
            engine.backward(engine.model(input_ids=ids, labels=ids).loss)
        engine.step(0.0, torch.zeros(0))
        found["stepped"] = differing(loaded, weights)
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    release(loaded)


if __name__ == "__main__":
    sys.argv, spec = sys.argv[:1], json.loads(sys.argv[1])
    main(UnlearnArgs, lambda _: work(spec))
