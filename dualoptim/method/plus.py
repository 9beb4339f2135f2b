"""Optimizers whose phases share a part of their state: DualOptim+ (arXiv 2605.21539), and the ablation of DualOptim.

Both are written out here, because two independent optimizers cannot express a shared moment. They have the interface of
`DualOptimizer`: `use(phase, lr)` before each step, all state in `state[p]` under flat names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualoptim.method import fused
from dualoptim.method.blocks import BLOCK, read, write
from dualoptim.method.fused import Rule
from dualoptim.method.kernels import pieces

Group = dict[str, Any]


class SharedStateOptimizer(Optimizer):
    """Two phases over one set of parameters, with state that a subclass divides between them.

    `use(phase, lr)` writes the phase and its rate into the groups, where DeepSpeed and Accelerate keep them. Where a moment of
    one phase meets one of the other's gradients, a weight moves by any number of rates: a group's `max_update` bounds that (0:
    not), and `largest_update` says how far one went.
    """

    # What a subclass says: the zero state of a parameter that has none, which moments and counters a step of the active phase
    # writes, what they make of a gradient, and the numbers that this takes of a group and of how many steps were counted.
    _create: Callable[[Tensor, Group], None]
    _keys: Callable[[Group], tuple[Sequence[str], Sequence[str]]]
    _rule: Rule
    _factors: Callable[[Group, Sequence[int]], list[float]]

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, {**defaults, "phase": "forget"})
        self.largest_update = torch.zeros(())  # largest change of one weight by the gradient in the last step, in rates

    def use(self, phase: str, lr: float | None = None) -> None:
        """Make `phase` active, with rate `lr` if one is given, and forget the largest update.

        Raises:
            ValueError: if `phase` is not "forget" or "retain".
        """
        if phase not in ("forget", "retain"):
            raise ValueError(f"unknown phase {phase!r}; choose from forget, retain")
        for group in self.param_groups:
            group |= {"phase": phase} | ({} if lr is None else {"lr": lr})
        self.largest_update = torch.zeros_like(self.largest_update)  # where it is

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
            together: dict[Any, list[Tensor]] = {}  # by device, precision and counters, mostly all of them
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._create(parameter, group)
                    counters = [self.state[parameter][key] for key in self._keys(group)[1]]
                    torch._foreach_add_(counters, 1)
                    together.setdefault((parameter.device, parameter.dtype, *map(int, counters)), []).append(parameter)
            for (_, _, *steps), parameters in together.items():
                self._move(parameters, group, steps)
        return loss

    def _move(self, parameters: Sequence[Tensor], group: Group, steps: Sequence[int]) -> None:
        """Move parameters of a group that have come as far, with their moments."""
        device, dtype, lr = parameters[0].device, parameters[0].dtype, group["lr"]
        rule = self._rule._replace(bound=group["max_update"])
        written, (keys, _) = fused.as_written(rule), self._keys(group)
        values = sum(p.numel() for each in self.param_groups for p in each["params"] if p.grad is not None)
        kernel = fused.compiled(rule, device) if steps[-1] * values >= fused.COMPILED_FROM else None
        numbers = [-lr * group["weight_decay"], -lr, *self._factors(group, steps), group["eps"]]
        factors = torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
        self.largest_update = self.largest_update.to(device)
        for parameter in parameters:
            state = self.state[parameter]
            in_bytes = [key for key in keys if f"{key}_scale" in state]
            for weights, gradient, own in pieces(parameter, state, whole=kernel is not None and not in_bytes):
                moments = {key: read(own[key], own[f"{key}_scale"]) if key in in_bytes else own[key] for key in keys}
                flat = weights.dim() == 1 and len(weights) > 1  # for another kind of shape a kernel would be compiled again
                move = kernel if kernel and flat else written
                move(weights, gradient, [*moments.values()], factors, self.largest_update)
                for key in in_bytes:
                    write(moments[key], own[key], own[f"{key}_scale"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as it was saved: torch's own loader would turn bytes into floats."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        self.state.clear()
        for parameter, index in zip(parameters, indices, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                # counters are for the host, which would wait for those of another device
                self.state[parameter][key] = value.to("cpu" if key.endswith("step") else parameter.device, copy=True)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}


def plus_update(gradient: Tensor, moments: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Take one step of DualOptim+ (arXiv 2605.21539) on float32 moments, in place; return the update in rates.

    Of the moments, dm and dv belong to the phase, m and v are the shared base, which sees the gradients of all phases. With the
    base as it stood before this step, corrected for its bias,

        dm <- b1 dm + (1 - b1)(g - m^)        dv <- b2 dv + (1 - b2)(g^2 - v^)
        update = (dm^ + m^) / (sqrt|dv^ + v^| + eps)
        m  <- B1 m + (1 - B1) g               v  <- B2 v + (1 - B2) g^2

    With a base that stays zero this is Adam on the phase's own gradients. `plus_factors` says what the factors are.
    """
    (dm, dv, m, v), (m_seen, v_seen, dm_new, dv_new, dm_scale, dv_scale, m_new, v_new, eps) = moments, factors
    square, mean, variance = gradient * gradient, m / m_seen, v / v_seen
    dm.lerp_(gradient - mean, dm_new)
    dv.lerp_(square - variance, dv_new)
    mean.addcmul_(dm, dm_scale)
    variance.addcmul_(dv, dv_scale)
    m.lerp_(gradient, m_new)
    v.lerp_(square, v_new)
    return mean.div_(variance.abs_().sqrt_().add_(eps))


