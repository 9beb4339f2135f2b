"""Turn lists of settings into single ones: every pair of objectives x rate (x forget rate x seed) is a run of its own."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.flags import default_of
from dualoptim.config.optimizers import OF_RETAIN_STEPS, kind_of
from dualoptim.method.objectives import FORGET, RETAIN, flags_of, split_objectives


def single_runs(args: UnlearnArgs, forget_lrs: Sequence[float] = (), seeds: Sequence[int] = ()) -> Iterator[UnlearnArgs]:
    """Give the arguments of every run, each with one pair of objectives and one rate, without what other pairs alone have."""
    lists = (args.forget_losses, args.rates, forget_lrs or (args.forget_lr,), seeds or (args.seed,))
    kind = kind_of(args)
    for pair, rate, forget_lr, seed in itertools.product(*lists):
        others = flags_of([*FORGET.values(), *RETAIN.values()]) - flags_of(split_objectives(pair))
        others |= set(OF_RETAIN_STEPS if pair.endswith("+none") else ())
        times = float(f"{rate * (args.forget_strength or kind.forget_strength):.12g}")  # 3e-5, not 3.0000000000000004e-05
        own_rate = forget_lr or times if kind.alternates else None
        single: dict[str, Any] = {"forget_losses": (pair,), "learning_rates": (rate,), "forget_lr": own_rate, "seed": seed}
        single["forget_strength"] = None  # the rate says it
        yield replace(args, **single | {name: default_of(UnlearnArgs, name) for name in others})


def sequences(args: UnlearnArgs) -> list[UnlearnArgs]:
    """List the arguments of every sequence of tasks from the first model on: each of one split, or of one task of it."""
    tasks: list[dict[str, Any]] = [{}]
    if args.tasks_independent:
        targets = [(target,) for target in args.targets] if args.targets else [None] * len(args.task_list)
        tasks = [{"task_list": (task,), "targets": own} for task, own in zip(args.task_list, targets, strict=True)]
    return [replace(args, split=(split,), **one) for split in args.split for one in tasks]
