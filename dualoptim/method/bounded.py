"""Losses of tokens with a bound, near which their gradients end: CE-U, PDU, both halves of JensUn, and the inverted hinge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dualoptim.method.scores import TokenScores


def cross_entropy_unlearning(scores: TokenScores) -> Tensor:
    """CE-U (arXiv 2503.01224): H(q, p) per token with q = sg(softmax(z with z_label = -inf)).

    The first scored token of a text is left out, as in published runs: it rarely says anything yet.
    """

    def without_label(part: slice) -> Tensor:
        return scores.constant_logits(part).scatter(-1, scores.labels[part, None], -math.inf)

    first = scores.sequence.diff(prepend=scores.sequence[:1] - 1).int()
    return scores.cross_entropy(without_label)[first.argsort(stable=True)[: len(first) - scores.num_sequences]].sum()


def logit_margin(scores: TokenScores) -> Tensor:
    """PDU's forget loss (arXiv 2506.05314): (max(z) - mean(z))^2 per token, zero exactly for a uniform distribution.

    Here where the answer's tokens are predicted; the published code takes the positions of these tokens themselves.
    """
    return ((scores.largest_logit - scores.mean_logit) ** 2).sum()


def towards_refusal(scores: TokenScores) -> Tensor:
    """JensUn (arXiv 2509.02820): JSD(p || the token of a refusal) per token of the answer, whose tokens stay what is read.

    The refusal's tokens, with the one that ends it, are the labels, again and again; published code has its words alone. With
    p the label's probability every other token's share is its own p times log 2, which adds up to

        (2 log 2 - (1 + p) log(1 + p) + p log p) / 2,

    log 2 where the refusal is impossible, 0 where it is certain. Published code raises what lies below 1e-9 to it.
    """
    p = scores.log_prob.exp()
    return (math.log(2) - ((1 + p) * p.log1p() - p * scores.log_prob) / 2).sum()


def halved_divergence(scores: TokenScores) -> Tensor:
    """JSD, the retain half of JensUn (arXiv 2509.02820): (KL(p || m) + KL(ref || m)) / 2 per token, m = (p + ref) / 2.

    Zero exactly where the model says what it said before, and at most log 2. Published code raises what lies below 1e-9 to it.
    """
    from dualoptim.method.jensen import JensenShannon

    assert scores.reference is not None
    return JensenShannon.apply(scores.logits, scores.reference.logits).sum()


def inverted_hinge(scores: TokenScores) -> Tensor:
    """IHL, the inverted hinge of LoKU (arXiv 2408.06621): 1 + p(label) - max over v != label of p(v), per token.

    2 where the label is certain, 1 where it is as likely as the likeliest other, 0 where another token is certain: its gradient
    falls with p. Published code takes logits that all lie in [0, 1] for probabilities; here they never are.
    """
    largest, tokens = (found[scores.column] for found in scores.raw_logits.topk(2, -1))
    other = largest[:, 0].where(tokens[:, 0] != scores.labels, largest[:, 1])
    return (1 + scores.log_prob.exp() - (other - scores.logsumexp).exp()).sum()
