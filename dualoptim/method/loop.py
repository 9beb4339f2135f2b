"""Train: phases of optimizer steps over one set of weights.

A phase has the terms of its loss, a rate and a norm to clip to. Unlearning has a forget and a retain phase, mostly of one
term each, the joint baseline one phase with both terms, fine-tuning one phase with one.

    for record in steps(engine, phases, plan):
        log.add(record)
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dualoptim.errors import NonFiniteError
from dualoptim.method.device import added_up, casting_once
from dualoptim.method.engine import Engine
from dualoptim.method.held import held
from dualoptim.method.schedule import Plan, phase_at, phase_step
from dualoptim.method.scores import score
from dualoptim.method.sharpness import passes
from dualoptim.method.window import Phase, make_ahead

Record = dict[str, Any]


def steps(engine: Engine, phases: dict[str, Phase], plan: Plan, taken: int = 0) -> Iterator[Record]:
    """Take the steps of `plan` that follow the first `taken`, one whenever the next record is asked for.

    A record is a line of log.jsonl: step (from 1), epoch, phase, lr, loss, grad_norm, count, tokens, seconds. With `taken`,
    the state that those steps left has been loaded before.

    Raises:
        NonFiniteError: naming step and phase, before the step that would have spoiled the weights.
    """
    for step in range(taken, plan.last_step):
        started = time.perf_counter()
        name = phase_at(step, plan.cycle)
        lr = phases[name].learning_rate * plan.lr_factor(step)
        state, _, corpus = name.partition(" ")  # a corpus has phases of its own, over the optimizer states of all
        engine.use_phase(state, lr)
        place, following = f"step {step + 1} ({name})", partial(make_ahead, phases, plan, step + 1)
        record = take_step(engine, phases[name], phase_step(step, plan.cycle), place, following)
        at = {"step": step + 1, "epoch": round((step + 1) / plan.steps_per_epoch, 4), "phase": state, "lr": lr}
        record = at | ({"corpus": corpus} if corpus else {}) | record
        record |= engine.largest_update() | (held(engine) if step == 0 else {})
        yield record | {"seconds": round(time.perf_counter() - started, 4)}


def take_step(
    engine: Engine, phase: Phase, index: int, place: str, meanwhile: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Take one optimizer step, the phase's `index`-th from 0, and return its part of the record.

    The loss of a single term comes before its coefficient; of several it is the weighted sum, and each stands beside it.
    The counts of all micro-batches and processes are added up before the first backward pass, and each sum is divided by that
    one count, so the gradient is the mean over everything the step sees, however it is cut. Once the device has all its work,
    `meanwhile` is done on the host, and then the numbers of the step are read, at once.
    """
    # ---- the window: this process's micro-batches of this step
    accelerator, names, window = engine.accelerator, list(phase.terms), phase.window(index)
    own = [sum(phase.terms[name].objective.count(batch) for which, batch in window if which == name) for name in names]
    # the index goes along, so that processes which are at different steps are found out, and whether a signal ends the run
    tokens, stop = sum(batch.num_tokens for _, batch in window), int(engine.asked_to_stop())
    *counted, indices, engine.stops, tokens = added_up(accelerator, [*own, index, stop, tokens])
    if indices != index * accelerator.num_processes:
        raise RuntimeError(f"{place}: the processes are at different steps; they must be started with the same arguments")

    # ---- forward and backward
    counts = dict(zip(names, counted, strict=True))
    sums = torch.zeros(len(names), device=accelerator.device)
    for is_first in passes(engine, phase.sam_rho):
        with casting_once(accelerator.device, len(window)):
            for position, (name, batch) in enumerate(window):
                term = phase.terms[name]
                with engine.micro_batch(is_last=position == len(window) - 1):
                    total = term.objective(score(engine.model, batch, term.objective.layer))
                    # data-parallel processes average their gradients; times their number, the average is the sum again
                    engine.backward(term.coefficient * total * (accelerator.num_processes / counts[name]))
                sums[names.index(name)] += is_first * total.detach()

    # ---- check, clip, update
    *totals, norm = engine.step(phase.max_grad_norm, accelerator.reduce(sums, "sum"), meanwhile)
    losses = {name: total / counts[name] for name, total in zip(names, totals, strict=True)}
    apart = {f"{name}_loss": value for name, value in losses.items()} if len(losses) > 1 else {}
    loss = sum(phase.terms[name].coefficient * value for name, value in losses.items()) if apart else losses[names[0]]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(f"{place}: loss {loss:g}, gradient norm {norm:g}; lower the rate or clip the gradient harder")
    return {"loss": loss, "grad_norm": norm, "count": sum(counts.values()), "tokens": tokens, **apart}
