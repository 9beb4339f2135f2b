"""Compute attention over packed texts on a CPU, text by text.

A packed row has a block-diagonal mask, and a kernel that takes the whole mask computes the square of all tokens of the row,
most of it for nothing: a fifth of a training step with eight TOFU rows. What flash-attention does on GPUs with cumulative
lengths is done here with one call of torch's own kernel per block.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKWISE = "blockwise_sdpa"


def blockwise_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute what `sdpa` does, for each block on the mask's diagonal alone: [1, heads, T, D] -> [1, T, heads, D]."""
    blocks = diagonal_blocks(attention_mask) if attention_mask is not None else []
    if len(blocks) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths, masks = zip(*blocks, strict=True)
    texts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), masks, strict=True)
    return torch.cat([sdpa_attention_forward(module, *text, **options)[0] for text in texts], 1), None


def diagonal_blocks(mask: Tensor) -> list[tuple[int, Tensor | None]]:
    """Find size t and mask [1, 1, t, t] of the smallest blocks that hold everything a mask [1, 1, T, T] allows.

    A block begins where neither this token nor a later one sees an earlier one. One that is causal, and no more, has no mask:
    the kernel is faster without, and grouped queries need no copies of their keys. All layers of a forward pass get the same
    mask, with which the answer is kept. There are no blocks if the mask has another shape or type.
    """
    if mask.dtype != torch.bool or mask.shape[0] != 1 or mask.shape[-1] != mask.shape[-2]:
        return []
    if not hasattr(mask, "blocks"):
        first_seen = mask[0, 0].int().argmax(-1)  # [T]
        earliest = first_seen.flip(0).cummin(0).values.flip(0)
        starts = (earliest == torch.arange(len(earliest), device=mask.device)).nonzero()[:, 0].tolist()
        blocks: list[tuple[int, Tensor | None]] = []
        for start, end in zip(starts, [*starts[1:], len(earliest)], strict=True):
            block = mask[:, :, start:end, start:end].clone()  # a view of it would hold the mask that it is kept with, for good
            causal = torch.equal(block, torch.ones_like(block).tril())
            blocks.append((end - start, None if causal else block))
        mask.blocks = blocks  # type: ignore[attr-defined]
    return mask.blocks  # type: ignore[attr-defined]


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)
