"""Take an update that is written out in one pass over memory: compiled where that pays and the machine can, else as it stands.

An update of twenty operations reads and writes its tensors twenty times. Compiled, it is one kernel a tensor, which moves what
has to be moved (44 bytes a weight for DualOptim+) and nothing else. The numbers that change from step to step come in a tensor,
so that nothing is compiled twice.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualoptim.errors import reason

logger = logging.getLogger(__name__)

COMPILED_FROM = 2**25  # values a step; fewer save less than compiling takes (half a minute on a slow core, once a machine)
TRIAL = 2**18  # values to try it on, enough for several threads


class Rule(NamedTuple):
    """An update: it takes a gradient into the moments, in place, and gives by how many rates each weight then goes down."""

    update: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
    moments: int  # tensors of the weights' shape
    factors: int  # numbers, of which `move` reads three more
    bounded: bool = False


Move = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, Tensor], None]


def as_written(rule: Rule) -> Move:
    """Give what moves weights by a rule, operation by operation: (weights, gradient, moments, factors, largest) -> None.

    All but the gradient and the factors are written over, `largest` with the largest move of one weight so far. The factors
    begin with 1 - lr wd, -lr, and the bound of a move.
    """
    return functools.partial(_move, rule.update, rule.bounded)


def _move(
    update: Callable[..., Tensor],
    bounded: bool,
    weights: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    factors: Tensor,
    largest: Tensor,
) -> None:
    decay, rate, bound, *own = factors.unbind()
    change = update(gradient, moments, own)
    if bounded:
        change = change.clamp_(-bound, bound)
    largest.copy_(torch.maximum(largest, change.abs().max()))
    weights.mul_(decay).addcmul_(change, rate)


@functools.cache
def compiled(rule: Rule, device: torch.device) -> Move | None:
    """Compile the same for flat tensors of any length, or say once why it cannot be: no compiler, a device that has none."""
    move = torch.compile(as_written(rule), dynamic=True)
    weights, gradient, *moments = (torch.zeros(TRIAL, device=device) for _ in range(2 + rule.moments))
    try:
        move(weights, gradient, moments, torch.ones(3 + rule.factors, device=device), torch.zeros((), device=device))
    except Exception as error:  # compilers raise what they like
        logger.warning("optimizer steps are not compiled, and take several times as long: %s", reason(error))
        return None
    return move
