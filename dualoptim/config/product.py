"""Turn lists of settings into single ones: every pair of objectives x rate (x forget rate x seed) is a run of its own."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.flags import default_of
from dualoptim.config.optimizers import kind_of
from dualoptim.method.objectives import FORGET, RETAIN, flags_of, split_objectives


def single_runs(args: UnlearnArgs, forget_lrs: Sequence[float] = (), seeds: Sequence[int] = ()) -> Iterator[UnlearnArgs]:
    """Give the arguments of every run, each with one pair of objectives and one rate, and without constants of other pairs."""
    lists = (args.forget_losses, args.rates, forget_lrs or (args.forget_lr,), seeds or (args.seed,))
    for pair, rate, forget_lr, seed in itertools.product(*lists):
        others = flags_of([*FORGET.values(), *RETAIN.values()]) - flags_of(split_objectives(pair))
        own_rate = forget_lr or rate if kind_of(args).alternates else None
        single: dict[str, Any] = {"forget_losses": (pair,), "learning_rates": (rate,), "forget_lr": own_rate, "seed": seed}
        yield replace(args, **single | {name: default_of(UnlearnArgs, name) for name in others})
