"""Take out of a forget gradient what goes against the retain state's first moment (GRU's idea without its extra pass)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from torch import Tensor

from dualoptim.method.kernels import own_part, widened

if TYPE_CHECKING:
    from dualoptim.method.engine import Engine

Part = tuple[Tensor, Mapping[str, Any], Callable[[Tensor], object]]
"""What a process has of a parameter's gradient, the state that belongs to it, and what hands a changed gradient back."""


def project(engine: Engine) -> None:
    """Project the gradient of a forget step, if the engine is told to, before it is clipped.

    With m the first moment of the retain state, an average of retain gradients that is there anyway,

        g <- g - min(0, <g, m>) / |m|^2 m

    so that the step raises the retain loss no further, to first order; g stays where it does not. The products run over all
    parameters together (`global`, as in GRU, arXiv 2503.09117, which takes a retain gradient of the same step) or over each
    alone (`tensor`). Before the first retain step m is zero and g stays.
    """
    optimizer, accelerator = engine.raw_optimizer, engine.accelerator
    over = engine.project_forget
    if over == "none" or optimizer.param_groups[0]["phase"] != "forget":
        return
    parts = list(_parts(engine))

    def moment(part: Part) -> Tensor | None:
        found = retain_moment(optimizer, part[1])
        return None if found is None else found.to(part[0].device)

    # ---- <g, m> and |m|^2 of each parameter, over all processes
    found = torch.zeros(len(parts), 2, dtype=torch.float64, device=accelerator.device)
    for row, part in zip(found, parts, strict=True):
        if part and (m := moment(part)) is not None:
            g = widened(part[0]).flatten()
            m = m.to(g.dtype).flatten()
            row.copy_(torch.stack([g.dot(m), m.dot(m)]))
    if over == "global":
        found = found.sum(0, keepdim=True)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        found = accelerator.reduce(found, "sum")
    dot, square = found.unbind(1)
    factors = torch.where(square > 0, -dot.clamp(max=0) / square, 0).expand(len(parts))

    # ---- the gradients, in place
    for factor, part in zip(factors, parts, strict=True):
        if part and (m := moment(part)) is not None:
            gradient, _, put = part
            put(gradient.addcmul_(m.view_as(gradient).to(gradient.dtype), factor.to(gradient)))


def retain_moment(optimizer: Any, state: Mapping[str, Any]) -> Tensor | None:
    """Give the first moment of retain steps in one parameter's state, up to a factor, if they keep one of their own."""
    if hasattr(optimizer, "retain_moment"):
        found: Tensor | None = optimizer.retain_moment(state)
        return found
    return state.get("retain/exp_avg", state.get("retain/momentum_buffer"))


def _parts(engine: Engine) -> Iterator[Part | None]:
    """Give what this process has of each parameter that trains, in one order on all processes; None where it has nothing."""
    optimizer, zero = engine.raw_optimizer, engine.model.optimizer if _is_divided_by_zero(engine) else None
    for parameter in engine.model.parameters():
        if not parameter.requires_grad:
            continue
        if zero is None:
            state = {key: own_part(value) for key, value in optimizer.state.get(parameter, {}).items()}
            yield None if parameter.grad is None else (own_part(parameter.grad), state, _stays)
        elif hasattr(parameter, "ds_id"):
            yield _of_stage_3(optimizer, zero, parameter)
        else:
            yield _of_stage_2(optimizer, parameter)


def _is_divided_by_zero(engine: Engine) -> bool:
    return engine.accelerator.distributed_type == DistributedType.DEEPSPEED


def _of_stage_3(optimizer: Any, zero: Any, parameter: Any) -> Part:
    """Find a parameter under ZeRO-3, of which every process has a share, in flat tensors of many."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    which, start, size = zero.grad_position[zero.get_param_id(parameter)]
    state = _within(optimizer.state, zero.fp32_partitioned_groups_flat[which], slice(start, start + size))
    return safe_get_local_grad(parameter), state, partial(safe_set_local_grad, parameter)


def _of_stage_2(optimizer: Any, parameter: Any) -> Part | None:
    """Find a parameter under ZeRO-1 or 2, of whose flat tensors a process has one stretch, which begins or ends anywhere."""
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    own, place = fragment.lp_fragment_address, fragment.hp_fragment_address
    gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
    if len(gradient) > own.numel:  # with 16 bits stage 1 has all of it
        gradient = gradient[own.start : own.start + own.numel]
    (flat,) = optimizer.param_groups[fragment.param_group_index]["params"]
    return gradient, _within(optimizer.state, flat, slice(place.start, place.start + place.numel)), _stays


def _within(states: Mapping[Any, Any], flat: Tensor, part: slice) -> dict[str, Any]:
    """Cut the state of a flat tensor to one of its parts; counters are those of all of it."""
    found = states.get(flat, {}).items()
    return {key: value[part] if getattr(value, "shape", None) == flat.shape else value for key, value in found}


def _stays(_: Tensor) -> None:
    """Hand back a gradient that is changed in its place."""
