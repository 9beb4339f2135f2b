"""Take the steps of a training with checkpoints between them: every so many, and where a signal ends it."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from dualoptim.config.args import CommonArgs
from dualoptim.method.averaging import average, put_mean
from dualoptim.method.engine import Engine
from dualoptim.method.loop import Record, steps
from dualoptim.models.checkpoint import load_checkpoint, save_checkpoint, step_of
from dualoptim.models.launch import say
from dualoptim.models.together import stop_together
from dualoptim.models.work import Work


@dataclass(frozen=True)
class Saving:
    """Hold where a training writes checkpoints (None: nowhere), after how many steps, how many, and whence it goes on."""

    folder: Path | None = None
    every: int = 0
    keep: int = 1
    start: Path | None = None

    @property
    def taken(self) -> int:
        """Count the steps that were taken before."""
        return step_of(self.start) if self.start else 0


def steps_of(engine: Engine, work: Work, saving: Saving) -> Iterator[Record]:
    """Take the steps that are left, one whenever its record is asked for, and write checkpoints.

    Raises:
        Stopped: after the step at hand and its checkpoint, on all processes, when a signal has asked any of them to end.
    """
    accelerator = engine.accelerator
    if saving.start:
        say(accelerator, f"going on after step {saving.taken} of {work.plan.last_step}, from {saving.start}")
        load_checkpoint(engine, saving.start)
    for record in steps(engine, work.phases, work.plan, saving.taken):
        step = record["step"]
        average(engine, work.plan, step)
        yield record
        # several processes know of it all alike, by what they have added up in the step
        stops = engine.stops or (accelerator.num_processes == 1 and engine.asked_to_stop())
        where, kept = f"after step {step} of {work.plan.last_step}", "which nothing keeps: this training begins anew"
        if saving.folder and (stops or (saving.every and step % saving.every == 0)):
            save_checkpoint(engine, saving.folder, step, saving.keep)
            kept = f"kept in {saving.folder / f'step-{step}'}"
        if stops:
            stop_together(accelerator, f"{where}, {kept}")
    put_mean(engine, work.plan)


def how_to_go_on(args: CommonArgs, folder: Path, *flags: str) -> str:
    """Say which command goes on with what `args` began in `folder`: the same one, with `flags`."""
    more = [*flags, *([] if args.output_dir else ["--output-dir", shlex.quote(str(folder))])]
    changes = [f"with {' '.join(more)}"] if more else ["again"]
    changes += ["without --overwrite"] if args.overwrite else []
    return f"to go on, give the same command {' and '.join(changes)}"


def step_folder(accelerator: Accelerator, folder: Path, step: int) -> Path:
    """Make the place in a task's folder, which has to be there still, for what is measured and saved after a step."""
    place = folder / "steps" / f"step-{step}"
    if accelerator.is_main_process:
        place.parent.mkdir(exist_ok=True)
        place.mkdir(exist_ok=True)
    return place
