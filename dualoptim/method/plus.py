"""Optimizers whose phases share a part of their state: DualOptim+ (arXiv 2605.21539), and the ablation of DualOptim.

Both are written out here, because two independent optimizers cannot express a shared moment. They have the interface of
`DualOptimizer`: `use(phase, lr)` before each step, all state in `state[p]` under flat names.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualoptim.method.kernels import BLOCK, pieces

Group = dict[str, Any]
State = dict[str, Any]


class SharedStateOptimizer(Optimizer):
    """Two phases over one set of parameters, with state that a subclass divides between them.

    `use(phase, lr)` writes the phase and its rate into the groups, where DeepSpeed and Accelerate keep them.
    """

    # What a subclass says: the zero state of a parameter that has none; which counters a step advances; how it takes a gradient
    # into the state, in place, and by how many rates each weight then goes down.
    _create: Callable[[Tensor, Group], None]
    _count: Callable[[State, Group], None]
    _update: Callable[[Tensor, State, Group], Tensor]

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, {**defaults, "phase": "forget"})
        self.largest_update = torch.zeros(())  # largest change of one weight by the gradient in the last step, in rates

    def use(self, phase: str, lr: float | None = None) -> None:
        """Make `phase` active, with rate `lr` if one is given.

        Raises:
            ValueError: if `phase` is not "forget" or "retain".
        """
        if phase not in ("forget", "retain"):
            raise ValueError(f"unknown phase {phase!r}; choose from forget, retain")
        for group in self.param_groups:
            group |= {"phase": phase} | ({} if lr is None else {"lr": lr})
        self.largest_update = torch.zeros(())

    @torch.no_grad()
    def materialize(self) -> None:
        """Create the zero state of both phases now, for loaders that fill only what exists (FSDP2)."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._create(parameter, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                self._create(parameter, group)
                self._count(self.state[parameter], group)
                for weights, gradient, state in pieces(parameter, self.state[parameter]):
                    update = self._update(gradient, state, group)
                    if group.get("max_update"):
                        update.clamp_(-group["max_update"], group["max_update"])
                    # of FSDP's tensors this process's part, which may have nothing in it; the engine asks the others
                    own = update.to_local() if hasattr(update, "to_local") else update
                    if own.numel():
                        self.largest_update = torch.maximum(self.largest_update.to(own), own.abs().max())
                    weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as it was saved: torch's own loader would turn bytes into floats."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        self.state.clear()
        for parameter, index in zip(parameters, indices, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                is_counter = key.endswith("step")
                self.state[parameter][key] = value.clone() if is_counter else value.to(parameter.device, copy=True)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}


@dataclass
class Moments:
    """Adam's two moments (m, v), the decay rates of both, and how many gradients they have seen, the current one included."""

    m: Tensor
    v: Tensor
    betas: tuple[float, float]
    steps: int


def plus_update(gradient: Tensor, delta: Moments, base: Moments, eps: float) -> Tensor:
    """Take one step of DualOptim+ (arXiv 2605.21539) on float32 moments, in place; return the update in rates.

    `delta` (dm, dv) belongs to the phase, `base` (m, v) is shared and sees the gradients of all phases. With the base as it
    stood before this step, corrected for its bias,

        dm <- b1 dm + (1 - b1)(g - m^)        dv <- b2 dv + (1 - b2)(g^2 - v^)
        update = (dm^ + m^) / (sqrt|dv^ + v^| + eps)
        m  <- B1 m + (1 - B1) g               v  <- B2 v + (1 - B2) g^2

    With a base that stays zero this is Adam on the phase's own gradients.
    """
    seen, square = base.steps - 1, gradient * gradient
    m, v = (
        moment / (1 - beta**seen) if seen else moment.clone() for moment, beta in zip((base.m, base.v), base.betas, strict=True)
    )
    delta.m.lerp_(gradient - m, 1 - delta.betas[0])
    delta.v.lerp_(square - v, 1 - delta.betas[1])
    m.add_(delta.m, alpha=1 / (1 - delta.betas[0] ** delta.steps))
    v.add_(delta.v, alpha=1 / (1 - delta.betas[1] ** delta.steps))
    base.m.lerp_(gradient, 1 - base.betas[0])
    base.v.lerp_(square, 1 - base.betas[1])
    return m.div_(v.abs_().sqrt_().add_(eps))


