"""Take an update that is written out in one pass over memory: compiled where that pays and the machine can, else as it stands.

An update of twenty operations reads and writes its tensors twenty times. Compiled, it is one kernel a tensor, which moves what
has to be moved (44 bytes a weight for DualOptim+) and nothing else. The numbers that change from step to step come in a tensor,
so that nothing is compiled twice.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualoptim.errors import reason

logger = logging.getLogger(__name__)

COMPILED_FROM = 2**28  # values in all steps so far: then what is saved pays for compiling (9 s on a slow core, later runs 3)
TRIAL = 2**18  # values to try it on, enough for several threads
TRIAL_ON_CUDA = 2**22  # into as many pieces as these fill is the search for the largest move cut, for good: 512, not 32
# What a + b * c is: rounded once on a CPU, where torch's own kernels do so; on CUDA where it is written as one operation, and
# nowhere else. Where a denominator all but vanishes the second rounding moves a weight by a third of a rate.
ROUNDED_AS_WRITTEN: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
}


class Rule(NamedTuple):
    """An update: it takes a gradient into the moments, in place, and gives by how many rates each weight then goes down."""

    update: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
    moments: int  # tensors of the weights' shape
    factors: int  # numbers, of which `move` reads two more
    bound: float = 0.0  # rates that a weight goes down at most (0: any)


Move = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, Tensor], None]


def as_written(rule: Rule) -> Move:
    """Give what moves weights by a rule, operation by operation: (weights, gradient, moments, factors, largest) -> None.

    All but the gradient and the factors are written over, `largest` with the largest move of one weight so far. The factors
    begin with -lr wd and -lr.
    """
    return functools.partial(_move, rule.update, rule.bound)


def _move(
    update: Callable[..., Tensor],
    bound: float,
    weights: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    factors: Tensor,
    largest: Tensor,
) -> None:
    decay, rate, *own = factors.unbind()
    change = update(gradient, moments, own)
    if bound:
        change = change.clamp_(-bound, bound)
    weights.addcmul_(weights, decay).addcmul_(change, rate)
    largest.copy_(torch.maximum(largest, change.abs_().amax()))  # in half the time of max


@functools.cache
def compiled(rule: Rule, device: torch.device) -> Move | None:
    """Compile the same for flat tensors of any length, or say once why it cannot be: no compiler, a device that has none."""
    values = TRIAL_ON_CUDA if device.type == "cuda" else TRIAL
    weights, gradient, *moments = (torch.zeros(values, device=device) for _ in range(2 + rule.moments))
    try:
        rounding = {name: value for name, value in ROUNDED_AS_WRITTEN.items() if name in torch._inductor.list_options()}
        move = torch.compile(as_written(rule), dynamic=True, options=rounding)
        move(weights, gradient, moments, torch.ones(2 + rule.factors, device=device), torch.zeros((), device=device))
    except Exception as error:  # compilers raise what they like
        logger.warning("optimizer steps are not compiled, and take several times as long: %s", reason(error))
        return None
    return move
