"""Keep a moving mean of the weights at the ends of cycles and of the run, which is a run's result in place of the last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dualoptim.method.kernels import own_part
from dualoptim.method.schedule import Plan, cycle_length

if TYPE_CHECKING:
    from dualoptim.method.engine import Engine


def average(engine: Engine, plan: Plan, step: int) -> None:
    """Take the weights after `step`, from 1, into their mean if a cycle ends there: after its retain steps, which mend most.

        mean <- d mean + (1 - d) w

    from the weights after the first cycle on, with the engine's decay d (a mean of weights as in arXiv 1703.01780, taken at the
    ends of cycles as in arXiv 1803.05407). The weights that train stay as they are.
    """
    if engine.average_cycles and step % cycle_length(plan.cycle) == 0:
        _take_in(engine)


@torch.no_grad()
def put_mean(engine: Engine, plan: Plan) -> None:
    """Make the mean the weights, if there is one, now that all steps have been taken.

    Where `--max-steps` ends the run within a cycle the last weights count as well: not before now, because a run that goes on
    with more steps, from a checkpoint, does not end there.
    """
    if engine.average_cycles and plan.last_step % cycle_length(plan.cycle):
        _take_in(engine)
    for parameter, mean in engine.means.items():
        own_part(parameter.detach()).copy_(own_part(mean))


def _take_in(engine: Engine) -> None:
    weights = {parameter: parameter.detach() for parameter in engine.model.parameters() if parameter.requires_grad}
    if not engine.means:
        engine.means |= {parameter: weight.clone() for parameter, weight in weights.items()}
        return
    means = [own_part(engine.means[parameter]) for parameter in weights]
    get_ema_multi_avg_fn(engine.average_cycles)(means, [own_part(weight) for weight in weights.values()], None)