class DualAdamWPlus(SharedStateOptimizer):
    """DualOptim+ (arXiv 2605.21539): each phase keeps how its moments differ from a base that both share.

    The published form has no bound: where the difference and the base cancel, a weight moves by hundreds of rates. `max_update`
    bounds that move (0: as published), and `largest_update` says how far one went. With `quantize_delta` or `quantize_base`,
    groups whose `bits` are 8 keep these moments in bytes (block-wise dynamic quantization, arXiv 2110.02861).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        base_betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_update: float = 0.0,
        quantize_delta: bool = False,
        quantize_base: bool = False,
    ) -> None:
        quantized = {"forget": quantize_delta, "retain": quantize_delta, "base": quantize_base}
        defaults = {"lr": lr, "betas": betas, "base_betas": base_betas or betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"max_update": max_update, "quantized": quantized})

    def _create(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        for bank, in_bytes in group["quantized"].items() if not state else ():
            state[f"{bank}/step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                zero = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                _write(state, f"{bank}/{moment}", zero, in_bytes and group.get("bits") == 8)

    def _count(self, state: State, group: Group) -> None:
        for bank in (group["phase"], "base"):
            state[f"{bank}/step"] += 1

    def _update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        banks = {group["phase"]: group["betas"], "base": group["base_betas"]}
        delta, base = (
            Moments(_read(state, f"{bank}/exp_avg"), _read(state, f"{bank}/exp_avg_sq"), betas, int(state[f"{bank}/step"]))
            for bank, betas in banks.items()
        )
        update = plus_update(gradient, delta, base, group["eps"])
        for bank, moments in zip(banks, (delta, base), strict=True):
            for name, moment in (("exp_avg", moments.m), ("exp_avg_sq", moments.v)):
                if f"{bank}/{name}_scale" in state:
                    _write(state, f"{bank}/{name}", moment, True)
        return update


class PartlyDecoupledAdamW(SharedStateOptimizer):
    """AdamW with one of its moments decoupled and the other shared, for the ablation of DualOptim (arXiv 2504.15827).

    `decouple` is "m" or "v". A shared moment is corrected for its bias by the steps of both phases, a decoupled one by its own.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decouple: str = "m",
    ) -> None:
        if decouple not in ("m", "v"):
            raise ValueError(f"decouple {decouple!r} is unknown; choose m or v, or an AdamW or DualOptimizer of its own")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decouple": decouple})

    def _create(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        for key in [] if state else [key for phase in ("forget", "retain") for key in _keys(phase, group["decouple"])]:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[f"{key}_step"] = torch.zeros(())

    def _count(self, state: State, group: Group) -> None:
        for key in _keys(group["phase"], group["decouple"]):
            state[f"{key}_step"] += 1

    def _update(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        corrected = []
        keys = _keys(group["phase"], group["decouple"])
        for key, beta, value in zip(keys, group["betas"], (gradient, gradient * gradient), strict=True):
            state[key].lerp_(value, 1 - beta)
            corrected.append(state[key] / (1 - beta ** int(state[f"{key}_step"])))
        return corrected[0].div_(corrected[1].sqrt_().add_(group["eps"]))


def _keys(phase: str, decouple: str) -> tuple[str, str]:
    """The first and the second moment that a phase updates, of which one is shared."""
    return f"{phase if decouple == 'm' else 'shared'}/exp_avg", f"{phase if decouple == 'v' else 'shared'}/exp_avg_sq"


@functools.cache
def _code(device: torch.device) -> Tensor:
    """The 256 values of a byte, from -1 to 1. Signed for second moments too, because a difference of them may be negative."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True).to(device)


def _write(state: State, key: str, value: Tensor, in_bytes: bool) -> None:
    """Keep a moment, in bytes with one float32 scale per 256 values if asked for."""
    if not in_bytes:
        state[key] = value
        return
    from bitsandbytes.functional import quantize_blockwise

    in_bytes_now, scale = quantize_blockwise(value.contiguous(), code=_code(value.device), blocksize=BLOCK)
    if key in state:
        state[key].copy_(in_bytes_now)
        state[f"{key}_scale"].copy_(scale.absmax)
    else:
        state[key], state[f"{key}_scale"] = in_bytes_now, scale.absmax


def _read(state: State, key: str) -> Tensor:
    """A moment in float32, to be changed in place; one in bytes has to be written back."""
    if f"{key}_scale" not in state:
        return state[key]
    from bitsandbytes.functional import dequantize_blockwise

    scale, values = state[f"{key}_scale"], state[key]
    return dequantize_blockwise(values, absmax=scale, code=_code(values.device), blocksize=BLOCK).view_as(values)
