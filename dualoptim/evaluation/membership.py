"""Measure how unlikely a text is to a model, in ways by which membership attacks tell learned rows from unseen ones."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dualoptim.data.prompts import Example
from dualoptim.evaluation.metrics import min_k
from dualoptim.method.scores import TokenScores, score, standardized
from dualoptim.models.loaded import LoadedModel

Values = TypeVar("Values", Tensor, list[bool])


def without_end(values: Values) -> Values:
    """Leave out the value of a text's end token, if there is another one, as OpenUnlearning does."""
    return values[:-1] if len(values) > 1 else values


def min_k_scores(scores: TokenScores, texts: Sequence[int], lengths: Sequence[int]) -> list[tuple[float, float]]:
    """Compute Min-K% and Min-K%++ of some texts of a forward pass, whose texts have `lengths` scored tokens."""
    if not texts:
        return []
    which = torch.isin(scores.sequence, torch.tensor(texts, device=scores.sequence.device))
    own = [lengths[text] for text in texts]
    pairs = zip(scores.log_prob[which].split(own), standardized(scores, which).split(own), strict=True)
    return [(min_k(without_end(plain).tolist()), min_k(without_end(normed).tolist())) for plain, normed in pairs]


def gradient_norms(loaded: LoadedModel, examples: Iterable[Example]) -> Iterator[float]:
    """Yield the mean over the tensors that train of the 2-norm of the gradient of each text's loss (OpenUnlearning)."""
    for example in examples:
        scores = score(loaded.model, loaded.batch([example]))
        (-without_end(scores.log_prob).mean()).backward()
        gradients = [p.grad for p in loaded.model.parameters() if p.grad is not None]
        yield float(torch.stack([gradient.norm() for gradient in gradients]).mean())
        loaded.model.zero_grad()
