"""Give a device its work and read its results so that neither it nor the host waits: what a step copies, casts and adds up."""

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor


def sent(value: Any, device: torch.device) -> Any:
    """Move a tensor to a device, which copies it while the host goes on; also those of a dictionary, and nothing else."""
    if isinstance(value, dict):
        return {name: sent(one, device) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":  # what a GPU holds cannot be pinned
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def added_up(accelerator: Accelerator, numbers: list[int]) -> list[int]:
    """Add up whole numbers over all processes; a single one asks its device nothing."""
    if accelerator.num_processes == 1:
        return numbers
    found: list[int] = accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "sum").tolist()
    return found


def casting_once(device: torch.device, micro_batches: int) -> AbstractContextManager[Any]:
    """Cast weights to 16 bits once for several micro-batches, between which none changes.

    Autocast forgets its casts where its outermost region ends. This one casts nothing by itself.
    """
    return torch.autocast(device.type, enabled=False) if micro_batches > 1 else contextlib.nullcontext()


def clipped(accelerator: Accelerator, parameters: Sequence[Any], max_norm: float) -> Tensor:
    """Clip gradients to a norm (0: not at all), and give the one that they had, on their device: [1]."""
    if max_norm or accelerator.distributed_type == DistributedType.FSDP:
        norm = accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
    else:  # to clip to infinity would multiply each of them by one
        norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).reshape(1)
