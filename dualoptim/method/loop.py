"""The training loop: phases of optimizer steps over one set of weights.

A phase is a name, the terms of its loss, a rate and a norm to clip to. Unlearning has a forget and a retain phase with one
term each, the joint baseline one phase with two terms, fine-tuning one phase with one.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.optim import Optimizer

from dualoptim.config.args import TrainArgs
from dualoptim.models.checkpoint import load_checkpoint
from dualoptim.data.tofu import Example, Stream
from dualoptim.errors import NonFiniteError
from dualoptim.method.objectives import Objective
from dualoptim.models.load import Policy, is_sharded
from dualoptim.method.dual import MakeOptimizer, decay_groups, measure_state, set_phase
from dualoptim.models.reference import Reader
from dualoptim.method.schedule import Cycle, lr_factor, phase_at, phase_step, steps_per_epoch
from dualoptim.method.scores import Batch, score
from dualoptim.reporting.log import StepLog


@dataclass(frozen=True)
class Term:
    """One objective, the examples it reads, the factor of its loss, and what the frozen model says if it asks for that."""

    objective: Objective
    stream: Stream
    coefficient: float = 1.0
    reference: Reader | None = None


@dataclass(frozen=True)
class Phase:
    """What an optimizer step of one phase does."""

    terms: dict[str, Term]
    learning_rate: float
    max_grad_norm: float  # 0: no clipping


@dataclass(frozen=True)
class Plan:
    """How many steps, in which cycle of phases, at which rate."""

    cycle: Cycle
    steps_per_epoch: int
    total_steps: int  # what the rate decays over
    last_step: int  # where the run ends: total_steps, or earlier with --max-steps
    warmup_steps: int

    @staticmethod
    def of(args: TrainArgs, cycle: Cycle, rows: int, global_batch: int) -> "Plan":
        """The plan for `rows` rows in the cycle's first phase and `global_batch` rows per step."""
        per_epoch = steps_per_epoch(rows, global_batch, cycle)
        total = args.num_epochs * per_epoch
        warmup = round(args.warmup_epochs * per_epoch) if per_epoch > 1 else 0
        return Plan(cycle, per_epoch, total, min(args.max_steps or total, total), min(warmup, total - 1))


