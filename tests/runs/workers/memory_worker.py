"""Started by `accelerate launch`: the memory plan of a run, and what each of its phases really holds, as one line of JSON.

The one argument is the fields of an UnlearnArgs as JSON. Measured is anonymous resident memory (`RssAnon`), less its value before
the model is loaded, at its largest in each phase; tensors are given back to the system when they are freed if
`MALLOC_MMAP_THRESHOLD_` is set. A run of a tiny model goes before, so that what libraries hold is not counted.
"""

import dataclasses
import functools
import gc
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

from distributed_worker import switch_fsdp_on

import dualoptim.unlearn as unlearn
from dualoptim import UnlearnArgs, run
from dualoptim.config.cli import main
from dualoptim.memory_plan import plan
from dualoptim.method.engine import Engine
from dualoptim.models.launch import start_accelerator


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Meter(threading.Thread):
    """Keeps the largest `resident` of each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = defaultdict(int)
        self.phase = "before"
        self.start()

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.005)

    def look(self) -> None:
        phase = self.phase
        self.peaks[phase] = max(self.peaks[phase], resident())

    def enter(self, phase: str) -> str:
        self.look()
        self.phase, before = phase, self.phase
        self.look()
        return before

    def during(self, phase, function):
        """`function`, in a phase of its own."""

        @functools.wraps(function)
        def metered(*args, **kwargs):
            before = self.enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return metered


def watch(meter: Meter) -> None:
    """Have the phases of a run counted apart; "prepare" lasts until the first step's state is there."""
    unlearn.load_model = meter.during("load", unlearn.load_model)
    unlearn.evaluate_model = meter.during("evaluate", unlearn.evaluate_model)
    unlearn.export_model = meter.during("save", unlearn.export_model)
    unlearn.release = meter.during("release", unlearn.release)
    unlearn._train = meter.during("train", unlearn._train)
    for kind in (Engine, *Engine.__subclasses__()):
        kind.__init__ = meter.during("prepare", kind.__init__)
        kind.step = first_apart(meter, kind.step)


def first_apart(meter: Meter, step):
    """The first step counts as preparation."""
    taken = []

    def metered(*args):
        if taken:
            return step(*args)
        taken.append(True)
        return meter.during("prepare", step)(*args)

    return metered


def measure(fields: dict) -> None:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    args = UnlearnArgs(**fields)
    accelerator = start_accelerator(args)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        switch_fsdp_on(accelerator)
    planned = plan(args, accelerator)
    run(dataclasses.replace(args, model=os.environ["TINY"], output_dir=f"{args.output_dir}-tiny"))
    gc.collect()
    before, meter = resident(), Meter()
    watch(meter)
    run(args)
    peaks = {phase: peak - before for phase, peak in meter.peaks.items()}
    accelerator.print(json.dumps({"before": before, "planned": str(planned), "measured": peaks}))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.argv, fields = sys.argv[:1], json.loads(sys.argv[1])
    main(UnlearnArgs, lambda _: measure(fields))
