"""One forward pass over a packed batch, turned into one small record per scored token.

Most objectives and metrics of this field are arithmetic on these records, so the model runs once and nothing of size
[tokens, vocabulary] is kept by anyone downstream.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualoptim.method.device import sent
from dualoptim.method.kernels import AgainstTargets, Statistics, kept, widened


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
    reference: "Callable[[], Reference] | None" = None  # reads what the frozen model says about the same tokens
    places: dict[str, Any] = field(default_factory=dict)  # where texts lie in the row, for a kernel that takes no mask

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to `device`."""
        return dataclasses.replace(self, **sent(vars(self), device))


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
        """Give V."""
        return self.raw_logits.shape[-1]

    @property
    def logits(self) -> Tensor:
        """Give logits [N, V] in the model's precision, for the few objectives that look at whole distributions."""
        shared = len(self.raw_logits) < len(self.column)
        return self.raw_logits.index_select(0, self.column) if shared else self.raw_logits

    @property
    def largest_logit(self) -> Tensor:
        """Give the largest logit of each token: [N]."""
        return widened(self.raw_logits.max(-1).values)[self.column]

    def constant_logits(self, part: slice) -> Tensor:
        """Logits [n, V] of some of the tokens in float32 at least, through which no gradient flows."""
        return widened(self.raw_logits[self.column[part]].detach())

    def cross_entropy(self, targets: Callable[[slice], Tensor]) -> Tensor:
        """Compute H(q, p) per token [N], where `targets` gives the logits [n, V] of q for some of the tokens, held constant."""
        return AgainstTargets.apply(self.logits, targets, False)

    def kl_divergence(self, targets: Callable[[slice], Tensor]) -> Tensor:
        """Compute KL(q || p) per token [N], with `targets` as for `cross_entropy`."""
        return AgainstTargets.apply(self.logits, targets, True)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum `values` [N] over the tokens of each sequence: [S]."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def lengths(self) -> Tensor:
        """Count the scored tokens of each sequence: [S]."""
        return self.per_sequence(torch.ones_like(self.log_prob))


@dataclass(frozen=True)
class Reference:
    """What the model before unlearning says about the N scored tokens of a batch: the one of these that an objective needs."""

    log_prob: Tensor | None = None  # [N]
    logits: Callable[[slice], Tensor] | None = None  # of some of the tokens: [n, V], float32 at least
    hidden: Tensor | None = None  # [N, H]


def score_logits(logits: Tensor, batch: Batch) -> TokenScores:
    """Compute token scores from logits [B, K, V]."""
    rows, column = logits[0], batch.column
    if logits.shape[0] > 1:
        rows, column = logits[batch.row, batch.column], torch.arange(len(batch.labels), device=logits.device)
    log_prob, logsumexp, mean_logit, correct = Statistics.apply(rows, batch.labels, column)
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
        **batch.places,
        **({} if layer is None else {"output_hidden_states": True}),
    )
    scores = score_logits(kept(output.logits, batch.keep), batch)
    if batch.reference:
        scores = dataclasses.replace(scores, reference=batch.reference())
    if layer is None:
        return scores
    states = output.hidden_states[layer + 1]  # the first is the embeddings
    return dataclasses.replace(scores, hidden=states[batch.row, batch.position])
