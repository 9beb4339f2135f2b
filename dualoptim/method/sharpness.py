"""Sharpness-aware steps (SAM, arXiv 2010.01412): the gradient where, close by, the loss is largest to first order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from dualoptim.method.engine import Engine


def passes(engine: Engine, rho: float) -> Iterator[int]:
    """Ask for the passes of a step: one, whose loss counts (1), or with `rho` a second one (0), whose gradients are taken.

    For the second one the weights w are moved to w + rho g / |g|, with the norm of g over all tensors together, and afterwards
    they are what they were, to the bit. For forget steps it is the defence against relearning of arXiv 2502.05374.
    """
    yield 1
    if not rho:
        return
    moved = [parameter for parameter in engine.model.parameters() if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    factor = rho / (get_total_norm([parameter.grad for parameter in moved]) + 1e-12)
    with torch.no_grad():
        for parameter in moved:
            parameter.addcmul_(parameter.grad, factor.to(parameter))
    engine.optimizer.zero_grad()
    try:
        yield 0
    finally:
        with torch.no_grad():
            for parameter, own in zip(moved, before, strict=True):
                parameter.copy_(own)
