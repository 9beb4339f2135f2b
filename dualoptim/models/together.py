"""Let the processes of a launch wait for each other where one works on the host alone, and agree on ending.

Such waits go through a group of their own, which has patience for a day's half: the main process writes, hashes, uploads, and
all exchange answers to lm-eval. All else, the steps of training first, keeps torch's patience (10 minutes with NCCL, 30 with
gloo), so that a process that hangs is found out.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from dualoptim import signals
from dualoptim.errors import Stopped
from dualoptim.models.adapter import without_adapter

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


def of_all(accelerator: Accelerator, value: T) -> list[T]:
    """Give all processes the `value` of each, in the order of their numbers."""
    values = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(values, value, group=_beside(dist.group.WORLD))
    return values


def largest(accelerator: Accelerator, value: int) -> int:
    """Give all processes the largest `value` of any of them."""
    found = torch.tensor(value)
    if accelerator.num_processes > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_beside(dist.group.WORLD))
    return int(found)


def stop_together(accelerator: Accelerator, where: str) -> None:
    """End all processes if a signal has asked any of them to.

    Raises:
        Stopped: saying `where` the command was.
    """
    if signum := largest(accelerator, signals.asked()):
        raise Stopped(signum, where, agreed=True)


@contextlib.contextmanager
def in_step(accelerator: Accelerator, model: Any, call: Callable[[], object]) -> Iterator[None]:
    """Have all processes call a model equally often within, whose parameters lie among them and are gathered in every call.

    Before each of its calls a process tells the others that it goes on. Who has no more of its own takes part by `call`, whose
    result nobody reads, until all are done. Nothing else may be collective within.
    """
    running: list[object] = []

    def tell(called: object, *_: object) -> None:
        if not running:
            largest(accelerator, True)
        running.append(called)

    def told(*_: object) -> None:
        running.pop()

    # generation calls the model within an adapter, all else the adapter, whose versions differ in how they call that model
    outer = {model, without_adapter(model)}
    hooks = [one.register_forward_pre_hook(tell, prepend=True) for one in outer]
    hooks += [one.register_forward_hook(told, always_call=True) for one in outer]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while largest(accelerator, False):
        call()