def train(
    policy: Policy,
    accelerator: Accelerator,
    phases: dict[str, Phase],
    plan: Plan,
    args: TrainArgs,
    make_optimizer: MakeOptimizer,
    log: StepLog,
    after_epoch: Callable[[int, Sequence[dict[str, Any]]], bool] | None = None,
    checkpoint: Path | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `policy.model` over the steps of `plan`, and leave it prepared: to be saved, and then released.

    It goes on after the steps that `log` holds, whose state is in `checkpoint`. `after_step` gets the number of steps taken.
    `after_epoch(epoch, records)` may return True to stop early.

    Raises:
        NonFiniteError: naming step and phase, before the step that would have spoiled the weights.
    """
    torch.manual_seed(args.seed)
    raw_model = policy.model
    raw_optimizer = make_optimizer(decay_groups(raw_model, args.weight_decay, args.state_bits, args.quantize_embeddings))
    if args.gradient_checkpointing:
        raw_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.model, optimizer = accelerator.prepare(raw_model, raw_optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        assert policy.model.basic_optimizer is raw_optimizer, "DeepSpeed has replaced the optimizer"
    if accelerator.distributed_type == DistributedType.FSDP and hasattr(raw_optimizer, "materialize"):
        raw_optimizer.materialize()  # its checkpoints fill only the state that exists when they are loaded
    policy.model.train()
    embeddings, head = raw_model.get_input_embeddings(), raw_model.get_output_embeddings()
    # where both are one tensor, its dense gradient comes from the head, and that of the embeddings needs no second one
    embeddings.sparse = not is_sharded(accelerator) and head is not None and head.weight is embeddings.weight
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
    try:
        for step in range(len(log.records), plan.last_step):
            started = time.perf_counter()
            name = phase_at(step, plan.cycle)
            lr = phases[name].learning_rate * lr_factor(step, plan.total_steps, plan.warmup_steps)
            set_phase(raw_optimizer, name, lr)
            record, losses = _step(
                policy, accelerator, optimizer, phases[name], phase_step(step, plan.cycle), f"step {step + 1} ({name})"
            )
            seconds = time.perf_counter() - started
            epoch = (step + 1) / plan.steps_per_epoch
            if hasattr(raw_optimizer, "largest_update"):
                largest = raw_optimizer.largest_update.to(accelerator.device).reshape(1)
                record["largest_update"] = float(accelerator.gather(largest).max())
            if step == 0:
                record |= _held(accelerator, policy, raw_optimizer)
            log.add(
                {"step": step + 1, "epoch": round(epoch, 4), "phase": name, "lr": lr, **record, "seconds": round(seconds, 4)},
                losses,
            )
            if after_step:
                after_step(step + 1)
            epoch_ended = (step + 1) % plan.steps_per_epoch == 0
            if after_epoch and epoch_ended and after_epoch(round(epoch), log.records[-plan.steps_per_epoch :]):
                break
    finally:
        embeddings.sparse = False
        if args.gradient_checkpointing:
            accelerator.unwrap_model(policy.model).gradient_checkpointing_disable()


def _step(
    policy: Policy, accelerator: Accelerator, optimizer: Optimizer, phase: Phase, phase_index: int, place: str
) -> tuple[dict[str, Any], dict[str, float]]:
    """One optimizer step of one phase: its log record, and the loss of each term before its coefficient.

    The counts of all micro-batches and processes are added up before the first backward pass, and each sum is divided by that
    one count, so the gradient is the mean over everything the step sees, however it is cut.
    """
    # ---- the window: this process's micro-batches of this step
    window = [
        (name, examples, policy.batch(examples, accelerator.device))
        for name, term in phase.terms.items()
        for examples in term.stream.window(phase_index)
    ]
    names = list(phase.terms)
    totals = torch.zeros(len(names) + 2, dtype=torch.int64)
    totals[-2] = phase_index
    for name, _, batch in window:
        totals[names.index(name)] += phase.terms[name].objective.count(batch)
        totals[-1] += batch.num_tokens
    *counts, indices, tokens = accelerator.reduce(totals.to(accelerator.device), "sum").tolist()
    if indices != phase_index * accelerator.num_processes:
        raise RuntimeError(f"{place}: the processes are at different steps; they must be started with the same arguments")

    # ---- forward and backward; gradients of all but the last micro-batch stay on their process
    model = policy.model
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    sums = torch.zeros(len(names), device=accelerator.device)
    for position, (name, examples, batch) in enumerate(window):
        is_last = position == len(window) - 1
        term, index = phase.terms[name], names.index(name)
        if deepspeed:
            model.set_gradient_accumulation_boundary(is_last)
        with contextlib.nullcontext() if is_last or deepspeed else accelerator.no_sync(model):
            total = _sum(model, term, examples, batch, accelerator.device)
            # data-parallel processes average their gradients; times their number, the average is the sum again
            loss = term.coefficient * total * (accelerator.num_processes / counts[index])
            # accelerator.backward would take DeepSpeed's step at once, before anything is checked
            model.backward(loss) if deepspeed else accelerator.backward(loss)
        sums[index] += total.detach()
    sums = accelerator.reduce(sums, "sum")
    losses = {name: float(total) / count for name, total, count in zip(names, sums, counts, strict=True)}

    # ---- clip, check, step
    weighted = sum(losses.values()) if len(losses) == 1 else sum(phase.terms[n].coefficient * v for n, v in losses.items())
    norm = math.nan
    if deepspeed and math.isfinite(weighted):
        model.optimizer.clip_grad = phase.max_grad_norm
        model.step()  # clips; skips the update by itself if the norm is not finite
        norm = float(model.get_global_grad_norm())
    elif not deepspeed:
        norm = float(accelerator.clip_grad_norm_(model.parameters(), phase.max_grad_norm or math.inf))
    if not (math.isfinite(weighted) and math.isfinite(norm)):
        raise NonFiniteError(f"{place}: loss {weighted:g}, gradient norm {norm:g}; lower the rate or clip the gradient harder")
    if not deepspeed:
        optimizer.step()
        optimizer.zero_grad()
    record: dict[str, Any] = {"loss": weighted, "grad_norm": norm, "count": int(sum(counts)), "tokens": int(tokens)}
    if len(losses) > 1:
        record |= {f"{name}_loss": value for name, value in losses.items()}
    return record, losses


def _sum(model: Any, term: Term, examples: list[Example], batch: Batch, device: torch.device) -> Tensor:
    """A term's loss summed over a micro-batch. Scores end here: the backward pass, and the next forward, need the space."""
    objective, scores = term.objective, score(model, batch, term.objective.layer)
    if term.reference:
        scores = replace(scores, reference=term.reference(examples, device))
    return objective.loss(scores, objective.beta, objective.gamma)[0]


def _held(accelerator: Accelerator, policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """What this run really holds, measured: types of the weights and of their masters, bytes of state per parameter.

    The masters are what the optimizer updates: the weights themselves, or (DeepSpeed under bf16) copies of them in float32.
    """
    size = measure_state(optimizer)
    sizes = torch.tensor([size.bytes_32, size.parameters_32, size.bytes_8, size.parameters_8], device=accelerator.device)
    bytes_32, parameters_32, bytes_8, parameters_8 = accelerator.reduce(sizes, "sum").tolist()
    weights = {str(p.dtype).removeprefix("torch.") for p in policy.model.parameters() if p.requires_grad}
    held: dict[str, Any] = {"weights": "+".join(sorted(weights)), "masters": "+".join(sorted(size.dtypes))}
    if parameters_32:
        held["state_bytes_per_parameter"] = round(bytes_32 / parameters_32, 4)
    if parameters_8:
        held["state_bytes_per_quantized_parameter"] = round(bytes_8 / parameters_8, 4)
        held["quantized_share"] = round(parameters_8 / (parameters_8 + parameters_32), 4)
    return held
