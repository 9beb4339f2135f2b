"""Tell flash-attention where packed texts lie in their row, which it would ask the device for in every layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dualoptim.data.batches import pack
from dualoptim.data.prompts import Example
from dualoptim.method.scores import score


def places_of(texts: Sequence[Example]) -> dict[str, Any]:
    """Say where the kernel finds texts that are packed end to end, and how long the longest is, as transformers calls that."""
    lengths = [len(text.ids) for text in texts]
    ends = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}


@torch.no_grad()
def takes_places(model: Any) -> bool:
    """Tell whether a model computes with flash-attention, and hands on to it where packed texts lie.

    Then it scores them with the same bits as where the kernel has found that out.
    """
    if model.config._attn_implementation != "flash_attention_2":
        return False
    texts = [Example([7, 4, 8, 3, 9], 1), Example([5, 3, 8], 1)]
    batch, was_training = pack(texts).to(model.device), model.training
    model.eval()
    try:
        told = score(model, replace(batch, places=places_of(texts)).to(model.device)).logits
        return torch.equal(told, score(model, batch).logits)
    except TypeError:  # it takes nothing that it does not know
        return False
    finally:
        model.train(was_training)
