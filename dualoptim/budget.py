"""End a task's unlearning where a user's limits say so: enough is forgotten, or too much of what is kept is lost."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dualoptim.atomic import remove, write_json_lines
from dualoptim.errors import InputError
from dualoptim.evaluation.past import WATCHED, result_of, watched
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.job import Job
from dualoptim.method.schedule import Plan, cycle_length
from dualoptim.models.export import export_model
from dualoptim.models.launch import decided, say
from dualoptim.models.loaded import LoadedModel, as_measured
from dualoptim.models.sharding import divides
from dualoptim.models.together import shared

GOOD = "good"
MEASUREMENTS = 50
"""How often they are measured in a run at most, each time at the end of a cycle."""

Known = dict[str, float]
"""A step, and the mean probability of the true answers after it, by the kind of the rows that are watched: forget and kept."""


@contextmanager
def between_steps(loaded: LoadedModel) -> Iterator[LoadedModel]:
    """Give the model that trains as it is measured once it is saved; its random numbers and its training go on untouched."""
    training = replace(loaded, divided=divides(loaded.accelerator))  # however it was loaded
    devices = [] if loaded.device.type == "cpu" else [loaded.device]
    was_training = loaded.model.training
    with torch.random.fork_rng(devices, device_type=loaded.device.type), as_measured(training):
        loaded.model.eval()
        try:
            yield training
        finally:
            loaded.model.train(was_training)


class OfTask:
    """Says where the task lies that something belongs to."""

    job: Job
    position: int  # of the task in the list

    @property
    def folder(self) -> Path:
        """Name the task's folder."""
        return self.job.folder(self.job.args.task_list[self.position])


@dataclass
class Budget(OfTask):
    """Watches what the model of one task knows while it forgets, and keeps the last that held the budget."""

    job: Job
    position: int
    plan: Plan
    card: str
    ended: str = ""  # why, once it has
    not_reached: str = ""  # which limit, once all steps have been taken
    good: int | None = None  # the step whose model is the result, where the one that trains has lost too much
    _known: list[Known] = field(default_factory=list)

    @property
    def _limits(self) -> bool:
        return self.job.args.forget_until is not None or self.job.args.keep_budget is not None

    def begin(self, loaded: LoadedModel, taken: int) -> None:
        """Measure where the task starts, or take what an earlier run measured of the steps that were `taken`.

        Raises:
            InputError: if the last good model of those steps is gone.
        """
        if not self._limits:
            return
        if not taken:
            self._keep(loaded)
            self._add(self._measure(0, loaded))
            return
        read = shared(self.job.accelerator, watched(self.folder))
        self._known = [known for known in read if known["step"] <= taken]
        if self.job.args.keep_budget is not None:
            decided(self.job.accelerator, self._find_good)

    def _find_good(self) -> None:
        """Take the model of a shorter run that has ended, where there is no other, for it held the budget."""
        good, model = self.folder / GOOD, self.folder / "model"
        if not good.is_dir():
            if not model.is_dir():
                raise InputError(f"--resume: {good} is gone, which --keep-budget needs; give --overwrite instead")
            model.rename(good)

    def reached(self, step: int, loaded: LoadedModel) -> bool:
        """Say whether the task ends after a step, for which `ended` then has the words; the same on all processes."""
        length, last = cycle_length(self.plan.cycle), step == self.plan.last_step
        every = max(1, self.plan.last_step // length // MEASUREMENTS)
        if not self._limits or not (last or step % (length * every) == 0):
            return False
        args, start, good, known = self.job.args, self._known[0], self._known[-1]["step"], self._measure(step, loaded)
        if args.keep_budget is not None and start["kept"] - known["kept"] > args.keep_budget:
            lost = f"{start['kept']:.3f} → {known['kept']:.3f}, --keep-budget {args.keep_budget:g}"
            self.ended = f"stopped after step {step}, as too much is lost ({lost}); the model of step {int(good)} is the result"
            self.good = int(good)
        elif not last and args.forget_until is not None and known["forget"] <= args.forget_until:
            fell = f"{start['forget']:.3f} → {known['forget']:.3f}, --forget-until {args.forget_until:g}"
            self.ended = f"stopped after step {step} of {self.plan.last_step}, as enough is forgotten ({fell})"
        else:
            self._keep(loaded)  # before it is written down, so that no checkpoint counts on what is not there
            if last and args.forget_until is not None and known["forget"] > args.forget_until:
                fell = f"{known['forget']:.3f} after {step} steps"
                self.not_reached = f"--forget-until {args.forget_until:g} was not reached: {fell}"
        self._add(known)
        if said := self.ended or self.not_reached:
            say(self.job.accelerator, said)
        return bool(self.ended)

    def as_ended(self) -> dict[str, Any]:
        """Give what trained.json says of a task that a limit has ended, or that has not reached one with all of its steps."""
        if self.good is not None:
            return {"ended": self.ended, "ended_by": "keep_budget", "result": self.good}
        if self.ended:
            return {"ended": self.ended, "ended_by": "forget_until"}
        return {"not_reached": self.not_reached} if self.not_reached else {}

    def _measure(self, step: int, loaded: LoadedModel) -> Known:
        with between_steps(loaded) as model:
            scoring = ScoringPass(model, replace(self.job.args, eval_rows=0))
            losses = {kind: scoring.losses(f"watch {kind}", rows) for kind, rows in self.job.watched(self.position).items()}
        return {"step": step, **{kind: fmean(math.exp(-loss) for loss in own) for kind, own in losses.items()}}

    def _add(self, known: Known) -> None:
        self._known.append(known)
        if self.job.accelerator.is_main_process:
            write_json_lines(self.folder / WATCHED, self._known)

    def _keep(self, loaded: LoadedModel) -> None:
        if self.job.args.keep_budget is not None:
            export_model(loaded, self.folder / GOOD, self.card, self.job.args.save_dtype)


def settle(folder: Path) -> None:
    """Put the last good model where a task's model lies, if its trained.json says that this is the result, and clear up.

    It is done once that file is written, and again where a kill has come between.
    """
    good = folder / GOOD
    if good.is_dir() and result_of(folder, -1) >= 0:
        remove(folder / "model")
        good.rename(folder / "model")
    remove(good)
