"""Choose how a launch that divides models measures them: divided among its processes, or whole on each of them."""

import os

import torch
from accelerate import Accelerator

from dualoptim.config.args import MeasureArgs
from dualoptim.errors import InputError
from dualoptim.models.sharding import can_divide, whole_shape

COMFORTABLE = 0.5
"""Share of a device's memory that a whole model may take: the rest is for activations, logits and the keys of its answers."""

GIB = 1024**3


def is_measured_divided(args: MeasureArgs, accelerator: Accelerator, model: torch.nn.Module) -> bool:
    """Choose by `--evaluate-sharded`, and where that is auto by whether the whole model fits comfortably.

    `model` may be divided, or have no weights (meta device).

    Raises:
        InputError: if the launch divides no model.
    """
    if not can_divide(accelerator):
        if args.evaluate_sharded == "yes":
            raise InputError("--evaluate-sharded yes needs a launch that divides models; use zero3.yaml, or fsdp2.yaml")
        return False
    whole, capacity = _sizes(accelerator, model)
    return args.evaluate_sharded == "yes" or (args.evaluate_sharded == "auto" and whole > COMFORTABLE * capacity)


def how_measured(args: MeasureArgs, accelerator: Accelerator, model: torch.nn.Module) -> str:
    """Say the choice and why in a line, for a launch that has one."""
    divided = is_measured_divided(args, accelerator, model)
    whole, capacity = (size / GIB for size in _sizes(accelerator, model))
    how = f"divided among the {accelerator.num_processes} processes" if divided else "whole on every process"
    why = f"--evaluate-sharded {args.evaluate_sharded}; whole it takes {whole:.2f} of {capacity:.2f} GiB"
    return f"{args.model} is measured {how} ({why})"


def _sizes(accelerator: Accelerator, model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of the whole model as it is measured, 2 a weight in 16-bit launches, and of this process's memory."""
    weights = sum(whole_shape(one).numel() for one in model.parameters())
    whole = weights * (2 if accelerator.mixed_precision == "bf16" else 4)
    if accelerator.device.type == "cuda":
        return whole, torch.cuda.get_device_properties(accelerator.device).total_memory
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole, ram // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
