"""Go on with what an earlier run left: with the same arguments, rows, prompts and weights, from checkpoints that are whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import Accelerator

from dualoptim.config.args import DEMO, NEWEST, TrainArgs
from dualoptim.config.product import single_runs
from dualoptim.config.saved import batch_of, changed_input, check_same, earlier_value, read_inputs
from dualoptim.data.identity import prompts_hash, rows_hash, sets_hash
from dualoptim.data.prompts import Formatter
from dualoptim.errors import InputError
from dualoptim.method.schedule import Plan
from dualoptim.models.checkpoint import choose_checkpoint, discard_after
from dualoptim.models.launch import decided, say
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.work import work_of

if TYPE_CHECKING:
    from dualoptim.job import Job

A = TypeVar("A", bound=TrainArgs)

TRAINED_FROM = ("rows", "prompts", "weights")
"""The hashes of a `config.yaml` on which a training depends."""


def with_its_batch(args: A, accelerator: Accelerator, folder: Path) -> A:
    """Share out the rows of a step among these processes where another number of them began the run of `folder`.

    Raises:
        InputError: if they cannot be shared out alike.
    """
    configs = [folder / "config.yaml", *sorted(folder.glob("*/task*/config.yaml"))] if args.resume else []
    begun = decided(accelerator, lambda: next(filter(None, map(batch_of, configs)), None))
    now = accelerator.num_processes, args.batch_size, args.gradient_accumulation_steps
    if not begun or math.prod(begun) == math.prod(now) or tuple(begun[1:]) != now[1:]:
        return args  # what is asked for otherwise is refused beside the other flags
    processes, size, rows = *begun[:2], math.prod(begun)
    own, left = divmod(rows, accelerator.num_processes)
    if left:
        *few, most = (str(number) for number in range(1, rows + 1) if rows % number == 0)
        raise InputError(
            f"--resume: a step of this run takes {rows} rows, which {accelerator.num_processes} processes cannot share alike; "
            f"start {', '.join(few)} or {most} processes"
        )
    size = next(number for number in range(size, 0, -1) if own % number == 0)
    say(
        accelerator,
        f"--resume: {processes} processes began this run, and {accelerator.num_processes} go on with --batch-size {size} "
        f"--gradient-accumulation-steps {own // size}: {rows} rows a step as before",
    )
    return replace(args, batch_size=size, gradient_accumulation_steps=own // size)


def inputs_of(job: "Job", position: int, formatter: Formatter) -> dict[str, str]:
    """Hash all that the task at `position` reads but its weights: what it learns from, and what measures it."""
    task, measures = job.rows(position), job.measures
    learned = [*task.forget, *task.retain]
    found = {"precision": job.accelerator.mixed_precision, "rows": rows_hash(learned, len(task.forget), task.refusals)}
    found["prompts"] = prompts_hash(learned, formatter)
    if measures:
        found["evaluation"] = sets_hash(job.evaluation_sets(position)[0], formatter, *measures.identity())
    return found


def all_inputs(job: "Job", loaded: LoadedModel) -> list[tuple["Job", int, dict[str, str]]]:
    """Hash the same of `job.each_task()`, with the weights of the first model for tasks that start from them."""
    first = {} if job.args.model == DEMO else {"weights": loaded.weights_hash()}  # the demo's is not taught yet
    return [(own, n, inputs_of(own, n, loaded.formatter) | ({} if n else first)) for own, n in job.each_task()]


@dataclass(frozen=True)
class Planned:
    """Hold a training as a run will do it: its folder, its arguments as resolved, hashes of what it reads, its steps."""

    folder: Path
    resolved: Mapping[str, Any]
    inputs: Mapping[str, str]
    plan: Plan


def where_to_go_on(job: "Job", loaded: LoadedModel) -> dict[Path, Path]:
    """Choose the checkpoint of every task that has one, by the task's folder; the same on all processes.

    Raises:
        InputError: if an argument, rows, prompts or weights are others than those that a task began with, if `--resume` names
            no checkpoint of these tasks, or if no checkpoint of a task will do.
    """
    tasks = []
    for own, position, inputs in all_inputs(job, loaded):
        for one in single_runs(own.args):
            plan = work_of(one, own.rows(position), loaded).plan
            folder = replace(own, args=one).folder(one.task_list[position])
            tasks.append(Planned(folder, loaded.resolved(one), inputs, plan))
    return choose_checkpoints(job.accelerator, job.args, tasks)


def choose_checkpoints(accelerator: Accelerator, args: TrainArgs, tasks: Sequence[Planned]) -> dict[Path, Path]:
    """Choose the checkpoint of every training that has one, by its folder; the same on all processes.

    Raises:
        InputError: as `where_to_go_on` does.
    """
    resume = str(args.resume)
    decided(accelerator, lambda: _check(resume, tasks, type(args)))
    chosen = {task.folder: choose_checkpoint(accelerator, task.folder, resume, task.plan.last_step) for task in tasks}
    for line in decided(accelerator, lambda: list(dict.fromkeys(filter(None, map(_other_end, tasks))))):
        say(accelerator, line)
    return {folder: path for folder, path in chosen.items() if path}


def _other_end(task: Planned) -> str:
    """Say where a training ends now that began with another `--max-steps`, and what becomes of its rates."""
    config = task.folder / "config.yaml"
    before = replace(task.plan, max_steps=earlier_value(config, "max_steps") or 0) if config.is_file() else task.plan
    if before.last_step == task.plan.last_step:
        return ""
    line = f"--resume: {task.plan.last_step} steps with this --max-steps, {before.last_step} with the one before"
    if before.total_steps == task.plan.total_steps:
        return f"{line}; the rate goes on over {task.plan.total_steps} steps as it was"
    return (
        f"{line}; the rate of steps to come decays over {task.plan.total_steps} instead of {before.total_steps}, which a run "
        f"of {task.plan.last_step} from its start would have done from the first"
    )


def _check(resume: str, tasks: Sequence[Planned], kind: type) -> None:
    places = [task.folder / "checkpoint" for task in tasks]
    given = Path(resume).expanduser()
    if resume != NEWEST and not (given.is_dir() and given.resolve().parent in [place.resolve() for place in places]):
        raise InputError(
            f"--resume {resume}: no checkpoint of this run; give a folder step-N in {places[0]}"
            + (" or another task's" if len(places) > 1 else "")
            + ", or --resume alone for the newest"
        )
    for task in tasks:
        for name in ("config.yaml", "log.jsonl", "trained.json"):
            if (task.folder / name).is_dir():
                raise InputError(f"--resume: {task.folder / name} is a folder; move {task.folder} away")
        config = task.folder / "config.yaml"
        if config.is_file():
            check_same(config, task.resolved, kind)
            now = task.inputs["precision"]
            if (before := read_inputs(config).get("precision", now)) != now:
                raise InputError(
                    f"--resume: {task.folder.name} was begun with --mixed_precision {before}, and this launch has {now}; give "
                    f"it --mixed_precision {before}"
                )
            if changed := changed_input(config, {name: task.inputs[name] for name in TRAINED_FROM if name in task.inputs}):
                raise InputError(
                    f"--resume: the {changed} of {task.folder.name} are not those that {config} was written for; give what "
                    "they were, or another --output-dir"
                )


def begins_anew(accelerator: Accelerator, folder: Path, weights: str, trained: bool) -> bool:
    """Tell whether a later task began from other weights than the task before it has left now, and if so clear it away.

    `trained`: the task before has been trained in this call, which counts where no hash tells. The same on all processes.
    """

    def clear() -> bool:
        before = read_inputs(folder / "config.yaml")
        changed = before["weights"] != weights if "weights" in before else trained
        if changed and (folder / "log.jsonl").is_file():
            say(accelerator, f"{folder}: begins anew, because the weights that the task before has left are others now")
            discard_after(folder, 0)
        return changed

    return decided(accelerator, clear)
