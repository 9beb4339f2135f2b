"""Optimizers whose phases share a part of their state: DualOptim+ (arXiv 2605.21539), and the ablation of DualOptim.

Both are written out here, because two independent optimizers cannot express a shared moment. They have the interface of
`DualOptimizer`: `use(phase, lr)` before each step, all state in `state[p]` under flat names.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256  # values that share one scale
PIECE = 1024 * BLOCK  # values that a CPU updates at once, so that what lies between stays in its caches


class SharedStateOptimizer(Optimizer):
    """Two phases over one set of parameters, with state that a subclass divides between them.

    `use(phase, lr)` writes the phase and its rate into the groups, where DeepSpeed and Accelerate keep them.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "phase": "forget"})
        self.largest_update = torch.zeros(())
        """Largest change of one weight by the gradient in the last step, in rates."""

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
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self._create(parameter, group)
                self._count(self.state[parameter], group)
                for weights, gradient, state in pieces(parameter, self.state[parameter]):
                    update = self._update(gradient, state, group)
                    if group.get("max_update"):
                        update.clamp_(-group["max_update"], group["max_update"])
                    largest = update.abs().max() if update.numel() else torch.zeros(())
                    largest = largest.full_tensor() if hasattr(largest, "full_tensor") else largest
                    self.largest_update = torch.maximum(self.largest_update.to(largest), largest)
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

    def _create(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The zero state of a parameter that has none."""
        raise NotImplementedError

    def _count(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Advance the counters of the state that this step changes."""
        raise NotImplementedError

    def _update(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Take the gradient into the state, in place, and return by how many rates each weight goes down."""
        raise NotImplementedError


def pieces(parameter: Tensor, state: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Views of a parameter, its gradient and its state: of all at once, or on a CPU of `PIECE` values after another.

    The state's entries are told by their names, bitsandbytes' (state1, absmax1, qmap1, step) as well as ours.
    """
    gradient = parameter.grad
    assert gradient is not None
    divided = hasattr(parameter, "to_local")  # FSDP's tensors cannot be cut
    if parameter.device.type != "cpu" or divided or parameter.numel() <= PIECE or not parameter.is_contiguous():
        yield parameter, gradient, state
        return
    weights, gradient = parameter.detach().view(-1), gradient.reshape(-1)
    for start in range(0, parameter.numel(), PIECE):
        values, blocks = slice(start, start + PIECE), slice(start // BLOCK, (start + PIECE) // BLOCK)
        own = {}
        for key, value in state.items():
            if key.endswith("_scale") or key.startswith("absmax"):
                own[key] = value[blocks]
            elif key.endswith("step") or key.startswith("qmap"):
                own[key] = value
            else:
                own[key] = value.view(-1)[values]
        yield weights[values], gradient[values], own


def plus_update(
    gradient: Tensor,
    delta: tuple[Tensor, Tensor],
    base: tuple[Tensor, Tensor],
    own_step: int,
    step: int,
    betas: tuple[float, float],
    base_betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """One step of DualOptim+ (arXiv 2605.21539) on float32 moments, which it changes in place; returns the update in rates.

    `delta` (dm, dv) belongs to the phase and has seen `own_step` of its gradients with this one; `base` (m, v) is shared and
    has seen `step` of all. With the base as it stood before this step, corrected for its bias,

        dm <- b1 dm + (1 - b1)(g - m^)        dv <- b2 dv + (1 - b2)(g^2 - v^)
        update = (dm^ + m^) / (sqrt|dv^ + v^| + eps)
        m  <- B1 m + (1 - B1) g               v  <- B2 v + (1 - B2) g^2

    With a base that stays zero this is Adam on the phase's own gradients.
    """
    seen = step - 1
    m, v = (moment / (1 - beta**seen) if seen else moment.clone() for moment, beta in zip(base, base_betas, strict=True))
    square = gradient * gradient
    delta[0].lerp_(gradient - m, 1 - betas[0])
    delta[1].lerp_(square - v, 1 - betas[1])
    m.add_(delta[0], alpha=1 / (1 - betas[0] ** own_step))
    v.add_(delta[1], alpha=1 / (1 - betas[1] ** own_step))
    base[0].lerp_(gradient, 1 - base_betas[0])
    base[1].lerp_(square, 1 - base_betas[1])
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

    def _create(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if state:
            return
        for bank, in_bytes in group["quantized"].items():
            state[f"{bank}/step"] = torch.zeros(())
            for moment in ("exp_avg", "exp_avg_sq"):
                zero = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                _write(state, f"{bank}/{moment}", zero, in_bytes and group.get("bits") == 8)

    def _count(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        for bank in (group["phase"], "base"):
            state[f"{bank}/step"] += 1

    def _update(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        banks = (group["phase"], "base")
        delta, base = (
            (_read(state, f"{bank}/exp_avg", gradient), _read(state, f"{bank}/exp_avg_sq", gradient)) for bank in banks
        )
        own_step, step = (int(state[f"{bank}/step"]) for bank in banks)
        update = plus_update(gradient, delta, base, own_step, step, group["betas"], group["base_betas"], group["eps"])
        for bank, moments in zip(banks, (delta, base), strict=True):
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
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

    def _create(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if state:
            return
        for name, letter in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            for bank in ("forget", "retain") if group["decouple"] == letter else ("shared",):
                state[f"{bank}/{name}"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state[f"{bank}/{name}_step"] = torch.zeros(())

    def _keys(self, group: dict[str, Any]) -> list[str]:
        """The first and the second moment that the phase updates."""
        return [
            f"{group['phase'] if group['decouple'] == letter else 'shared'}/{name}"
            for name, letter in (("exp_avg", "m"), ("exp_avg_sq", "v"))
        ]

    def _count(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        for key in self._keys(group):
            state[f"{key}_step"] += 1

    def _update(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        corrected = []
        for key, beta, value in zip(self._keys(group), group["betas"], (gradient, gradient * gradient), strict=True):
            state[key].lerp_(value, 1 - beta)
            corrected.append(state[key] / (1 - beta ** int(state[f"{key}_step"])))
        return corrected[0].div_(corrected[1].sqrt_().add_(group["eps"]))


class SignSGD(Optimizer):
    """w <- (1 - lr wd) w - lr sign(g) (signSGD, arXiv 1802.04434): no state at all."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(parameter.grad.sign(), alpha=group["lr"])
        return loss


# ------------------------------------------------------------------------------------------------------------- bytes


@functools.cache
def _code(device: torch.device) -> Tensor:
    """The 256 values of a byte, from -1 to 1. Signed for second moments too, because a difference of them may be negative."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True).to(device)


def _write(state: dict[str, Any], key: str, value: Tensor, in_bytes: bool) -> None:
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


def _read(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    """A moment in float32, to be changed in place; one in bytes has to be written back."""
    if f"{key}_scale" not in state:
        return state[key]
    from bitsandbytes.functional import dequantize_blockwise

    value = dequantize_blockwise(state[key], absmax=state[f"{key}_scale"], code=_code(like.device), blocksize=BLOCK)
    return value.view_as(like)
