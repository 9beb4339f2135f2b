"""One forward pass over a packed batch, turned into one small record per scored token.

Most objectives and metrics of this field are arithmetic on these records, so the model runs once and nothing of size
[tokens, vocabulary] is kept by anyone downstream.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Batch:
    """Examples as the model takes them, and where their scored tokens are.

    Packed, the examples lie one after another in a single row (B = 1, L = all tokens) with positions that restart at each
    of them and no attention mask; padded, each has its own row. N tokens are scored, S sequences stand in the batch. Packed
    examples may share the tokens that they begin with, and a mask [1, 1, L, L] says then what sees what.
    """

    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L], or None when packed, or bool [1, 1, L, L] when packed and sharing
    keep: Tensor  # [K] positions of L whose logits are computed
    row: Tensor  # [N] row of each scored token
    column: Tensor  # [N] where in `keep` the logits that predict it are
    position: Tensor  # [N] its own place in L
    labels: Tensor  # [N] token ids
    sequence: Tensor  # [N] example of each scored token, 0..S-1
    num_sequences: int
    num_tokens: int  # real tokens of the examples, scored or not, shared ones each time, padding excluded

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass says about each of N scored tokens in S sequences over a vocabulary of V."""

    log_prob: Tensor  # [N] log p(label)
    logsumexp: Tensor  # [N] log of the sum of exp(logits)
    mean_logit: Tensor  # [N] mean over the vocabulary
    correct: Tensor  # [N] whether the label has the largest logit (no gradient)
    sequence: Tensor  # [N]
    num_sequences: int
    labels: Tensor  # [N]
    raw_logits: Tensor  # [K, V] in the model's precision, K = N unless texts share tokens
    column: Tensor  # [N] row of `raw_logits` of each
    hidden: Tensor | None = None  # [N, H] a layer's output at the scored tokens themselves, if it was asked for
    reference: "Reference | None" = None  # what the frozen model says about the same tokens, if the objective needs it

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.raw_logits.shape[-1]

    @property
    def logits(self) -> Tensor:
        """[N, V] in the model's precision, for the few objectives that look at whole distributions."""
        shared = len(self.raw_logits) < len(self.column)
        return self.raw_logits.index_select(0, self.column) if shared else self.raw_logits

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums of `values` [N] over the tokens of each sequence: [S]."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def lengths(self) -> Tensor:
        """Scored tokens of each sequence: [S]."""
        return self.per_sequence(torch.ones_like(self.log_prob))


@dataclass(frozen=True)
class Reference:
    """What the model before unlearning says about the N scored tokens of a batch: the one of these that an objective needs."""

    log_prob: Tensor | None = None  # [N]
    logits: Callable[[slice], Tensor] | None = None  # of some of the tokens: [n, V], float32 at least
    hidden: Tensor | None = None  # [N, H]


class _Statistics(torch.autograd.Function):
    """log p(label), logsumexp, mean and whether the label is the largest, of logits [K, V] in any precision: four times [N].

    `column` [N] says in which row each label is predicted. With p = softmax(z) the gradient is (g_logsumexp - g_log_prob) p +
    g_mean / V, plus g_log_prob at the label. Written out, it takes one new tensor [K, V] where autograd's own takes five, and a
    few rows at a time stay in the processor's cache.
    """

    rows = 32

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        parts = []
        for z in logits.split(_Statistics.rows):
            z = widened(z)
            parts.append((z.logsumexp(-1), z.mean(-1), z.argmax(-1)))
        logsumexp, mean, first_choice = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.save_for_backward(logits, labels, column, logsumexp)
        log_prob, correct = widened(logits[column, labels]) - logsumexp[column], first_choice[column] == labels
        ctx.mark_non_differentiable(correct)
        return log_prob, logsumexp[column], mean[column], correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, column, logsumexp = ctx.saved_tensors
        for_label, for_logsumexp, for_mean, _ = gradients
        to_p, to_all = (
            torch.zeros_like(logsumexp).index_add_(0, column, values)
            for values in (for_logsumexp - for_label, for_mean / logits.shape[-1])
        )
        order = column.argsort()
        starts = range(0, len(logits), _Statistics.rows)
        bounds = torch.searchsorted(column[order], torch.tensor([*starts, len(logits)], device=column.device)).tolist()
        result = torch.empty_like(logits)
        for start, own in zip(starts, pairwise(bounds), strict=True):
            part, here = slice(start, start + _Statistics.rows), order[slice(*own)]
            z = widened(logits[part]) - logsumexp[part, None]
            z.exp_().mul_(to_p[part, None]).add_(to_all[part, None])
            result[part] = z.index_put_((column[here] - start, labels[here]), for_label[here], accumulate=True)
        return result, None, None


