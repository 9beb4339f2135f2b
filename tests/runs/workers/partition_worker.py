"""Started by `accelerate launch` in a test: planned and measured bytes of the first process, as one line of JSON.

The one argument is the folder of a model, as JSON.
"""

import json
import sys

import torch

from dualoptim import UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.config.optimizers import kind_of
from dualoptim.data import demo
from dualoptim.memory_plan import plan
from dualoptim.method.groups import decay_groups
from dualoptim.models.launch import start_accelerator


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


def measure(folder: str) -> None:
    """Weights, masters and optimizer state, after two steps under ZeRO."""
    args = UnlearnArgs(model=folder, data="demo")
    accelerator = start_accelerator(args)
    planned = plan(args, accelerator)
    raw = demo.tiny_model(0)[0]
    optimizer = kind_of(args).build(args)(decay_groups(raw, 0.01))
    model, _ = accelerator.prepare(raw, optimizer)
    ids = torch.arange(20)[None]
    for _ in range(2):
        model.backward(model(input_ids=ids, labels=ids).loss)
        model.step()
    zero = model.optimizer
    masters = zero.fp32_partitioned_groups_flat if planned.division.stage == 3 else zero.single_partition_of_fp32_groups
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    measured = {
        "weights": size(weights),
        "masters": size(masters),
        "optimizer": size(value for state in optimizer.state.values() for value in state.values()),
    }
    accelerator.print(json.dumps([{name: getattr(planned.device, name) for name in measured}, measured]))
    accelerator.wait_for_everyone()
    accelerator.free_memory(model, optimizer)  # a process that leaves with its engine alive aborts now and then


if __name__ == "__main__":
    folder = json.loads(sys.argv.pop())
    main(UnlearnArgs, lambda _: measure(folder))
