"""Measure what a run really holds: the types of its weights, and the bytes of its optimizer state."""

from typing import Any

import torch
from torch.optim import Optimizer

from dualoptim.method.engine import Engine
from dualoptim.method.kernels import own_part


def held(engine: Engine) -> dict[str, Any]:
    """Measure types of the weights and of their masters, and bytes of state per parameter, over all processes.

    The masters are what the optimizer updates: the weights themselves, or (DeepSpeed under bf16) copies of them in float32.
    Tensors that are kept in bytes are counted apart from the others.
    """
    optimizer, accelerator = engine.raw_optimizer, engine.accelerator
    sizes = torch.tensor([state_size(optimizer, quantized) for quantized in (False, True)], device=accelerator.device)
    (bytes_32, parameters_32), (bytes_8, parameters_8) = accelerator.reduce(sizes, "sum").tolist()
    found: dict[str, Any] = {
        "weights": _types(parameter for parameter in engine.model.parameters() if parameter.requires_grad),
        "masters": _types(optimizer.state),
    }
    if parameters_32:
        found["state_bytes_per_parameter"] = round(bytes_32 / parameters_32, 4)
    if parameters_8:
        found["state_bytes_per_quantized_parameter"] = round(bytes_8 / parameters_8, 4)
        found["quantized_share"] = round(parameters_8 / (parameters_8 + parameters_32), 4)
    return found


def state_size(optimizer: Optimizer, quantized: bool) -> tuple[int, int]:
    """Count the bytes of state on this process, and of how many parameters: those with a state in bytes, or the others.

    A tensor that several entries share counts once.
    """
    held: dict[int, int] = {}
    parameters = 0
    for parameter, entries in optimizer.state.items():
        tensors = [own_part(value) for value in entries.values() if isinstance(value, torch.Tensor)]
        if any(tensor.dtype == torch.uint8 for tensor in tensors) == quantized:
            parameters += own_part(parameter).numel()
            held |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values()), parameters


def _types(tensors: Any) -> str:
    return "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