class _AgainstTargets(torch.autograd.Function):
    """Cross-entropy H(q, p) or divergence KL(q || p) per token of p = softmax(z) from targets q that are constants: [N].

    The gradient of both is p - q. Written as it comes, some rows at a time, it is the only tensor [N, V] beside z itself:
    neither q nor its logits ever exist whole. It waits for its factor in bf16 if z is that, but never in fp16, where small
    values are gone before the loss is scaled up.
    """

    rows = 128

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Callable[[slice], Tensor], divergence: bool) -> Tensor:
        ctx.dtype = logits.dtype
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        values, gradient = [], torch.empty_like(logits, dtype=dtype)
        for start in range(0, len(logits), _AgainstTargets.rows):
            part = slice(start, start + _AgainstTargets.rows)
            log_p, log_q = widened(logits[part]).log_softmax(-1), targets(part).log_softmax(-1)
            q = log_q.exp()
            # -inf, where a target rules a token out, would make 0 times infinity
            values.append((q * ((log_q.clamp_(min=-1e30) - log_p) if divergence else -log_p)).sum(-1))
            gradient[part] = log_p.exp_().sub_(q)
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(for_value[:, None]).to(ctx.dtype), None, None


def cross_entropy(scores: TokenScores, targets: Callable[[slice], Tensor]) -> Tensor:
    """H(q, p) per token [N], where `targets` gives the logits [n, V] of q for some of the tokens, held constant."""
    return _AgainstTargets.apply(scores.logits, targets, False)


def kl_divergence(scores: TokenScores, targets: Callable[[slice], Tensor]) -> Tensor:
    """KL(q || p) per token [N], where `targets` gives the logits [n, V] of q for some of the tokens, held constant."""
    return _AgainstTargets.apply(scores.logits, targets, True)


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, which sums over V need, and other values as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def score_logits(logits: Tensor, batch: Batch) -> TokenScores:
    """Token scores from logits [B, K, V]."""
    rows, column = logits[0], batch.column
    if logits.shape[0] > 1:
        rows, column = logits[batch.row, batch.column], torch.arange(len(batch.labels), device=logits.device)
    log_prob, logsumexp, mean_logit, correct = _Statistics.apply(rows, batch.labels, column)
    return TokenScores(
        log_prob=log_prob,
        logsumexp=logsumexp,
        mean_logit=mean_logit,
        correct=correct,
        sequence=batch.sequence,
        num_sequences=batch.num_sequences,
        labels=batch.labels,
        raw_logits=rows,
        column=column,
    )


def standardized(scores: TokenScores, which: Tensor) -> Tensor:
    """Log-probabilities of the labels of the tokens `which` (a mask [N]), in standard deviations from their mean.

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


def score(model: Any, batch: Batch, layer: int | None = None) -> TokenScores:
    """Run `model` over `batch`, computing logits only where a scored token is predicted.

    `layer` (from 0) also keeps that decoder layer's output at the scored tokens.
    """
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.keep,
        use_cache=False,
        **({} if layer is None else {"output_hidden_states": True}),
    )
    scores = score_logits(output.logits, batch)
    if layer is None:
        return scores
    states = output.hidden_states[layer + 1]  # the first is the embeddings
    return dataclasses.replace(scores, hidden=states[batch.row, batch.position])
