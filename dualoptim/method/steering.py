"""The losses that look at what a layer puts out: RMU, its adaptive form, circuit breakers, and their retain sides.

The upper layers get gradients of zero instead of none, because DDP and ZeRO wait for one from each weight. With RMUQ, ARMU,
CBQ and EMBEDQ the mean is over every token of the texts, the first among them, as WMDP's code has it, which also averages over
the padding of a batch: its equal where nothing is padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dualoptim.method.scores import TokenScores


def steer_away(scores: TokenScores, beta: float, corpus: int = 0) -> Tensor:
    """RMU (arXiv 2403.03218): |h - beta u|^2 / H per token, h a layer's output and u one random direction of length 1.

    The mean is over tokens; OpenUnlearning's code averages the means of sequences. `corpus` counts, from 0, the corpora that
    have a direction each.
    """
    return _towards(scores, _directed(scores, beta, corpus))


def steer_away_per_token(scores: TokenScores, beta: float, corpus: int = 0) -> Tensor:
    """ARMU, Adaptive RMU (arXiv 2408.06223): RMU with beta |h_ref| of each token in place of beta, as in the paper's formula.

    Its code measures one |h_ref| for all tokens, in the first step of each corpus: ARMU-once.
    """
    return _towards(scores, _directed(scores, beta * _before(scores).norm(dim=-1, keepdim=True), corpus))


def matching_embedding(scores: TokenScores) -> Tensor:
    """EMBED, the retain side of RMU (arXiv 2403.03218): |h - h_ref|^2 / H per token, of the same layer."""
    return _towards(scores, _before(scores))


def break_circuits(scores: TokenScores) -> Tensor:
    """CB, circuit breakers (arXiv 2406.04313): max(0, cos(h, h_ref)) per token.

    It is 1 before the first step, where its gradient is zero up to rounding, which an optimizer that divides gradients by their
    size follows all the same, and 0 from a right angle on.

    `--layer` is one layer, where published runs take several, and coefficients stay, where these move weight from this loss to
    the retain loss as steps go by.
    """
    from torch.nn.functional import cosine_similarity

    before = _before(scores)
    assert scores.hidden is not None
    return cosine_similarity(scores.hidden.to(before.dtype), before, dim=-1).relu().sum() + 0 * scores.logsumexp.sum()


def apart(scores: TokenScores, beta: float) -> Tensor:
    """Say how alike the rows of a micro-batch have become: max(0, cos) of their mean states, for any two in either order.

    With CBQ it is the orthogonal form (EleutherAI/unlearn, commit 1a6079f), which also multiplies it by the tokens of a row.
    """
    from torch.nn.functional import normalize

    assert scores.hidden is not None
    hidden = scores.hidden.to(scores.log_prob.dtype)
    rows = normalize(hidden.new_zeros(scores.num_sequences, hidden.shape[-1]).index_add(0, scores.sequence, hidden), dim=-1)
    return beta * (rows @ rows.T).relu().triu(1).sum() * 2 + 0 * scores.logsumexp.sum()


def matching_norm(scores: TokenScores) -> Tensor:
    """EMBEDQ-norm, the retain side of circuit breakers (arXiv 2406.04313): |h - h_ref| per token, not squared.

    At h = h_ref its gradient is taken to be zero. EleutherAI's code divides by the padding of a batch too.
    """
    assert scores.hidden is not None
    return (scores.hidden - _before(scores)).norm(dim=-1).sum() + 0 * scores.logsumexp.sum()


def _before(scores: TokenScores) -> Tensor:
    """Give what the layer of the frozen model puts out."""
    assert scores.reference is not None
    assert scores.reference.hidden is not None
    return scores.reference.hidden


def _directed(scores: TokenScores, length: float | Tensor, corpus: int) -> Tensor:
    """Give a vector of some length in the direction of a corpus: drawn as published, uniform from 0 to 1 in each dimension."""
    import torch

    assert scores.hidden is not None
    draws = torch.Generator().manual_seed(0)
    drawn = [torch.rand(scores.hidden.shape[-1], generator=draws) for _ in range(corpus + 1)][corpus].to(scores.hidden)
    return length * drawn / drawn.norm()


def _towards(scores: TokenScores, target: Tensor) -> Tensor:
    assert scores.hidden is not None
    return (scores.hidden - target).square().mean(-1).sum() + 0 * scores.logsumexp.sum()
