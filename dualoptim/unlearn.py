"""Unlearn: `run(args)` goes over every pair of objectives, every rate and every task, from the model to the tables."""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["unlearn"])

import gc
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.atomic import remove, write_json, write_text
from dualoptim.budget import GOOD, Budget, settle
from dualoptim.config.args import DEMO, SweepArgs, UnlearnArgs
from dualoptim.config.notes import setting_notes, tasks_note
from dualoptim.config.optimizers import kind_of
from dualoptim.config.product import sequences, single_runs
from dualoptim.config.saved import write_config
from dualoptim.config.values import expect
from dualoptim.data.targets import with_targets
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.evaluate import evaluate_model
from dualoptim.evaluation.past import ended_by, result_of, why_ended
from dualoptim.evaluation.records import hand_on
from dualoptim.evaluation.summary import Summary
from dualoptim.job import MASTERS, Job
from dualoptim.models.adapter import adapter_settings
from dualoptim.models.checkpoint import discard_after, finished_log, read_log
from dualoptim.models.current import Current
from dualoptim.models.export import export_model
from dualoptim.models.launch import decided, is_sharded, output_folder, release, say, start_accelerator, training
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.lock import kept_for_one_run
from dualoptim.models.reference import Frozen
from dualoptim.models.resume import begins_anew, inputs_of, where_to_go_on, with_its_batch
from dualoptim.models.saving import Saving, how_to_go_on, steps_of
from dualoptim.models.together import stop_together, wait
from dualoptim.models.work import Work, freeze, work_of
from dualoptim.on_the_way import OnTheWay
from dualoptim.reporting.card import model_card
from dualoptim.reporting.claim import check_claim, claim
from dualoptim.reporting.log import StepLog, track_scores, trackers
from dualoptim.reporting.methods import METHODS
from dualoptim.reporting.results import RESULT_FILES, TaskResult
from dualoptim.signals import held
from dualoptim.taught import teach_demo
from dualoptim.told import say_next, tell


@dataclass(frozen=True)
class RunResult:
    """Everything `run` did: the output folder and one `TaskResult` per (losses, rate, task), in order."""

    folder: Path
    tasks: list[TaskResult]


def run(args: UnlearnArgs) -> RunResult:
    """Unlearn and evaluate as `args` say; the same on every process of a launch.

    Raises:
        InputError: for anything that is wrong with the arguments, the data or the model; nothing has been written then.
        NonFiniteError: if a loss or gradient is not finite; the weights before that step are in the task's `model/`.
        WriteError: if the disk is full or the folder goes while the run writes to it; `--resume` goes on then.
        Stopped: where a signal asks for it, with a checkpoint if a step was being taken.
    """
    expect(args, UnlearnArgs)
    if isinstance(args, SweepArgs):
        raise InputError("SweepArgs are for many runs; call dualoptim.sweep.sweep(args), or give UnlearnArgs(...)")
    if args.dry_run:
        raise InputError("dry_run trains nothing; call dualoptim.memory_plan.dry_run(args), or run without it")
    args = with_targets(args)
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    with kept_for_one_run(folder, accelerator, how_to_go_on(args, folder, "--resume")):
        args = with_its_batch(replace(args, output_dir=str(folder), learning_rates=args.rates), accelerator, folder)
        return _run(args, accelerator)


