"""Unlearn: `run(args)` goes over every pair of objectives, every rate and every task, from the model to the tables."""

import gc
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.atomic import remove, write_json, write_text
from dualoptim.config.args import DEMO, SweepArgs, UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.config.optimizers import kind_of
from dualoptim.config.product import single_runs
from dualoptim.config.saved import write_config
from dualoptim.config.values import expect
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.evaluate import evaluate_model
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
from dualoptim.reporting.claim import claim
from dualoptim.reporting.console import example_answers, score_table
from dualoptim.reporting.hub import push, repositories
from dualoptim.reporting.log import StepLog, track_scores, trackers
from dualoptim.reporting.results import RESULT_FILES, TaskResult, result_columns, write_results, write_sequence
from dualoptim.signals import held
from dualoptim.taught import teach_demo


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
    models = Current(accelerator)
    loaded = models.get(args, "measure" if args.eval and args.model != DEMO else "train")
    args = replace(args, **adapter_settings(loaded.model), save_dtype=loaded.saved_type(args))
    job = replace(job, args=args)
    job.check(loaded)
    if args.resume:
        job = replace(job, goes_on=where_to_go_on(job, loaded))
    claim(args, accelerator, job.targets(), [folder / name for name in RESULT_FILES])
    if accelerator.is_main_process:
        (folder / "finished.json").unlink(missing_ok=True)  # what a sweep has said of this folder holds no more

    # ---- the demo: teach a tiny model, then unlearn that folder
    if args.model == DEMO:
        teach_demo(loaded, args, taught)
        args = replace(args, model=str(taught), data=DEMO)
    del loaded  # `models` alone holds it

    # ---- every pair and rate starts from the same weights; its tasks follow one another
    results: list[TaskResult] = []
    for one in single_runs(args):
        job = replace(job, args=one, weights=job.weights or models.get(one, "measure" if args.eval else "train").weights_hash())
        for result in unlearn_tasks(job, models, results[0] if results else None):
            results.append(result)
            _show(args, accelerator, results)
            wait(accelerator)
    return RunResult(folder, results)


def _show(args: UnlearnArgs, accelerator: Accelerator, results: Sequence[TaskResult]) -> None:
    """Write the tables over all results so far, and print and upload the last of them."""
    last = results[-1]
    if not accelerator.is_main_process:
        return
    write_results(Path(str(args.output_dir)), [result_columns(result) for result in results])
    if args.eval and len(args.task_list) > 1:
        write_sequence(last.folder.parent, [result for result in results if result.folder.parent == last.folder.parent])
    if last.before and last.after:
        print("\n" + score_table({"before": last.before, "after": last.after}) + "\n")
    if last.before and last.after and args.texts:
        print(example_answers(last.folder / "eval_before", last.folder / "eval", {"forget": 2, "retain": 2}) + "\n")
    print(f"model: {last.model}")
    if args.push_to_hub:
        print(push(last.model, repositories(args)[last.losses, last.learning_rate, last.task], args.hub_public))


# ------------------------------------------------------------------------------------------------------ one pair, one rate


def unlearn_tasks(job: Job, models: Current, known: TaskResult | None) -> Iterator[TaskResult]:
    """Unlearn the tasks of one pair and rate one after another, each from the weights that the last one left.

    `known` is an earlier result that started from the same weights, which are evaluated once.
    """
    args, accelerator, measures = job.args, job.accelerator, job.measures
    losses, rate = args.forget_losses[0], args.learning_rates[0]
    first: Frozen | None = None
    trained, start = False, args  # the latter's model is the one that a task starts from
    if args.fix_ref_model:
        load = partial(models.get, start, Frozen.use(accelerator))
        first = freeze([work_of(args, job.rows(n), load()) for n in range(len(args.task_list))], args, load)
    for position, task in enumerate(args.task_list):
        folder, where = job.folder(task), job.source.describe(args.split, task)
        say(accelerator, f"{losses}, rate {rate:g}, {args.optim}: {where} -> {folder}")
        what, model, shown = f"{where} unlearned with {losses}", folder / "model", known if position == 0 else None
        loaded = models.get(start, "measure" if measures and not shown else "train")
        resolved, weights = loaded.resolved(args), loaded.weights_hash() if position else job.weights
        if args.resume and position and begins_anew(accelerator, folder, weights, trained):
            job = replace(job, goes_on={place: path for place, path in job.goes_on.items() if place != folder})
        work = work_of(args, job.rows(position), loaded)
        log = finished_log(folder, work.plan.last_step) if args.resume else None
        trained = log is None
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
                before = evaluate_model(models.get(start, "measure"), asked, measures, folder / "eval_before")
            if before:
                track_scores(accelerator, "eval", before, 0)

            if log is None:
                if position and (masters := job.masters(position - 1)).is_dir():
                    # what was saved and measured is rounded, and training goes on from what was trained
                    start = replace(args, model=str(masters))
                frozen = first or freeze([work], args, partial(models.get, start, Frozen.use(accelerator)))
                loaded = models.get(start, "train")
                work = work_of(args, job.rows(position), loaded)
                way = OnTheWay(job, position, work.plan.last_step, model_card(args, what, before))
                log = _train(job, loaded, work.with_reference(frozen) if frozen else work, (what, before, way))
                del loaded
                if is_sharded(accelerator) or args.save_dtype != "float32":
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
                after = evaluate_model(models.get(start, "measure"), job.evaluation_sets(position), measures, folder / "eval")
                track_scores(accelerator, "eval", after, len(log))
                if accelerator.is_main_process:
                    write_text(model / "README.md", model_card(args, what, before, after))
                OnTheWay(job, position, len(log), "").end(after)
        yield TaskResult(losses, rate, task, folder, model, log, before, after)


def _train(job: Job, loaded: LoadedModel, work: Work, task: tuple[str, Summary | None, OnTheWay]) -> list[dict[str, Any]]:
    """Unlearn one task in place, from where an earlier run stopped, and save the model; the records of its steps.

    `task` is what it does in words, how the model scored before, and what is done on the way.
    """
    args, accelerator, (what, before, way) = job.args, job.accelerator, task
    folder, path = way.folder, way.folder / "log.jsonl"
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
                for record in steps_of(engine, work, saving):
                    log.add(record)
                    way.after(record["step"], loaded)
            export_model(loaded, folder / "model", model_card(args, what, before), args.save_dtype)
            if args.save_dtype != "float32" and folder != job.folder(args.task_list[-1]):
                export_model(loaded, folder / MASTERS, model_card(args, f"{what}, for the next task"))
            if accelerator.is_main_process:
                write_json(folder / "trained.json", {"steps": len(log.records)})
            stop_together(accelerator, f"with {folder / 'model'} written")
    except NonFiniteError as error:
        export_model(loaded, folder / "model", model_card(args, f"{what}, stopped at {error}"), args.save_dtype)
        raise NonFiniteError(f"{error}. The weights before this step are in {folder / 'model'}") from None
    finally:
        release(loaded)
    return log.records


def command(args: UnlearnArgs) -> object:
    """Run as a command, or with `--dry-run` say what running would take."""
    gc.freeze()  # imported modules stay to the end: going through them takes a third of a second each time
    if args.dry_run:
        from dualoptim.memory_plan import dry_run

        return dry_run(args)
    return run(args)


if __name__ == "__main__":
    main(UnlearnArgs, command)
