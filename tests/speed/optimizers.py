"""Optimizer steps: their seconds against one fused AdamW of torch, and how these grow with the parameters.

Part `optimizer` of speed.py.
"""

import statistics
import time
from typing import Any
from unittest.mock import patch

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

AS_WRITTEN = ", as written"  # never compiled
KINDS: dict[str, dict[str, Any]] = {
    "dual-adamw": {},
    "dual-adamw --decouple m": {"decouple": "m"},
    f"dual-adamw --decouple m{AS_WRITTEN}": {"decouple": "m"},
    "dual-adamw-plus": {"optim": "dual-adamw-plus"},
    f"dual-adamw-plus{AS_WRITTEN}": {"optim": "dual-adamw-plus"},
    "adamw, 8 bits": {"optim": "adamw", "optim_bits": 8},
    "dual-adamw, 8 bits": {"optim_bits": 8},
    "dual-adamw-plus, 8 bits": {"optim": "dual-adamw-plus", "optim_bits": 8},
}


def optimizer(args: dict[str, Any], rounds: int) -> None:
    """One optimizer step of each kind, the gradients being there; and what its state takes."""
    model = load_model(UnlearnArgs(**args), start_accelerator(UnlearnArgs(**args))).model
    print(f"\none optimizer step, {model.num_parameters():,} parameters, {torch.get_num_threads()} threads", flush=True)
    for name in KINDS:
        beside_one_adamw(name, model, 3 * rounds)


def optimizer_growth(rounds: int) -> None:
    """How the time of a step grows with the number of parameters, in layers of a million."""
    sizes, kinds = (10, 40, 120, 360), ("dual-adamw", "dual-adamw-plus", "dual-adamw, 8 bits")
    found = []
    for size in sizes:
        print(f"\none optimizer step, {size} layers of 2^20 parameters", flush=True)
        layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024, bias=False) for _ in range(size))
        found.append([beside_one_adamw(name, layers, 2 * rounds) for name in kinds])
    for name, times in zip(kinds, zip(*found, strict=True), strict=True):
        print(f"  {name}: exponent {exponent(sizes, [*times]):.2f}", flush=True)


def beside_one_adamw(name: str, model: torch.nn.Module, rounds: int) -> float:
    """Take steps of a kind in turn with torch's fused AdamW over the same weights; returns the median of its seconds."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    own = UnlearnArgs(**KINDS[name])
    made = kind_of(own).build(own)(decay_groups(model, own.weight_decay, own.state_bits, False))
    single = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    single.step()
    with patch.object(fused, "COMPILED_FROM", 2**60 if name.endswith(AS_WRITTEN) else 0):  # as after so many steps
        seconds: list[tuple[float, float]] = []
        for _ in range(1 + rounds):
            times = [time.perf_counter()]
            for step in (single.step, made.step):
                step()
                times.append(time.perf_counter())
            seconds.append((times[1] - times[0], times[2] - times[1]))
    (_, first), *others = seconds
    (bytes_32, parameters_32), (bytes_8, parameters_8) = state_size(made, False), state_size(made, True)
    label = f"{name}: {bytes_32 / parameters_32:.2f} bytes a parameter" if parameters_32 else name
    label += f", {bytes_8 / parameters_8:.2f} of quantized ones" if parameters_8 else ""
    median = statistics.median(step for _, step in others)
    beside = statistics.median(step for step, _ in others)
    ratios = spread([step / theirs for theirs, step in others])
    print(f"  {label:<76} {median:.4f} s ({first:.1f} the first) against {beside:.4f}: {ratios}", flush=True)
    return median
