"""What a step sees: the micro-batches of its phase's objectives, made while the device still works on the step before."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dualoptim.method.objectives import Objective
from dualoptim.method.schedule import Plan, phase_at, phase_step
from dualoptim.method.scores import Batch


@dataclass(frozen=True)
class Term:
    """One objective, the factor of its loss, and what gives this process's micro-batches of the phase's k-th step, from 0."""

    objective: Objective
    micro_batches: Callable[[int], Iterator[Batch]]
    coefficient: float = 1.0


@dataclass(frozen=True)
class Phase:
    """What an optimizer step of one phase does."""

    terms: dict[str, Term]
    learning_rate: float
    max_grad_norm: float  # 0: no clipping
    sam_rho: float = 0.0  # how far the weights are moved for a second pass; 0: there is one
    _made: dict[int, list[tuple[str, Batch]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def window(self, index: int) -> list[tuple[str, Batch]]:
        """Give the micro-batches of the `index`-th step, each with its term's name: those that `make` has made, or new ones."""
        if index not in self._made:
            self.make(index)
        return self._made.pop(index)

    def make(self, index: int) -> None:
        """Make the micro-batches of the `index`-th step ahead of it. They follow from it alone, whether it is taken or not."""
        self._made[index] = [(name, batch) for name, term in self.terms.items() for batch in term.micro_batches(index)]


def make_ahead(phases: dict[str, Phase], plan: Plan, step: int) -> None:
    """Make the window of a step ahead of it, if it is one of the plan."""
    if step < plan.last_step:
        phases[phase_at(step, plan.cycle)].make(phase_step(step, plan.cycle))
