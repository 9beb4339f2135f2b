"""Keep float32 weights where a launch computes in 16 bits: DeepSpeed's masters, to which its steps are added, and others."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dualoptim.models.loaded import LoadedModel, precision_of
from dualoptim.models.sharding import Share, computes_in_half, exact_share, is_zero, whole_shape, whole_tensors

_FROZEN: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What weights were that are rounded though they do not train, by their parameters; None where another process saves them."""


def are_rounded(engine: Any) -> bool:
    """Tell whether what Accelerate made of a model holds 16-bit weights, and float32 masters beside them."""
    return hasattr(engine, "bfloat16_enabled") and engine.bfloat16_enabled()


@dataclass(frozen=True)
class Kept:
    """A trained parameter, and its loaded weight: whole, or (ZeRO-3, loaded divided) this process's share of it."""

    parameter: Any
    weight: Tensor
    is_share: bool


def keep(loaded: LoadedModel) -> list[Kept]:
    """Hold on to the weights that train while an engine is prepared, and to the others until the model is saved.

    DeepSpeed rounds them before it copies its masters from them, but not what it gets beside weights that are divided already.
    Those that do not train and will be saved are copied to the host, by the process that saves them or by all their shares.
    """

    def kept(parameter: Any) -> Kept:
        is_share = loaded.divided and hasattr(parameter, "ds_tensor")
        return Kept(parameter, exact_share(parameter) if is_share else parameter.data, is_share)

    trains = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    accelerator = loaded.accelerator
    rounds = accelerator.distributed_type == DistributedType.DEEPSPEED and precision_of(accelerator) == torch.bfloat16
    saved = rounds and not hasattr(loaded.model, "peft_config")
    for one in map(kept, (parameter for parameter in loaded.model.parameters() if saved and not parameter.requires_grad)):
        if one.weight.dtype == torch.float32:
            shape, parts = whole_shape(one.parameter), accelerator.num_processes if one.is_share else 1
            holds = one.is_share or accelerator.is_main_process
            _FROZEN[one.parameter] = Share(one.weight.cpu(), shape, parts) if holds else None
    weights = [kept(parameter) for parameter in trains]
    if computes_in_half(loaded.model) and is_zero(loaded.model):
        for parameter in trains:
            parameter.data = parameter.data.bfloat16()
    return weights


def restore(engine: Any, weights: Sequence[Kept]) -> None:
    """Make the masters of an engine that was just prepared the weights that were loaded."""
    if are_rounded(engine):
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for one in weights:
            write = safe_set_local_fp32_param if one.is_share else safe_set_full_fp32_param
            write(one.parameter, one.weight.float())


def trained(loaded: LoadedModel, engine: Any, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Give what a model's state holds under some names, in the order of names, each whole until the next is asked for.

    Under DeepSpeed with 16 bits the weights that were trained are its masters, and not those that were rounded for the forward
    pass. All processes have to ask for all of them.
    """
    if not are_rounded(engine):
        yield from whole_tensors(loaded.model, names)
        return
    from deepspeed.utils import safe_get_full_fp32_param

    state = loaded.model.state_dict(keep_vars=True)
    for name in sorted(names):
        if state[name].requires_grad:
            yield name, safe_get_full_fp32_param(state[name]).detach()
        elif state[name] in _FROZEN:
            exact = _FROZEN[state[name]]
            yield name, replace(exact, part=exact.part.to(loaded.device)).gathered() if exact else state[name]
        else:
            yield from whole_tensors(loaded.model, [name])
