"""Round weights to few bits as what serves a model stores them, and back: the numbers that it would compute with."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dualoptim.config.args import Rounding


@torch.no_grad()
def round_weights(model: Any, kind: Rounding) -> str:
    """Round the weights of a model, which must be whole, in place, and say how.

    8 and 4: to the nearest. nf4: as bitsandbytes loads a model in 4 bits, but for the types that it computes in. Others: as
    llama.cpp quantizes all matrices, but for embeddings and output head, which have q6_K there: no package writes that, and
    they get q8_0.
    """
    if isinstance(kind, int):
        round_to_nearest(model, kind)
        scale = {8: "a scale per output", 4: "a scale per 64 weights"}[kind]
        return f"simulated: linear layers but the output head rounded to the nearest of {2**kind - 1} values, {scale}"
    if kind == "nf4":
        for weight in _linear(model):
            weight.copy_(_by_bitsandbytes(weight))
        return "linear layers but the output head by bitsandbytes' NF4 in blocks of 64, and back"
    kept = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    turned = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    for weight in (weight for weight in model.parameters() if weight.ndim > 1):
        stored = "q8_0" if any(weight is one for one in kept) else kind
        view = weight.T if id(weight) in turned else weight  # [outputs, inputs]
        view.copy_(_by_gguf(view, stored))
    return f"all matrices by gguf's {kind} and back, embeddings and output head by q8_0"


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int) -> None:
    """Round the weights of all linear layers but the output head in place, symmetrically around zero.

    With 8 bits every output has a scale of its own, with 4 every 64 weights in a row.
    """
    for weight in _linear(model):
        weight.copy_(_rounded(weight.float(), bits, weight.shape[1] if bits == 8 else 64))


def _linear(model: Any) -> Iterator[Tensor]:
    """Give the weights [outputs, inputs] of all linear layers but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            yield module.weight if isinstance(module, torch.nn.Linear) else module.weight.T


def _rounded(weight: Tensor, bits: int, block: int) -> Tensor:
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / top
    return ((blocks / scale).round() * scale).flatten()[: len(flat)].view_as(weight)


def _by_bitsandbytes(weight: Tensor) -> Tensor:
    """Store a matrix as NF4 with double quantization (arXiv 2305.14314), and read it again."""
    import bitsandbytes.functional as stored

    flat = weight.flatten()  # on a CPU 0.50 reads blocks wrongly that begin in one row of a matrix and end in the next
    codes, state = stored.quantize_4bit(flat, blocksize=64, compress_statistics=True, quant_type="nf4")
    found: Tensor = stored.dequantize_4bit(codes, state).view_as(weight)
    return found


def _by_gguf(weight: Tensor, kind: str) -> Tensor:
    """Store a matrix [..., inputs] as a type of .gguf files, and read it again; rows that no blocks fill get float16."""
    import gguf

    stored = gguf.GGMLQuantizationType[kind.upper()]
    if weight.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        return weight.half().float()
    packed = gguf.quants.quantize(weight.float().cpu().numpy(), stored)
    return torch.from_numpy(gguf.quants.dequantize(packed, stored))


@contextlib.contextmanager
def row_by_row(model: Any) -> Iterator[None]:
    """Have layers of LLM.int8() round each row of a batch by itself, in which they are asked whether a model mixes rows up.

    Otherwise a column where any row has a large value (above 6) is left in 16 bits for all of them, so that what a text gets
    depends on what it is batched with, though the model mixes nothing.
    """
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    kept = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, kept, strict=True):
            state.threshold = threshold
