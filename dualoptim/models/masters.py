"""Keep what is trained in float32 where a launch computes in 16 bits: DeepSpeed's masters, to which its steps are added."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dualoptim.models.loaded import LoadedModel
from dualoptim.models.sharding import computes_in_half, exact_share, is_zero, whole_tensors


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
    """Hold on to the weights that train while an engine is prepared.

    DeepSpeed rounds them before it copies its masters from them, but not what it gets beside weights that are divided already.
    """
    trains = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    divided = [loaded.divided and hasattr(parameter, "ds_tensor") for parameter in trains]
    kept = [
        Kept(parameter, exact_share(parameter) if is_share else parameter.data, is_share)
        for parameter, is_share in zip(trains, divided, strict=True)
    ]
    if computes_in_half(loaded.model) and is_zero(loaded.model):
        for parameter in trains:
            parameter.data = parameter.data.bfloat16()
    return kept


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
    masters = {name for name in names if state[name].requires_grad}
    for name in sorted(names):
        if name in masters:
            yield name, safe_get_full_fp32_param(state[name]).detach()
        else:
            yield from whole_tensors(loaded.model, [name])