def _run(args: UnlearnArgs, accelerator: Accelerator) -> RunResult:
    # ---- read and check everything, before anything is written
    folder = Path(str(args.output_dir))
    taught = folder / "demo_model"
    if args.model == DEMO and args.resume and taught.is_dir():
        args = replace(args, model=str(taught), data=DEMO)
    job = Job.read(args, accelerator)
    targets, tables = job.targets(), [folder / name for name in (*RESULT_FILES, *([METHODS] if len(args.split) > 1 else []))]
    check_claim(args, accelerator, targets, tables)  # before a model is loaded, or makes rows, which may take minutes
    models = Current(accelerator)
    loaded = models.get(args, "measure" if (args.eval or args.makes_rows) and args.model != DEMO else "train")
    args = replace(args, **adapter_settings(loaded.model), save_dtype=loaded.saved_type(args))
    job = replace(job, args=args)
    job.check(loaded)
    made = job.make_rows(loaded)
    if args.resume:
        job = replace(job, goes_on=where_to_go_on(job, loaded))
    claim(args, accelerator, targets, tables)
    if made and args.texts and accelerator.is_main_process:
        made.write()
    if accelerator.is_main_process:
        (folder / "finished.json").unlink(missing_ok=True)  # what a sweep has said of this folder holds no more

    for note in (*tasks_note(args), *setting_notes(args)):
        say(accelerator, note)

    # ---- the demo: teach a tiny model, then unlearn that folder
    if args.model == DEMO:
        teach_demo(loaded, args, taught)
        args = replace(args, model=str(taught), data=DEMO)
    del loaded  # `models` alone holds it

    # ---- every pair and rate starts from the same weights; its tasks follow one another, or start there as well
    results: list[TaskResult] = []
    for one in (one for own in single_runs(args) for one in sequences(own)):
        job = replace(job, args=one, weights=job.weights or models.get(one, "measure" if args.eval else "train").weights_hash())
        for result in unlearn_tasks(job, models, tuple(results)):
            results.append(result)
            if accelerator.is_main_process:
                tell(args, results)
            wait(accelerator)
    return RunResult(folder, results)


# ------------------------------------------------------------------------------------------------------ one pair, one rate


def unlearn_tasks(job: Job, models: Current, earlier: Sequence[TaskResult]) -> Iterator[TaskResult]:
    """Unlearn the tasks of one pair and rate one after another, each from the weights that the last one left.

    `earlier` are results that started from the same weights, of which no row is measured twice.
    """
    args, accelerator, measures = job.args, job.accelerator, job.measures
    losses, rate = args.forget_losses[0], args.learning_rates[0]
    first: Frozen | None = None
    trained, start = False, args  # the latter's model is the one that a task starts from
    if args.fix_ref_model:
        load = partial(models.get, start, Frozen.use(accelerator))
        first = freeze([work_of(args, job.rows(n), load()) for n in range(len(args.task_list))], args, load)
    for position, task in enumerate(args.task_list):
        folder, where = job.folder(task), job.source.describe(args.split[0], task)
        say(accelerator, f"{losses}, rate {rate:g}, {args.optim}: {where} -> {folder}")
        what, model = f"{where} unlearned with {losses}", folder / "model"
        shown = next((one for one in earlier if (one.split, one.task) == (args.split[0], task) and not position), None)
        loaded = models.get(start, "measure" if measures and not shown else "train")
        resolved, weights = loaded.resolved(args), loaded.weights_hash() if position else job.weights
        if args.resume and position and begins_anew(accelerator, folder, weights, trained):
            job = replace(job, goes_on={place: path for place, path in job.goes_on.items() if place != folder})
        work = work_of(args, job.rows(position), loaded)
        measures = measures and replace(measures, trained=job.trained_on(position), pair=losses)
        log = finished_log(folder, work.plan.last_step) if args.resume else None
        trained = log is None
        say(accelerator, work.in_words())
        inputs = inputs_of(job, position, loaded.formatter) | {"weights": weights}
        del loaded  # `models` alone holds it, and frees it before another is loaded
        if trained and accelerator.is_main_process:
            write_config(folder / "config.yaml", resolved, inputs)
        with trackers(accelerator, folder, f"{folder.parent.name}_{folder.name}", resolved):
            before = after = None
            if measures and shown:
                before = shown.before
                if accelerator.is_main_process:
                    shutil.copytree(shown.folder / "eval_before", folder / "eval_before", dirs_exist_ok=True)
            elif measures:
                asked = job.evaluation_sets(position)
                if earlier and not position and accelerator.is_main_process:
                    hand_on(earlier[0].folder / "eval_before", folder / "eval_before", asked[0])
                before = evaluate_model(models.get(start, "measure"), asked, measures, folder / "eval_before")
            if log is not None:
                decided(accelerator, partial(settle, folder))
                say(accelerator, f"trained before, in {len(log)} steps: {model}")
            if before and measures:
                track_scores(accelerator, "eval", before, 0)
                if measures.first is None:
                    measures = replace(measures, first=before)
                job = replace(job, measures=replace(measures, before=before))

            if log is None:
                if position and (masters := job.masters(position - 1)).is_dir():
                    # what was saved and measured is rounded, and training goes on from what was trained
                    start = replace(args, model=str(masters))
                frozen = first or freeze([work], args, partial(models.get, start, Frozen.use(accelerator)))
                loaded = models.get(start, "train")
                work = work_of(args, job.rows(position), loaded)
                way = OnTheWay(job, position, work.plan, model_card(args, what, before))
                log = _train(job, loaded, work.with_reference(frozen) if frozen else work, (what, before, way))
                del loaded
                if is_sharded(accelerator) or args.save_dtype != "float32" or args.keep_budget is not None:
                    models.drop()
                else:
                    models.became(str(model))
            if position and accelerator.is_main_process:
                remove(job.masters(position - 1))
            start = replace(args, model=str(model))  # which is further than what is in memory if it was trained before
            if measures or position + 1 < len(args.task_list):
                models.get(start, "measure" if measures else "train")
            if not trained and accelerator.is_main_process:  # now that what was left has proved to be whole
                write_config(folder / "config.yaml", resolved, inputs)

            if measures:
                asked, by = job.evaluation_sets(position), decided(accelerator, partial(ended_by, folder))
                done = replace(measures, before=before, ended_by=by)
                after = evaluate_model(models.get(start, "measure"), asked, done, folder / "eval")
                step = decided(accelerator, partial(result_of, folder, len(log)))
                track_scores(accelerator, "eval", after, step)
                if accelerator.is_main_process:
                    write_text(model / "README.md", model_card(args, what + why_ended(folder), before, after))
                OnTheWay(job, position, work.plan, "").end(step, after)
        target = args.targets[position] if args.targets else None
        yield TaskResult(losses, rate, task, folder, model, log, before, after, target, args.split[0])


