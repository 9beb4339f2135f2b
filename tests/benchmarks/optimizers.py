"""Optimizer steps: seconds against one fused AdamW of torch, and how they grow with the parameters.

Part `optimizer` of speed.py.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from contest import spread
from growth import exponent

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.method import fused
from dualoptim.method.groups import decay_groups
from dualoptim.method.held import state_size
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def optimizer(args: dict[str, Any], rounds: int) -> None:
    """One optimizer step of each kind, the gradients being there; and what its state takes."""
    accelerator = start_accelerator(UnlearnArgs(**args))
    model = load_model(UnlearnArgs(**args), accelerator).model
    kinds: dict[str, dict[str, Any] | None] = {
        "torch.optim.AdamW(fused=True)": None,
        "dual-adamw": {},
        "dual-adamw --decouple m": {"decouple": "m"},
        "dual-adamw-plus": {"optim": "dual-adamw-plus"},
        "dual-adamw-plus as written": {"optim": "dual-adamw-plus"},
        "adamw, 8 bits": {"optim": "adamw", "optim_bits": 8},
        "dual-adamw, 8 bits": {"optim_bits": 8},
        "dual-adamw-plus, 8 bits": {"optim": "dual-adamw-plus", "optim_bits": 8},
    }
    steps: dict[str, Callable[[], Any]] = {}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    for name, changes in kinds.items():
        if changes is None:
            made: Any = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        else:
            own = UnlearnArgs(**changes)
            made = kind_of(own).build(own)(decay_groups(model, own.weight_decay, own.state_bits, False))
        step = as_written(made.step) if name.endswith("as written") else made.step
        started = time.perf_counter()
        step()
        first_step = time.perf_counter() - started
        (bytes_32, parameters_32), (bytes_8, parameters_8) = state_size(made, False), state_size(made, True)
        label = f"{name}: {bytes_32 / parameters_32:.2f} bytes a parameter"
        if parameters_8:
            label += f", {bytes_8 / parameters_8:.2f} of quantized ones"
        steps[f"{label}; first step {first_step:.1f} s"] = step
    print("\none optimizer step")
    in_turn(steps, 3 * rounds)


def in_turn(steps: dict[str, Callable[[], Any]], rounds: int) -> list[float]:
    """Time calls one after another, and print the seconds of each and its ratio to the first; the medians of those."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    (_, first), *_ = seconds.items()
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, first, strict=True)]
        print(f"  {name:<95} {statistics.median(times):.4f} s, {spread(ratios)}", flush=True)
    return [statistics.median(times) for times in seconds.values()]


def as_written(step: Callable[[], Any]) -> Callable[[], None]:
    """The same step, but never compiled."""

    def eager() -> None:
        kept, fused.COMPILED_FROM = fused.COMPILED_FROM, 2**60
        step()
        fused.COMPILED_FROM = kept

    return eager


def optimizer_growth(rounds: int) -> None:
    """How the time of a step grows with the number of parameters, in tensors of a million, whatever the model."""
    kinds: dict[str, dict[str, Any]] = {"dual-adamw": {}, "dual-adamw-plus": {"optim": "dual-adamw-plus"}}
    kinds |= {"dual-adamw, 8 bits": {"optim_bits": 8}}
    sizes, found = (10, 40, 120, 360), []
    for size in sizes:
        tensors = [torch.nn.Parameter(torch.zeros(2**20)) for _ in range(size)]
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 1e-3)
        print(f"\none optimizer step, {size} million parameters")
        single, medians = torch.optim.AdamW(tensors, lr=0.0, fused=True), []
        for name, changes in kinds.items():  # one after another, for their states would not fit beside each other
            own = UnlearnArgs(**changes)
            made = kind_of(own).build(own)([{"params": tensors, "decayed": True, "weight_decay": 0.01, "bits": own.state_bits}])
            for step in (single.step, made.step):
                step()
            medians.append(in_turn({"torch.optim.AdamW(fused=True)": single.step, name: made.step}, rounds)[1])
        found.append(medians)
    for name, times in zip(kinds, zip(*found, strict=True), strict=True):
        print(f"  {name}: exponent {exponent(sizes, [*times]):.2f}")
