"""The objectives: each a short function from token scores to `(sum, count)`.

The loop adds the counts of all micro-batches and processes of a step and divides once, so neither accumulation nor the
number of processes can change a gradient. `log p` below is the log-probability of a label given everything before it,
x a question, y its answer, and `idk` a refusal.

To add an objective, write a function and give it one entry in `FORGET` or `RETAIN`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from dualoptim.scores import Batch, TokenScores

Loss = Callable[[TokenScores, float], tuple[Tensor, int]]


def negative_log_likelihood(scores: TokenScores, beta: float) -> tuple[Tensor, int]:
    """GD and IDK: the sum over tokens of -log p. IDK applies it to a refusal in place of the answer."""
    return -scores.log_prob.sum(), len(scores.log_prob)


def gradient_ascent(scores: TokenScores, beta: float) -> tuple[Tensor, int]:
    """GA (TOFU, arXiv 2401.06121): the negative of GD. It has no lower bound: few steps, small rates."""
    return scores.log_prob.sum(), len(scores.log_prob)


def maximum_entropy(scores: TokenScores, beta: float) -> tuple[Tensor, int]:
    """ME (arXiv 2410.08109): KL(uniform || p) per token, zero exactly when the model finds all V tokens equally likely.

    KL(u || p) = sum_v (1/V) log((1/V) / p_v) = logsumexp(z) - mean(z) - log V, which needs no softmax.
    """
    per_token = scores.logsumexp - scores.mean_logit - math.log(scores.vocab_size)
    return per_token.sum(), len(per_token)


def answer_preservation(scores: TokenScores, beta: float) -> tuple[Tensor, int]:
    """AP (arXiv 2410.08109): keep preferring the answer over a refusal, without a reference model.

    -(1/beta) log sigmoid(beta (log p(y|x) - log p(idk|x))) per question, with the log-probabilities of whole sequences
    (sums over tokens). Sequences come in pairs: the answer first, then the refusal. When both are equally likely the
    loss is log(2)/beta; it tends to zero as the answer wins.
    """
    log_prob = scores.per_sequence(scores.log_prob)
    margin = log_prob[0::2] - log_prob[1::2]
    return softplus(-beta * margin).sum() / beta, len(margin)


@dataclass(frozen=True)
class Objective:
    """A loss, which texts of a row it reads, and what its sum is divided by."""

    loss: Loss
    reads: tuple[Literal["answer", "refusal"], ...] = ("answer",)
    unit: Literal["token", "row"] = "token"

    def count(self, batch: Batch) -> int:
        """What the loss will return as its count, known before the forward pass because the division needs it then."""
        return len(batch.labels) if self.unit == "token" else batch.num_sequences // len(self.reads)


FORGET: dict[str, Objective] = {
    "GA": Objective(gradient_ascent),
    "ME": Objective(maximum_entropy),
    "IDK": Objective(negative_log_likelihood, reads=("refusal",)),
}
RETAIN: dict[str, Objective] = {
    "GD": Objective(negative_log_likelihood),
    "AP": Objective(answer_preservation, reads=("answer", "refusal"), unit="row"),
}
