"""Started by `accelerate launch` in tests: several runs in one launch, described by one JSON argument.

{"runs": [UnlearnArgs fields, ...], "sub_group_size": N or null, "refused": whether each is expected to be,
"demo_recipe": changes of how the demo is taught}
"""

import contextlib
import gc
import json
import os
import sys
import warnings

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

from dualoptim import InputError, UnlearnArgs, run
from dualoptim.config.cli import main
from dualoptim.models.launch import start_accelerator
from dualoptim.taught import DEMO_RECIPE


def switch_fsdp_on(accelerator: Accelerator) -> None:
    """What Accelerate does for FSDP where there are GPUs, and leaves out on a CPU; later accelerators share this state."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads what `accelerate launch` made of the configuration
    if accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


@contextlib.contextmanager
def refusal(accelerator: Accelerator):
    """Go on after the one line that a run ends with, on all processes."""
    try:
        yield
    except InputError as error:
        print(f"process {accelerator.process_index} refused: {error}", flush=True)
        accelerator.free_memory()
    else:
        raise AssertionError("not refused")


def work(spec: dict) -> None:
    gc.freeze()  # what is imported stays, and need not be looked through after each run
    runs = [UnlearnArgs(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}) for fields in spec["runs"]]
    accelerator = start_accelerator(runs[0])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        switch_fsdp_on(accelerator)
    if spec.get("sub_group_size"):
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["sub_group_size"] = spec["sub_group_size"]
    DEMO_RECIPE.update(spec.get("demo_recipe", {}))
    for args in runs:
        with contextlib.ExitStack() as stack:
            if spec.get("refused"):
                stack.enter_context(refusal(accelerator))
            run(args)
    gc.collect()
    with warnings.catch_warnings():  # some objects warn when they are asked what they are
        warnings.simplefilter("ignore")
        left = sum(thing.numel() for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    print(f"{left} elements of tensors are left", flush=True)
    print(
        f"process {accelerator.process_index} of {accelerator.num_processes}: {accelerator.distributed_type} done", flush=True
    )


if __name__ == "__main__":
    sys.argv, spec = sys.argv[:1], json.loads(sys.argv[1])
    main(UnlearnArgs, lambda _: work(spec))
