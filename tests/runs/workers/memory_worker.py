"""Started by `accelerate launch`: what each phase of a run is planned to take, by parts, and really takes; one line of JSON.

The one argument is the fields of an UnlearnArgs as JSON, and `tiny`, the folder of a model that goes before, so that what
libraries hold is not counted. Measured is anonymous resident memory (`RssAnon`) at its largest, less its value before the model
is loaded; freed tensors are given back to the system if `MALLOC_MMAP_THRESHOLD_` is set.
"""

import contextlib
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

import dualoptim.models.current as current
import dualoptim.unlearn as unlearn
from dualoptim import UnlearnArgs, run
from dualoptim.config.cli import main
from dualoptim.memory_plan import plan
from dualoptim.models.launch import start_accelerator
from dualoptim.models.peaks import LIBRARIES


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
    """Have the phases of a run counted apart."""
    current.load_model = meter.during("load", current.load_model)
    unlearn.evaluate_model = meter.during("evaluate", unlearn.evaluate_model)
    unlearn.export_model = meter.during("save", unlearn.export_model)
    unlearn._train = meter.during("train", unlearn._train)
    real = unlearn.training

    @contextlib.contextmanager
    def training(*args):
        with contextlib.ExitStack() as stack:
            engine = meter.during("prepare", stack.enter_context)(real(*args))
            step, taken = engine.step, []

            def first_apart(*args):
                name = "train" if taken else "first step"
                taken.append(name)
                return meter.during(name, step)(*args)

            engine.step = first_apart
            yield engine

    unlearn.training = training


def measure(fields: dict) -> None:
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    tiny = fields.pop("tiny")
    args = UnlearnArgs(**fields)
    accelerator = start_accelerator(args)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        switch_fsdp_on(accelerator)
    planned = plan(args, accelerator)
    run(dataclasses.replace(args, model=tiny, output_dir=f"{args.output_dir}-tiny"))
    gc.collect()
    before, meter = resident(), Meter()
    watch(meter)
    run(args)
    result = {}
    for phase in planned.phases:
        parts = [dataclasses.asdict(side) for side in (phase.device, phase.host)]
        planned_parts = {name: sum(side[name] for side in parts) for name in parts[0]}
        planned_parts["context"] -= LIBRARIES
        result[phase.name] = [planned_parts, meter.peaks[phase.name] - before]
    accelerator.print(json.dumps(result))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.argv, fields = sys.argv[:1], json.loads(sys.argv[1])
    main(UnlearnArgs, lambda _: measure(fields))