def _train(job: Job, loaded: LoadedModel, work: Work, task: tuple[str, Summary | None, OnTheWay]) -> list[dict[str, Any]]:
    """Unlearn one task in place, from where an earlier run stopped, and save the model; the records of its steps.

    `task` is what it does in words, how the model scored before, and what is done on the way.
    """
    args, accelerator, (what, before, way) = job.args, job.accelerator, task
    folder, path = way.folder, way.folder / "log.jsonl"
    budget = Budget(job, way.position, work.plan, way.card)
    saving = Saving(folder / "checkpoint", args.save_every, args.keep_checkpoints, job.goes_on.get(folder))
    records = read_log(path)[: saving.taken]
    wait(accelerator)  # all have read before one writes
    decided(accelerator, lambda: discard_after(folder, saving.taken))
    try:
        with held():
            with (
                StepLog(path, work.plan.last_step, "unlearn", accelerator, records) as log,
                training(loaded, args, kind_of(args).build(args)) as engine,
            ):
                budget.begin(loaded, saving.taken)
                for record in steps_of(engine, work, saving):
                    log.add(record)
                    ends = budget.reached(record["step"], loaded)
                    if budget.good is None:
                        way.after(record["step"], loaded)
                    if ends:
                        break
            if budget.good is None:
                export_model(loaded, folder / "model", model_card(args, what, before), args.save_dtype)
            if budget.good is None and args.save_dtype != "float32" and folder != job.folder(args.task_list[-1]):
                export_model(loaded, folder / MASTERS, model_card(args, f"{what}, for the next task"))
            if accelerator.is_main_process:
                write_json(folder / "trained.json", {"steps": len(log.records), **budget.as_ended()})
                settle(folder)
            stop_together(accelerator, f"with {folder / 'model'} written")
    except NonFiniteError as error:
        export_model(loaded, folder / "model", model_card(args, f"{what}, stopped at {error}"), args.save_dtype)
        kept = f", the last good model in {folder / GOOD}" if args.keep_budget is not None else ""
        raise NonFiniteError(f"{error}. The weights before this step are in {folder / 'model'}{kept}") from None
    finally:
        release(loaded)
    return log.records


def command(args: UnlearnArgs) -> object:
    """Run as a command, or with `--dry-run` say what running would take."""
    gc.freeze()  # imported modules stay to the end: going through them takes a third of a second each time
    if args.dry_run:
        from dualoptim.memory_plan import dry_run

        return dry_run(args)
    result = run(args)
    say_next(result.folder)
    return result
