"""Measure how unlikely a text is to a model, in ways by which membership attacks tell learned rows from unseen ones."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from dualoptim.data.prompts import Example
from dualoptim.method.device import sent
from dualoptim.method.kernels import widened
from dualoptim.method.scores import TokenScores, score
from dualoptim.models.loaded import LoadedModel

Values = TypeVar("Values", Tensor, list[bool])

MIN_K_SHARE = 0.4
"""Share of the tokens that Min-K% reads; OpenUnlearning's setting for TOFU."""

PASSAGE_SHARE = 0.2
"""The same of passages whose scores are those of a benchmark; RWKU's setting."""


def min_k(scores: Sequence[float], share: float = MIN_K_SHARE) -> float:
    """Compute minus the mean of the lowest `share` of the token scores, of one token at least.

    Of log-probabilities it is Min-K% (arXiv 2310.16789), of standardized ones Min-K%++ (arXiv 2404.02936). High: not a member.
    """
    lowest = sorted(scores)[: max(1, int(len(scores) * share))]
    return -fmean(lowest)


def zlib_score(loss: float, text: str) -> float:
    """Divide the loss per token by the bytes that zlib takes for the text (arXiv 2012.07805). High: not a member."""
    return loss / len(zlib.compress(text.encode("utf-8")))


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Compute the chance that an unseen row scores above a learned one: 1 all members are known, 0.5 none can be told.

    The area under the ROC curve, from ranks (Mann and Whitney), ties counting half.
    """
    from scipy.stats import rankdata  # takes half a second

    ranks = rankdata([*members, *others])
    rank_sum = float(ranks[len(members) :].sum())
    return (rank_sum - len(others) * (len(others) + 1) / 2) / (len(members) * len(others))


def privleak(auc: float, retain_auc: float) -> float:
    """Compute privacy leakage in percent (MUSE, arXiv 2407.06460): how far 1 - AUC lies from the retain-only model's.

    0 is like a model that never saw the rows, below it membership shows, above it the rows are conspicuously unlikely. The AUC
    is Min-K%'s.
    """
    return ((1 - auc) - (1 - retain_auc)) / (1 - retain_auc + 1e-10) * 100


def without_end(values: Values, ended: bool) -> Values:
    """Leave out the value of a text's end token, if it has one and there is another one, as OpenUnlearning does."""
    return values[:-1] if len(values) > 1 and ended else values


def membership_scores(scores: TokenScores, texts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Give what Min-K% and Min-K%++ read of some texts of a forward pass, token by token, one text after another: twice [n].

    Its texts have `lengths` scored tokens.
    """
    starts = [0, *accumulate(lengths)]
    tokens = torch.tensor([token for text in texts for token in range(starts[text], starts[text + 1])])
    which = sent(tokens, scores.log_prob.device)
    return scores.log_prob[which], standardized(scores, which)


def gradient_norms(loaded: LoadedModel, examples: Iterable[Example]) -> Iterator[Tensor]:
    """Yield the mean over the tensors that train of the 2-norm of the gradient of each text's loss (OpenUnlearning)."""
    torch.clear_autocast_cache()  # older versions of torch hand on casts that were made without gradients
    for example in examples:
        scores = score(loaded.model, loaded.batch([example]))
        (-without_end(scores.log_prob, example.ended).mean()).backward()
        gradients = [p.grad for p in loaded.model.parameters() if p.grad is not None]
        yield torch.stack([gradient.float().norm() for gradient in gradients]).mean()
        loaded.model.zero_grad()


def standardized(scores: TokenScores, which: Tensor) -> Tensor:
    """Log-probabilities of the labels of the tokens `which` (their numbers), in standard deviations from their mean.

    Mean and deviation are those of log p over the vocabulary under p itself: Min-K%++ (arXiv 2404.02936, equation 3), with the
    variance no smaller than 1e-6 as OpenUnlearning has it.
    """
    parts = []
    for column, logsumexp, log_prob in zip(
        *(values[which].split(256) for values in (scores.column, scores.logsumexp, scores.log_prob)), strict=True
    ):
        log_p = widened(scores.raw_logits[column]) - logsumexp[:, None]
        p = log_p.exp()
        mean = (p * log_p).sum(-1)
        variance = (p * (log_p - mean[:, None]).square()).sum(-1)  # a difference of squares would lose digits
        parts.append((log_prob - mean) / variance.clamp(min=1e-6).sqrt())
    return torch.cat(parts)
