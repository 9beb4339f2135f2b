"""The mean of log(p + floor) over a vocabulary, by which released code measures the distance from a uniform distribution."""

from typing import Any

from torch import Tensor

from dualoptim.method.kernels import KeptGradient, widened


class MeanLog(KeptGradient):
    """Mean over V of log(p + floor) per token of p = softmax(z), for logits z [N, V]: [N].

    With r = p / (p + floor) its gradient is (r - p sum(r)) / V: a token far below the floor has none of its own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, floor: float) -> Tensor:
        """Compute the values; the gradient is kept for later."""

        def of(part: slice) -> tuple[Tensor, Tensor]:
            p = widened(logits[part]).softmax(-1)
            raised = p + floor
            own = p / raised
            return raised.log().mean(-1), (own - p * own.sum(-1, keepdim=True)) / logits.shape[-1]

        return MeanLog.by_rows(ctx, logits, MeanLog.rows, of)
