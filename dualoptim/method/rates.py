"""Say at which share of its base rate a step is taken: pure functions of the step number, from 0."""

import math


def lr_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Compute the share of the base rate at `step`: linear warm-up, then what `schedule` says, over the steps of all phases.

    `published` decays linearly and is never zero: it counts steps from one on the way up and includes the last step on the way
    down. With four steps and a warm-up of two the factors are 1/2, 1, 1, 1/2.

    `linear`, `constant` and `cosine` (half a period) are those of transformers (optimization.py), whose warm-up starts at zero:
    the first step (a forget step here) moves nothing then.
    """
    if schedule == "published":
        rising, falling = (step + 1) / max(1, warmup_steps), (total_steps - step) / max(1, total_steps - warmup_steps)
        return rising if step < warmup_steps else falling
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    after, decaying = step - warmup_steps, max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / decaying)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (after / decaying))))
