"""Say which phase a step serves, and how many steps there are: pure functions of the step number.

A *cycle* is the repeating pattern of phases, for example `(("forget", 1), ("retain", 5))`: one forget step, then five
retain steps, again and again. Because everything here is a function of the step alone, a resumed run needs nothing
but its step number to continue as if it had never stopped.
"""

import math
from dataclasses import dataclass

from dualoptim.method.rates import lr_factor

Cycle = tuple[tuple[str, int], ...]


def cycle_length(cycle: Cycle) -> int:
    """Count the optimizer steps in one cycle."""
    return sum(length for _, length in cycle)


def phase_at(step: int, cycle: Cycle) -> str:
    """Name the phase that optimizer step `step` (from 0) serves."""
    position = step % cycle_length(cycle)
    for phase, length in cycle:
        if position < length:
            return phase
        position -= length
    raise AssertionError("a position is always inside its cycle")


def phase_step(step: int, cycle: Cycle) -> int:
    """Count how many earlier steps served the same phase as `step`: the phase's own counter, from 0."""
    phase = phase_at(step, cycle)
    full, position = divmod(step, cycle_length(cycle))
    per_cycle = sum(length for name, length in cycle if name == phase)
    in_this_cycle = sum(phase_at(earlier, cycle) == phase for earlier in range(position))
    return full * per_cycle + in_this_cycle


def steps_per_epoch(rows: int, global_batch: int, cycle: Cycle) -> int:
    """Count the optimizer steps of all phases in one epoch, which is one pass over the rows of the cycle's first phase.

    `global_batch` is in examples: batch size x accumulation x processes. A started cycle is finished, so every epoch
    has the same mix of phases.
    """
    first_phase_steps = math.ceil(rows / global_batch)
    return math.ceil(first_phase_steps / cycle[0][1]) * cycle_length(cycle)


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes, in which cycle of phases, at which share of the base rate."""

    cycle: Cycle
    steps_per_epoch: int
    num_epochs: int
    warmup_epochs: float = 0.0
    max_steps: int = 0  # so many, fewer or more than the epochs have; 0: theirs
    warmup: int | None = None  # steps of warm-up, in place of epochs
    schedule: str = "published"

    @property
    def total_steps(self) -> int:
        """Count the steps that the rate decays over: those of all epochs, or of a run that goes on beyond them."""
        return max(self.num_epochs * self.steps_per_epoch, self.max_steps)

    @property
    def last_step(self) -> int:
        """Say where the run ends."""
        return self.max_steps or self.total_steps

    @property
    def warmup_steps(self) -> int:
        """Count the steps of warm-up; as published, a step is left to decay, and a run of one step an epoch has none."""
        published = self.schedule == "published"
        epochs = 0.0 if published and self.steps_per_epoch == 1 else self.warmup_epochs
        warmup = round(epochs * self.steps_per_epoch) if self.warmup is None else self.warmup
        return min(warmup, self.total_steps - 1) if published else warmup

    def lr_factor(self, step: int) -> float:
        """Compute the share of the base rate at `step`, from 0."""
        return lr_factor(self.schedule, step, self.total_steps, self.warmup_steps)

    def steps_of(self, phase: str) -> int:
        """Count how many steps of this phase the run takes."""
        return sum(phase_at(step, self.cycle) == phase for step in range(self.last_step))
