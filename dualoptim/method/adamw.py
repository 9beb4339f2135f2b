"""The optimizers that a bank can be made of: AdamW in 32 and in 8 bits, and sign SGD."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualoptim.method.blocks import read, write
from dualoptim.method.dual import Groups, MakeOptimizer
from dualoptim.method.kernels import is_dense, laid_as, own_part, pieces

SMALLEST_QUANTIZED = 4096  # elements; smaller tensors save nothing


def adamw(lr: float, betas: tuple[float, float], eps: float = 1e-8, bits: int = 32) -> MakeOptimizer:
    """Give a factory of AdamW: torch's, fused where all parameters are dense and on a device that can, or with `bits` 8
    bitsandbytes', which keeps the states of groups with `bits` 8 as bytes.

    Block-wise quantization (Dettmers et al., arXiv 2110.02861): 256 values share one float32 scale.
    """

    def make(groups: Groups) -> Optimizer:
        if bits == 8:
            return _adamw_8bit()(groups, lr=lr, betas=betas, eps=eps, min_8bit_size=SMALLEST_QUANTIZED)
        parameters = [parameter for group in groups for parameter in group["params"]]
        can = {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}
        fused = can and all(is_dense(own_part(parameter.detach())) for parameter in parameters)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
        optimizer.register_step_pre_hook(_lay_gradients)
        return optimizer

    return make


def _lay_gradients(optimizer: Optimizer, *_: Any) -> None:
    """Let every gradient lie as its parameter does."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.grad is not None:
            parameter.grad = laid_as(parameter.detach(), parameter.grad)


@functools.cache
def _adamw_8bit() -> Any:
    """bitsandbytes' AdamW8bit, which otherwise cannot be told group by group what to quantize."""
    from bitsandbytes.functional import optimizer_update_32bit
    from bitsandbytes.optim import AdamW8bit

    class GroupwiseAdamW8bit(AdamW8bit):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return super().get_config(gindex, pindex, group) | {"optim_bits": group["bits"]}

        def update_step(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
            """Update `p`; on a CPU piece by piece, where a whole one takes temporaries of five times its size."""
            if p.device.type != "cpu":  # the kernel of other devices needs no temporaries
                super().update_step(group, p, gindex, pindex)
                return
            state, (beta1, beta2) = self.state[p], group["betas"]
            state["step"] += 1
            numbers = {key: group[key] for key in ("lr", "eps", "weight_decay")} | {"step": state["step"]}
            for weights, gradient, own in pieces(p, state):
                if own["state1"].dtype == torch.uint8:
                    adamw_in_bytes(weights, gradient, own, numbers | {"betas": group["betas"]})
                else:
                    moments = {"state1": own["state1"], "beta1": beta1, "state2": own["state2"], "beta2": beta2}
                    optimizer_update_32bit("adam", gradient, weights, **moments, **numbers)

    return GroupwiseAdamW8bit


def adamw_in_bytes(weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Take one step of AdamW on moments in bytes, in place, by bitsandbytes' operations on a CPU and in their order."""
    (beta1, beta2), step, lr = group["betas"], group["step"], group["lr"]
    m, v = read(state["state1"], state["absmax1"]), read(state["state2"], state["absmax2"], signed=False)
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["weight_decay"] > 0:
        weights.mul_(1 - lr * group["weight_decay"])
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    write(m, state["state1"], state["absmax1"])
    write(v, state["state2"], state["absmax2"], signed=False)


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