def plus_factors(betas: tuple[float, float], base_betas: tuple[float, float], steps: Sequence[int]) -> list[float]:
    """Give the factors of `plus_update` but eps, each for both moments, from how many gradients a phase and the base have seen.

    Both counts have the current gradient in them. 1 - B^k of the base before this step (1 while it is zero and needs no
    correction); 1 - b and 1 / (1 - b^k) of the phase; 1 - B.
    """
    own, shared = steps
    return [
        *(1 - beta ** (shared - 1) if shared > 1 else 1.0 for beta in base_betas),
        *(1 - beta for beta in betas),
        *(1 / (1 - beta**own) for beta in betas),
        *(1 - beta for beta in base_betas),
    ]


class DualAdamWPlus(SharedStateOptimizer):
    """DualOptim+ (arXiv 2605.21539): each phase keeps how its moments differ from a base that both share.

    The published form has no bound: where the difference and the base cancel, a weight moves by hundreds of rates. With
    `quantize_delta` or `quantize_base`, groups whose `bits` are 8 keep these moments in bytes (block-wise dynamic quantization,
    arXiv 2110.02861).
    """

    _rule = Rule(plus_update, moments=4, factors=9)

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

    def retain_moment(self, state: Mapping[str, Any]) -> Tensor | None:
        """Give the first moment of retain steps in one parameter's state: their difference and the base; None before them."""
        if not state.get("retain/step"):
            return None
        (beta, _), (base_beta, _) = (self.param_groups[0][name] for name in ("betas", "base_betas"))
        own, base = 1 - beta ** int(state["retain/step"]), 1 - base_beta ** int(state["base/step"])
        return (state["retain/exp_avg"] / own).add_(state["base/exp_avg"], alpha=1 / base)

    def _create(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        for bank, quantized in group["quantized"].items() if not state else ():
            state[f"{bank}/step"] = torch.zeros(())
            in_bytes = quantized and group.get("bits") == 8
            dtype = torch.uint8 if in_bytes else parameter.dtype
            for key in (f"{bank}/exp_avg", f"{bank}/exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
                if in_bytes:
                    state[f"{key}_scale"] = torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)

    def _keys(self, group: Group) -> tuple[Sequence[str], Sequence[str]]:
        phase, moments = group["phase"], ("exp_avg", "exp_avg_sq")
        return [f"{bank}/{moment}" for bank in (phase, "base") for moment in moments], [f"{phase}/step", "base/step"]

    def _factors(self, group: Group, steps: Sequence[int]) -> list[float]:
        return plus_factors(group["betas"], group["base_betas"], steps)


def adamw_update(gradient: Tensor, moments: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Take one step of Adam on float32 moments (m, v), in place; return the update in rates.

    The factors are 1 - b of both, 1 / (1 - b^k) of m and its square root of v, and eps.
    """
    (m, v), (m_new, v_new, m_scale, v_scale, eps) = moments, factors
    m.lerp_(gradient, m_new)
    v.lerp_(gradient * gradient, v_new)
    return (m * m_scale).div_((v.sqrt() * v_scale).add_(eps))


class PartlyDecoupledAdamW(SharedStateOptimizer):
    """AdamW with one of its moments decoupled and the other shared, for the ablation of DualOptim (arXiv 2504.15827).

    `decouple` is "m" or "v". A shared moment is corrected for its bias by the steps of both phases, a decoupled one by its own.
    With a shared m and a v of retain steps, whose gradients are small, a weight moves by up to 250,000 rates (measured).
    """

    _rule = Rule(adamw_update, moments=2, factors=5)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decouple: str = "m",
        max_update: float = 0.0,
    ) -> None:
        if decouple not in ("m", "v"):
            raise ValueError(f"decouple {decouple!r} is unknown; choose m or v, or an AdamW or DualOptimizer of its own")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decouple": decouple}
        super().__init__(params, defaults | {"max_update": max_update})

    def _create(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        for key in [] if state else [key for phase in ("forget", "retain") for key in _keys(phase, group["decouple"])]:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[f"{key}_step"] = torch.zeros(())

    def _keys(self, group: Group) -> tuple[Sequence[str], Sequence[str]]:
        moments = _keys(group["phase"], group["decouple"])
        return moments, [f"{key}_step" for key in moments]

    def _factors(self, group: Group, steps: Sequence[int]) -> list[float]:
        (beta1, beta2), (first, second) = group["betas"], steps
        return [1 - beta1, 1 - beta2, 1 / (1 - beta1**first), (1 - beta2**second) ** -0.5]


def _keys(phase: str, decouple: str) -> tuple[str, str]:
    """The first and the second moment that a phase updates, of which one is shared."""
    return f"{phase if decouple == 'm' else 'shared'}/exp_avg", f"{phase if decouple == 'v' else 'shared'}/exp_avg_sq"
