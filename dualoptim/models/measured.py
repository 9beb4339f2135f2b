"""Choose how a launch that divides models measures them: divided among its processes, or whole on each of them."""

import os
from dataclasses import replace

import torch
from accelerate import Accelerator

from dualoptim.config.args import CommonArgs, MeasureArgs
from dualoptim.errors import InputError
from dualoptim.models.loaded import Loading
from dualoptim.models.sharding import can_divide, whole_shape

COMFORTABLE = 0.5
"""Share of a device's memory that a whole model may take: the rest is for activations, logits and the keys of its answers."""

GIB = 1024**3


def check_sharded(args: MeasureArgs, accelerator: Accelerator) -> None:
    """Make sure that the launch divides a model that is to be measured divided.

    Raises:
        InputError: if not.
    """
    if args.evaluate_sharded == "yes" and not can_divide(accelerator):
        raise InputError("--evaluate-sharded yes needs a launch that divides models; use zero3.yaml or fsdp2.yaml, or drop it")


def chosen(how: Loading, args: CommonArgs, accelerator: Accelerator, model: torch.nn.Module) -> Loading:
    """Choose for a model that can be divided by `--evaluate-sharded`; where that is auto by whether the whole fits comfortably.

    `model` may be divided, or have no weights (meta device).
    """
    asked = args.evaluate_sharded if isinstance(args, MeasureArgs) else "auto"
    return replace(how, divided=how.divided and rather_divided(asked, *_sizes(accelerator, model)))


def rather_divided(asked: str, whole: int, capacity: int) -> bool:
    """Tell what `--evaluate-sharded` stands for, by the bytes of the whole model and of a process's memory."""
    return asked == "yes" or (asked == "auto" and whole > COMFORTABLE * capacity)


def how_measured(how: Loading, args: CommonArgs, accelerator: Accelerator, model: torch.nn.Module) -> str:
    """Say in a line how a model is measured, and what the whole would take."""
    whole, capacity = (size / GIB for size in _sizes(accelerator, model))
    place = f"divided among {accelerator.num_processes} processes" if how.divided else "whole on every process"
    return f"{args.model} is measured {place}; the whole takes {whole:.3g} of {capacity:.3g} GiB (--evaluate-sharded)"


def _sizes(accelerator: Accelerator, model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of the whole model as it is measured, 2 a weight in 16-bit launches, and of this process's memory."""
    weights = sum(whole_shape(one).numel() for one in model.parameters())
    whole = weights * (2 if accelerator.mixed_precision == "bf16" else 4)
    return whole, memory_of(accelerator)[0]


def memory_of(accelerator: Accelerator) -> tuple[int, int]:
    """Give the bytes of this process's device and of its share of the host; without a GPU both are the same memory."""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = ram // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_properties(accelerator.device).total_memory, share
    return share, share
