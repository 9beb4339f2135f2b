"""Let the processes of a launch wait for each other where one works on the host alone, and agree on ending.

Such waits go through a group of their own, which has patience for a day's half: the main process writes, hashes, uploads, and
runs lm-eval. All else, the steps of training first, keeps torch's patience (10 minutes with NCCL, 30 with gloo), so that a
process that hangs is found out.
"""

import functools
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dualoptim import signals
from dualoptim.errors import Stopped

_PATIENCE = timedelta(hours=12)

T = TypeVar("T")


@functools.cache
def _beside(world: Any) -> Any:
    """Make the group for waits on the host, once for each group of all processes."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def wait(accelerator: Accelerator) -> None:
    """Wait until all processes are here; there must be one between work of the main one alone and the next step of all."""
    if accelerator.num_processes > 1:
        dist.barrier(group=_beside(dist.group.WORLD))


def shared(accelerator: Accelerator, value: T) -> T:
    """Give all processes the main one's `value`."""
    values = [value]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(values, src=0, group=_beside(dist.group.WORLD))
    return values[0]


def stop_together(accelerator: Accelerator, where: str) -> None:
    """End all processes if a signal has asked any of them to.

    Raises:
        Stopped: saying `where` the command was.
    """
    signum = torch.tensor(signals.asked())
    if accelerator.num_processes > 1:
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=_beside(dist.group.WORLD))
    if signum:
        raise Stopped(int(signum), where, agreed=True)
