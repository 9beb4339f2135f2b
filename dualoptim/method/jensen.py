"""The Jensen-Shannon divergence from targets over a vocabulary, whose gradient is all that is kept of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualoptim.method.kernels import KeptGradient, widened


class JensenShannon(KeptGradient):
    """JSD(p || q) per token of p = softmax(z), for logits z [N, V] and the logits of constant targets q: [N].

    With m = (p + q) / 2 its gradient is p (log(p / m) - KL(p || m)) / 2.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Callable[[slice], Tensor]) -> Tensor:
        """Compute the values; the gradient is kept for later."""

        def of(part: slice) -> tuple[Tensor, Tensor]:
            log_p, log_q = (z.log_softmax(-1).clamp_(min=-1e30) for z in (widened(logits[part]), targets(part)))
            log_m = log_p.logaddexp(log_q).sub_(math.log(2))
            of_q = torch.linalg.vecdot(log_q.exp(), log_q.sub_(log_m))
            p = log_p.exp()
            of_p = torch.linalg.vecdot(p, log_p.sub_(log_m))
            return (of_p + of_q) / 2, p.mul_(log_p.sub_(of_p[:, None])).div_(2)

        return JensenShannon.by_rows(ctx, logits, JensenShannon.rows, of)
