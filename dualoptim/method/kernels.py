"""Operations that are written out by hand, because what torch offers takes several times the memory or time.

Autograd functions over logits, which hold one tensor [tokens, vocabulary] where autograd's own would hold five, and the
walk over a parameter in pieces, with which an optimizer's step on a CPU stays in its caches.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualoptim.method.blocks import BLOCK

PIECE = 1024 * BLOCK  # values that a CPU updates at once, so that what lies between stays in its caches
LARGE_PIECE = 64 * PIECE  # and another device, whose kernels are then long enough and what lies between is small
LOGITS = 2**26  # logits that another device works on at once: 256 MB in float32, and few kernels for a batch


def kept(values: Tensor, keep: Tensor) -> Tensor:
    """Select K positions of values [B, L, ...] from a model that ignores `logits_to_keep`; [B, K, ...] stays as it is."""
    return values[:, keep] if values.shape[1] > len(keep) else values


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, which sums over V need, and other values as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def rows_at_once(device: str, vocabulary: int, on_cpu: int) -> int:
    """Say how many rows [V] of logits a kind of device works on at once: on a CPU as few as stay in its caches."""
    return on_cpu if device == "cpu" else max(1, LOGITS // vocabulary)


class Statistics(torch.autograd.Function):
    """log p(label), logsumexp, mean and whether the label is the largest, of logits [K, V] in any precision: four times [N].

    `column` [N] says in which row each label is predicted: one after another where each has its own. With p = softmax(z) the
    gradient is (g_logsumexp - g_log_prob) p + g_mean / V, plus g_log_prob at the label. Written out, it takes one new tensor
    [K, V] where autograd's own takes five, for some rows at a time, and never asks the device for a number.
    """

    rows = 32  # on a CPU

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        """Compute the four statistics."""
        ctx.rows, parts = rows_at_once(logits.device.type, logits.shape[-1], Statistics.rows), []
        for z in logits.split(ctx.rows):
            z = widened(z)
            parts.append((z.logsumexp(-1), z.mean(-1), z.argmax(-1)))
        logsumexp, mean, first_choice = (torch.cat(values) for values in zip(*parts, strict=True))
        ctx.save_for_backward(logits, labels, column, logsumexp)
        log_prob, correct = logits[column, labels] - logsumexp[column], first_choice[column] == labels
        ctx.mark_non_differentiable(correct)
        return log_prob, logsumexp[column], mean[column], correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient of the logits."""
        logits, labels, column, logsumexp = ctx.saved_tensors
        for_label, for_logsumexp, for_mean, _ = gradients
        factors = torch.stack([for_logsumexp - for_label, for_mean / logits.shape[-1]])
        to_p, to_all = factors.new_zeros(2, len(logits)).index_add_(1, column, factors)
        result = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.rows):
            part = slice(start, start + ctx.rows)
            z = logits[part] - logsumexp[part, None]  # in float32 at least
            z.exp_().mul_(to_p[part, None]).add_(to_all[part, None])
            own = part if len(column) == len(logits) else slice(None)  # a row may be that of any labels, or of one
            place = column[own] - start
            row = place.clamp(0, len(z) - 1)
            result[part] = z.index_put_((row, labels[own]), for_label[own] * (row == place), accumulate=True)
        return result, None, None


class KeptGradient(torch.autograd.Function):
    """A value per token of logits z [N, V], whose gradient is written as the values come, some rows at a time.

    It is the only tensor [N, V] beside z itself. It waits for its factor in bf16 if z is that, but never in fp16, where small
    values are gone before the loss is scaled up. Every function of this kind has a `forward` of its own.
    """

    rows = 128  # on a CPU

    @staticmethod
    def by_rows(ctx: Any, logits: Tensor, rows: int, of: Callable[[slice], tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the values, and keep their gradient for later; `of` gives both for some rows, so many at once on a CPU."""
        ctx.dtype, values = logits.dtype, []
        gradient = torch.empty_like(logits, dtype=torch.float32 if logits.dtype == torch.float16 else logits.dtype)
        rows = rows_at_once(logits.device.type, logits.shape[-1], rows)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            value, gradient[part] = of(part)
            values.append(value)
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_value: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits, which come before whatever else a function takes."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(for_value[:, None]).to(ctx.dtype), *(None for _ in ctx.needs_input_grad[1:])


class AgainstTargets(KeptGradient):
    """Cross-entropy H(q, p) or divergence KL(q || p) per token of p = softmax(z) from targets q that are constants: [N].

    The gradient of both is p - q. Neither q nor its logits ever exist whole.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Callable[[slice], Tensor], divergence: bool) -> Tensor:
        """Compute the values; the gradient is kept for later."""

        def of(part: slice) -> tuple[Tensor, Tensor]:
            log_p, log_q = widened(logits[part]).log_softmax(-1), targets(part).log_softmax(-1)
            q = log_q.exp()
            # -inf, where a target rules a token out, would make 0 times infinity
            value = (q * ((log_q.clamp_(min=-1e30) - log_p) if divergence else -log_p)).sum(-1)
            return value, log_p.exp_().sub_(q)

        return AgainstTargets.by_rows(ctx, logits, AgainstTargets.rows, of)


def pieces(parameter: Tensor, state: Mapping[str, Any], whole: bool = False) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Views of a parameter, its gradient and its state in one dimension: of `PIECE` values after another, or of all at once.

    What an update needs beside its state is then as large as a piece, and not as the parameter, a fifth of some models. The
    state's entries are told by their names, bitsandbytes' (state1, absmax1, qmap1, step) as well as ours. Of a tensor that FSDP
    divides they are those of this process's part, which may have nothing in it.
    """
    assert parameter.grad is not None
    weights, gradient, *values = map(own_part, (parameter.detach(), parameter.grad, *state.values()))
    state = dict(zip(state, values, strict=True))
    if not weights.is_contiguous():  # its values do not lie in their order
        yield weights, gradient, state
        return
    weights, gradient = weights.view(-1), gradient.reshape(-1)
    size = PIECE if weights.device.type == "cpu" else LARGE_PIECE
    size = len(weights) if whole else size
    for start in range(0, len(weights), max(1, size)):
        part, blocks = slice(start, start + size), slice(start // BLOCK, -(-(start + size) // BLOCK))
        own = {}
        for key, value in state.items():
            if key.endswith("_scale") or key.startswith("absmax"):
                own[key] = value[blocks]
            elif key.endswith("step") or key.startswith("qmap"):
                own[key] = value
            else:
                own[key] = value.view(-1)[part]
        yield weights[part], gradient[part], own


def is_dense(tensor: Tensor) -> bool:
    """Tell whether values lie without gaps, as fused kernels take for granted, which go through several tensors alike."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def laid_as(weights: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient whose values lie as those of its weights do, which fused kernels take for granted as well."""
    return gradient if gradient.stride() == weights.stride() else torch.empty_like(weights).copy_(gradient)


def own_part(value: Any) -> Any:
    """Give what this process holds of a tensor that FSDP divides, and any other value as it is."""
    return value.to_local() if hasattr(value, "to_local") else value  # importing DTensor to ask for it costs a second
