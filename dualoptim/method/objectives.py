"""The objectives: each a short function from token scores to `(sum, count)`.

The loop adds the counts of all micro-batches and processes of a step and divides once, so neither accumulation nor the
number of processes can change a gradient. `log p` below is the log-probability of a label given everything before it,
x a question, y its answer, `idk` a refusal, `ref` the frozen model before unlearning, and sg(.) holds a value constant.

To add an objective, write a function and give it one entry in `FORGET` or `RETAIN`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dualoptim.method.scores import Batch, Reference, TokenScores, cross_entropy, kl_divergence, widened

Loss = Callable[[TokenScores, float, float], tuple[Tensor, int]]
"""Scores, the objective's `beta` and `gamma` (NaN where it has none) -> sum over its unit, and how many units that were."""

PUBLISHED_LAYER = 7
"""Of RMU in a model of 32 layers, counted from 0."""

Text = Literal["answer", "refusal", "mismatch"]


def negative_log_likelihood(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """GD and IDK: the sum over tokens of -log p. IDK applies it to a refusal in place of the answer."""
    return -scores.log_prob.sum(), len(scores.log_prob)


def gradient_ascent(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """GA (TOFU, arXiv 2401.06121): the negative of GD. It has no lower bound: few steps, small rates."""
    return scores.log_prob.sum(), len(scores.log_prob)


def maximum_entropy(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """ME (arXiv 2410.08109): KL(uniform || p) per token, zero exactly when the model finds all V tokens equally likely.

    KL(u || p) = sum_v (1/V) log((1/V) / p_v) = logsumexp(z) - mean(z) - log V, which needs no softmax.
    """
    per_token = scores.logsumexp - scores.mean_logit - math.log(scores.vocab_size)
    return per_token.sum(), len(per_token)


def weighted_gradient_ascent(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """WGA (arXiv 2502.19301): sg(p)^beta log p per token, so that a token which is forgotten pushes no further.

    beta = 0 is GA.
    """
    weight = (beta * scores.log_prob.detach()).exp()
    return (weight * scores.log_prob).sum(), len(scores.log_prob)


def saturation_importance(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """SatImp (arXiv 2505.11953): sg(p^beta (1 - p)^gamma) log p per token: neither what is forgotten nor what is certain.

    gamma = 0 is WGA.
    """
    p = scores.log_prob.detach().exp()
    return (p**beta * (1 - p) ** gamma * scores.log_prob).sum(), len(scores.log_prob)


def cross_entropy_unlearning(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """CE-U (arXiv 2503.01224): cross-entropy against the model's own distribution without the label, held constant.

    H(q, p) per token with q = sg(softmax(z with z_label = -inf)). The first scored token of a text is left out, as in
    published runs: it rarely says anything yet.
    """
    later = torch.ones_like(scores.sequence, dtype=torch.bool)
    later[0] = False
    later[1:] = scores.sequence[1:] == scores.sequence[:-1]

    def without_label(part: slice) -> Tensor:
        logits = widened(scores.raw_logits[scores.column[part]].detach())
        return logits.scatter(-1, scores.labels[part, None], -math.inf)

    per_token = cross_entropy(scores, without_label)
    return per_token[later].sum(), len(per_token) - scores.num_sequences


def logit_margin(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """PDU's forget loss (arXiv 2506.05314): (max(z) - mean(z))^2 per token, zero exactly for a uniform distribution.

    Here where the answer's tokens are predicted; the published code takes the positions of these tokens themselves.
    """
    largest = widened(scores.raw_logits.max(-1).values)[scores.column]
    per_token = (largest - scores.mean_logit) ** 2
    return per_token.sum(), len(per_token)


def negative_preference(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """NPO (arXiv 2404.05868): -(2/beta) log sigmoid(-beta (log p(y|x) - log ref(y|x))) per question.

    As beta goes to 0 its gradient goes to that of GA summed over each sequence; where the answer is already far less likely
    than before, it goes to zero.
    """
    ratio = scores.per_sequence(scores.log_prob - _reference(scores, "log_prob"))
    return (2 / beta) * softplus(beta * ratio).sum(), scores.num_sequences


def simple_negative_preference(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """SimNPO (arXiv 2410.07163): -(2/beta) log sigmoid(-(beta/|y|) log p(y|x) - beta gamma) per question: no reference.

    The margin gamma is multiplied by beta, as in published code.
    """
    per_token = scores.per_sequence(scores.log_prob) / scores.lengths()
    return (2 / beta) * softplus(beta * (per_token + gamma)).sum(), scores.num_sequences


def direct_preference(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """DPO (arXiv 2305.18290) with the refusal preferred to the answer (arXiv 2404.05868), in pairs of answer and refusal.

    -(2/beta) log sigmoid(beta (log p(idk|x)/ref(idk|x) - log p(y|x)/ref(y|x))) per question.
    """
    ratio = scores.per_sequence(scores.log_prob - _reference(scores, "log_prob"))
    margin = ratio[1::2] - ratio[0::2]
    return (2 / beta) * softplus(-beta * margin).sum(), len(margin)


def self_distillation(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """UNDIAL (arXiv 2402.10052): cross-entropy per token against the reference with the label's logit lowered by beta.

    H(softmax(z_ref - beta 1_label), p); beta = 0 distils the reference itself.
    """
    reference = _reference(scores, "logits")

    def lowered(part: slice) -> Tensor:
        labels = scores.labels[part, None]
        logits = reference(part)
        return logits.scatter_add(-1, labels, torch.full_like(logits[:, :1], -beta))

    per_token = cross_entropy(scores, lowered)
    return per_token.sum(), len(per_token)


def steer_away(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """RMU (arXiv 2403.03218): |h - beta u|^2 / H per token, h a layer's output and u one random direction of length 1.

    The mean is over tokens; published code averages the means of sequences. The upper layers get gradients of zero
    instead of none, because DDP and ZeRO wait for one from each weight.
    """
    assert scores.hidden is not None
    size = scores.hidden.shape[-1]
    direction = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(scores.hidden)
    per_token = (scores.hidden - beta * direction / direction.norm()).square().mean(-1)
    return per_token.sum() + 0 * scores.logsumexp.sum(), len(per_token)


def answer_preservation(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """AP (arXiv 2410.08109): keep preferring the answer over a refusal, without a reference model.

    -(1/beta) log sigmoid(beta (log p(y|x) - log p(idk|x))) per question, with the log-probabilities of whole sequences
    (sums over tokens). Sequences come in pairs: the answer first, then the refusal. When both are equally likely the
    loss is log(2)/beta; it tends to zero as the answer wins.
    """
    log_prob = scores.per_sequence(scores.log_prob)
    margin = log_prob[0::2] - log_prob[1::2]
    return softplus(-beta * margin).sum() / beta, len(margin)


def divergence(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """KL: KL(ref || p) per scored token, zero exactly where the model says what it said before.

    The published code also averages over the question and over padding: KLQ scores the question too, and equals it on a
    batch without padding.
    """
    per_token = kl_divergence(scores, _reference(scores, "logits"))
    return per_token.sum(), len(per_token)


def matching_embedding(scores: TokenScores, beta: float, gamma: float) -> tuple[Tensor, int]:
    """EMBED, the retain side of RMU (arXiv 2403.03218): |h - h_ref|^2 / H per token, of the same layer."""
    assert scores.hidden is not None
    per_token = (scores.hidden - _reference(scores, "hidden")).square().mean(-1)
    return per_token.sum() + 0 * scores.logsumexp.sum(), len(per_token)


def _reference(scores: TokenScores, field: Literal["log_prob", "logits", "hidden"]) -> Any:
    """One field of the reference, which whoever uses this objective has to provide."""
    found = getattr(scores.reference or Reference(), field)
    assert found is not None, f"this objective needs {field} of the reference"
    return found


@dataclass(frozen=True)
class Objective:
    """A loss, which texts of a row it reads, what its sum is divided by, and what it needs beside the scores.

    `later_token`: every scored token of a text but the first. `also` is a second loss of the same phase, on texts of its own
    and with a mean of its own.
    """

    loss: Loss
    reads: tuple[Text, ...] = ("answer",)
    unit: Literal["token", "later_token", "row"] = "token"
    beta: float = math.nan
    gamma: float = math.nan
    reference: Literal["log_prob", "logits", "hidden"] | None = None
    needs_layer: bool = False
    layer: int | None = None  # which one, once it is known
    whole_text: bool = False  # the question is scored as well
    also: "Objective | None" = None

    def resolved(self, beta: float | None, gamma: float | None, layer: int) -> "Objective":
        """This objective with the constants that a user gave, where it has them, and the layer that it reads."""
        return replace(
            self,
            beta=self.beta if beta is None or math.isnan(self.beta) else beta,
            gamma=self.gamma if gamma is None or math.isnan(self.gamma) else gamma,
            layer=layer if self.needs_layer else None,
            also=self.also and self.also.resolved(beta, gamma, layer),
        )

    def count(self, batch: Batch) -> int:
        """What the loss will return as its count, known before the forward pass because the division needs it then."""
        if self.unit == "row":
            return batch.num_sequences // len(self.reads)
        return len(batch.labels) - (batch.num_sequences if self.unit == "later_token" else 0)


FORGET: dict[str, Objective] = {
    "GA": Objective(gradient_ascent),
    "ME": Objective(maximum_entropy),
    "IDK": Objective(negative_log_likelihood, reads=("refusal",)),
    "NPO": Objective(negative_preference, unit="row", beta=0.1, reference="log_prob"),
    "DPO": Objective(direct_preference, reads=("answer", "refusal"), unit="row", beta=0.1, reference="log_prob"),
    "SimNPO": Objective(simple_negative_preference, unit="row", beta=2.5, gamma=0.0),
    "WGA": Objective(weighted_gradient_ascent, beta=1.0),
    "SatImp": Objective(saturation_importance, beta=5.0, gamma=1.0),
    "UNDIAL": Objective(self_distillation, beta=10.0, reference="logits"),
    "CE-U": Objective(cross_entropy_unlearning, unit="later_token"),
    "PDU": Objective(logit_margin),
    "RMU": Objective(steer_away, beta=2.0, needs_layer=True),
    # LLMU (arXiv 2310.10683) also learns another question's answer; with KL as its retain side it is complete
    "LLMU": Objective(gradient_ascent, also=Objective(negative_log_likelihood, reads=("mismatch",))),
}
RETAIN: dict[str, Objective | None] = {
    "GD": Objective(negative_log_likelihood),
    "AP": Objective(answer_preservation, reads=("answer", "refusal"), unit="row", beta=0.1),
    "KL": Objective(divergence, reference="logits"),
    "KLQ": Objective(divergence, reference="logits", whole_text=True),
    "EMBED": Objective(matching_embedding, reference="hidden", needs_layer=True),
    "none": None,
}
