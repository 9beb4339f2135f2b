"""Size what ZeRO-3 holds beside its shares by the model: DeepSpeed's own sizes are for large ones, and hold others whole."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from dualoptim.models.memory import Division
from dualoptim.models.sharding import whole_shape, zero_of

BUCKET, LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000  # elements: DeepSpeed's own
LEAST = 2**23  # elements: below 16 MiB in 16 bits nothing is won, and messages become slow


def settled(division: Division, trainable: int, total: int) -> Division:
    """Choose the sizes that a launch does not give: DeepSpeed's own, and under ZeRO-3 less where the model is small.

    A quarter of the parameters may be whole at a time and an eighth is reduced at once, so that from four billion on both sizes
    are DeepSpeed's. An eighth of what a process has is updated at once, because gradients are copied for it.
    """

    def size(given: int, most: int, share: int) -> int:
        return given or (min(most, max(LEAST, share)) if division.stage == 3 else most)

    return replace(
        division,
        bucket=size(division.bucket, BUCKET, total // 8),
        live=size(division.live, LIVE, total // 4),
        sub_group=size(division.sub_group, SUB_GROUP, trainable // division.processes // 8),
    )


@contextlib.contextmanager
def sized(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Have ZeRO-3 take these sizes for a model that is prepared, but for those that the launch's own file gives."""
    zero = zero_of(accelerator)
    if zero.get("stage") != 3:
        yield
        return
    numbers = [(whole_shape(one).numel(), one.requires_grad) for one in model.parameters()]
    trainable, total = sum(number for number, trains in numbers if trains), sum(number for number, _ in numbers)
    chosen = settled(Division(accelerator.num_processes, stage=3), trainable, total)
    ours = {
        "reduce_bucket_size": chosen.bucket,
        "stage3_max_live_parameters": chosen.live,
        "stage3_max_reuse_distance": chosen.live,
        "sub_group_size": chosen.sub_group,
    }
    ours = {name: value for name, value in ours.items() if name not in zero}
    zero |= ours
    try:
        yield
    finally:  # the next model has sizes of its own
        for name in ours:
            del zero[name]
