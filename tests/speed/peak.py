"""How many bytes of tensors a cycle of steps holds at once, on a CPU."""

import itertools
from collections import deque
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.data.own import open_source
from dualoptim.method.held import state_size
from dualoptim.method.schedule import cycle_length
from dualoptim.models.launch import release, start_accelerator, training
from dualoptim.models.load import load_model
from dualoptim.models.saving import Saving, steps_of
from dualoptim.models.work import TaskRows, work_of


def peak(work: Callable[[], object]) -> int:
    """Measure how many bytes of tensors `work` holds at once, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def cycle_peak(args: UnlearnArgs) -> int:
    """Measure what the second cycle of a run holds: weights, states, means, and what its steps add to them."""
    loaded, source = load_model(args, start_accelerator(args)), open_source(args)
    rows = TaskRows(source.task_rows(args.split[0], 1), source.retain_rows(args.split[0], [1]), [])
    work = work_of(args, rows, loaded)
    with training(loaded, args, kind_of(args).build(args)) as engine:
        records = steps_of(engine, work, Saving(), [])

        def cycle() -> None:
            deque(itertools.islice(records, cycle_length(work.plan.cycle)), 0)

        cycle()  # now all states are there
        kept = (*engine.model.parameters(), *engine.means.values())
        held = sum(one.nbytes for one in kept) + sum(state_size(engine.raw_optimizer, eight)[0] for eight in (False, True))
        added = peak(cycle)
    release(loaded)
    return held + added
