"""Take a step under Accelerate: the few calls that plain processes (one, DDP, FSDP) and DeepSpeed make differently."""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.optim import Optimizer

from dualoptim.method.device import clipped
from dualoptim.method.projection import project


class Engine:
    """A model and its optimizer, prepared for steps; `raw_optimizer` is ours, `optimizer` Accelerate's wrapper of it."""

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Optimizer) -> None:
        """Prepare both; states that a checkpoint is to fill exist from now on."""
        self.accelerator, self.raw_optimizer = accelerator, optimizer
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.distributed_type == DistributedType.FSDP and hasattr(optimizer, "materialize"):
            optimizer.materialize()  # its checkpoints fill only the state that exists when they are loaded
        self.project_forget = "none"  # over what forget gradients are projected: all parameters, or a tensor at a time
        self.average_cycles, self.means = 0.0, dict[Tensor, Tensor]()  # decay of the mean of weights at ends of cycles, and it
        self.model.train()
        self.asked_to_stop, self.stops = (lambda: False), 0  # this process, by a signal; any, as of the last step

    def use_phase(self, phase: str, lr: float) -> None:
        """Choose the phase and its rate; an optimizer with a single bank takes the rate alone."""
        if hasattr(self.raw_optimizer, "use"):
            self.raw_optimizer.use(phase, lr)
        else:
            for group in self.raw_optimizer.param_groups:
                group["lr"] = lr

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Keep the gradients of all but the last micro-batch of a step on their process."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        self.accelerator.backward(loss)

    def step(self, max_grad_norm: float, sums: Tensor, meanwhile: Callable[[], object] = lambda: None) -> list[float]:
        """Clip to `max_grad_norm` (0: not at all) and update, unless one of `sums` or the gradient's norm is not finite.

        Returns both, the norm before clipping last: one transfer from the device, which works while the host does `meanwhile`.
        """
        project(self)
        norm = clipped(self.accelerator, list(self.model.parameters()), max_grad_norm)
        asked = torch.cat([sums, norm.to(sums)])
        meanwhile()
        found: list[float] = asked.tolist()
        if all(map(math.isfinite, found)):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found

    def largest_update(self) -> dict[str, float]:
        """Say how far one weight moved in the step, in rates and over all processes, if the optimizer counts that."""
        if not hasattr(self.raw_optimizer, "largest_update"):
            return {}
        largest = self.raw_optimizer.largest_update.to(self.accelerator.device).reshape(1)
        return {"largest_update": float(self.accelerator.gather(largest).max())}


class DeepSpeedEngine(Engine):
    """The same under ZeRO, whose own engine owns accumulation, clipping and the skipped step."""

    def __init__(self, accelerator: Accelerator, model: Any, optimizer: Optimizer) -> None:
        """Prepare both, and make sure that the optimizer is still ours."""
        super().__init__(accelerator, model, optimizer)
        assert self.model.basic_optimizer is optimizer, "DeepSpeed has replaced the optimizer"

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Tell DeepSpeed where a step ends."""
        self.model.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient; Accelerate's own call would take the step at once, before anything is checked."""
        self.model.backward(loss)

    def step(self, max_grad_norm: float, sums: Tensor, meanwhile: Callable[[], object] = lambda: None) -> list[float]:
        """Clip and update; DeepSpeed skips the update by itself if the norm is not finite."""
        meanwhile()
        found: list[float] = sums.tolist()
        if not all(map(math.isfinite, found)):
            return [*found, math.nan]
        project(self)
        self.model.optimizer.clip_grad = max_grad_norm
        self.model.step()
        return [*found, float(self.model.get_global_grad_norm())]


def prepare(accelerator: Accelerator, model: Any, optimizer: Optimizer) -> Engine:
    """Prepare a model and its optimizer for the launch at hand."""
    kind = DeepSpeedEngine if accelerator.distributed_type == DistributedType.DEEPSPEED else Engine
    return kind(accelerator, model, optimizer)
