"""Keep what is trained in float32 where a launch computes in 16 bits: DeepSpeed's masters, to which its steps are added."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dualoptim.models.loaded import LoadedModel


def are_rounded(engine: Any) -> bool:
    """Tell whether what Accelerate made of a model holds 16-bit weights, and float32 masters beside them."""
    return hasattr(engine, "bfloat16_enabled") and engine.bfloat16_enabled()


def restore(engine: Any, weights: Sequence[tuple[Any, Tensor]]) -> None:
    """Make the masters of an engine that was just prepared the weights [each of any shape] that were loaded.

    DeepSpeed rounds the weights before it copies its masters from them.
    """
    if are_rounded(engine):
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, weight in weights:
            safe_set_full_fp32_param(parameter, weight.float())


def gathered(loaded: LoadedModel, engine: Any) -> dict[str, Tensor]:
    """Give the main process the whole of every weight that was trained; the others have nothing.

    Under DeepSpeed with 16 bits these are the masters, one tensor at a time, and not the weights that were rounded for the
    forward pass.
    """
    accelerator, model = loaded.accelerator, loaded.model
    if not are_rounded(engine):
        return accelerator.get_state_dict(engine)
    from deepspeed.utils import safe_get_full_fp32_param

    buffers = dict(model.named_buffers())
    state = {name: buffers[name].detach().cpu() for name in buffers.keys() & model.state_dict().keys()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if accelerator.is_main_process:
                state[name] = whole.detach().cpu().clone()
    return state if accelerator.is_main_process else {}
