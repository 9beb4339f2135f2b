"""`run(args)`: every pair of objectives, every rate, every task, from the model to the tables."""

import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.args import DEMO, NEWEST, FinetuneArgs, UnlearnArgs, split_objectives
from dualoptim.checkpoint import (
    claim,
    export_model,
    list_checkpoints,
    output_folder,
    read_checkpoint,
    save_checkpoint,
    write_json,
    write_text,
)
from dualoptim.data import Row, Source, Stream, example_builder, load_refusals
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.evaluate import evaluate_model
from dualoptim.finetune import DEMO_RECIPE, demo_policy, fit
from dualoptim.loop import Phase, Plan, Term, train
from dualoptim.losses import FORGET, RETAIN
from dualoptim.modeling import Policy, load_policy, release, start_accelerator
from dualoptim.report import example_answers, model_card, results_row, score_table, write_results
from dualoptim.tracking import StepLog, check_same, resolve, say, track_scores, trackers, write_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """One task unlearned: where it lies, what each step said, and the evaluations (None with `--no-eval`)."""

    losses: str
    learning_rate: float
    task: int
    folder: Path
    model: Path
    log: list[dict[str, Any]]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


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
    """
    if args.dry_run:
        raise InputError("dry_run trains nothing; call dualoptim.memory.dry_run(args), or run without it")
    accelerator = start_accelerator(args)
    output = output_folder(args, accelerator)

    # ---- read everything that can be wrong before anything is written
    source = Source(args.data_source)
    rows: list[Row] = []
    for position, task in enumerate(args.task_list):
        rows += source.task_rows(args.split, task) + source.retain_rows(args.split, args.task_list[: position + 1])
        if args.eval:
            rows += [row for compared in source.evaluation_sets(args.split, task)[0].values() for row in compared]
    refusals = load_refusals(args.idk_file)
    folders = {
        (losses, rate, task): output / f"{losses}_lr{rate:g}" / f"task{task}"
        for losses in args.forget_losses
        for rate in args.rates
        for task in args.task_list
    }
    policy = demo_policy(_demo_recipe(args), accelerator) if args.model == DEMO else load_policy(args, accelerator)
    policy.formatter.check(rows)
    args = dataclasses.replace(args, output_dir=str(output), learning_rates=args.rates)
    if args.model == DEMO and args.resume and (output / "demo_model").is_dir():
        args = dataclasses.replace(args, model=str(output / "demo_model"), data=DEMO)
        policy = load_policy(args, accelerator)
    if args.resume:
        _check_resume(args, accelerator, policy, folders)
    else:
        claim(args, accelerator, [*folders.values(), *([output / "demo_model"] if args.model == DEMO else [])])
    if args.model == DEMO:
        args = _teach_demo(args, accelerator, policy, output / "demo_model")
        if args.use_lora:
            policy = load_policy(args, accelerator)

    # ---- one run per pair of objectives and rate; its tasks follow one another on the same weights
    results: list[TaskResult] = []
    for losses, rate in itertools.product(args.forget_losses, args.rates):
        if policy.model is None or results:  # released, or changed by the last pair or rate
            policy = load_policy(args, accelerator)
        for position, task in enumerate(args.task_list):
            folder = folders[losses, rate, task]
            say(accelerator, f"{losses}, rate {rate:g}, {args.optim}: {source.describe(args.split, task)} -> {folder}")
            # every pair and rate starts from the same weights, which are evaluated once
            known = results[0] if results and position == 0 else None
            resolved = _resolved(args, policy, losses, rate)
            if accelerator.is_main_process:
                write_config(folder / "config.yaml", resolved)
            with trackers(args, accelerator, folder, f"{losses}_lr{rate:g}_task{task}", resolved):
                result = _run_task(policy, accelerator, source, refusals, args, (losses, rate, position), folder, known)
            results.append(result)
            if accelerator.is_main_process:
                write_results(
                    output, [results_row(r.losses, r.learning_rate, r.task, r.before, r.after, r.folder) for r in results]
                )
            if result.before and result.after:
                say(accelerator, "\n" + score_table({"before": result.before, "after": result.after}) + "\n")
                say(accelerator, example_answers(folder / "eval_before", folder / "eval", {"forget": 2, "retain": 2}) + "\n")
            say(accelerator, f"model: {result.model}")
    return RunResult(output, results)


def _resolved(args: UnlearnArgs, policy: Policy, losses: str, rate: float) -> dict[str, Any]:
    """The arguments of one pair and rate."""
    own_rate = None if args.optim == "adamw" else args.forget_lr or rate
    this = dataclasses.replace(args, forget_losses=(losses,), learning_rates=(rate,), forget_lr=own_rate)
    return resolve(this, policy)


def _check_resume(
    args: UnlearnArgs, accelerator: Accelerator, policy: Policy, folders: dict[tuple[str, float, int], Path]
) -> None:
    """Refuse to go on with what other arguments or another number of processes began.

    Raises:
        InputError: naming what differs.
    """
    for (losses, rate, _), folder in folders.items():
        if (folder / "config.yaml").is_file():
            check_same(folder / "config.yaml", _resolved(args, policy, losses, rate))
        checkpoint = _checkpoint(args, folder)
        if checkpoint:
            read_checkpoint(accelerator, checkpoint)


def _checkpoint(args: UnlearnArgs, folder: Path) -> Path | None:
    """Where the task of `folder` goes on: from its newest checkpoint, the given one if it is its own, or nowhere."""
    if args.resume in (None, NEWEST):
        whole = list_checkpoints(folder / "checkpoint") if args.resume else []
        return whole[-1] if whole else None
    given = Path(str(args.resume))
    return given if given.resolve().parent == (folder / "checkpoint").resolve() else None


def _run_task(
    policy: Policy,
    accelerator: Accelerator,
    source: Source,
    refusals: Sequence[str],
    args: UnlearnArgs,
    which: tuple[str, float, int],
    folder: Path,
    known: TaskResult | None,
) -> TaskResult:
    """Evaluate, unlearn one task, save, evaluate again; `policy` then holds the new weights.

    `which` is the pair of objectives, the rate, and the position of the task in the list. `known` is an earlier result that
    started from the same weights.
    """
    losses, rate, position = which
    task = args.task_list[position]
    sets, skipped = source.evaluation_sets(args.split, task) if args.eval else ({}, {})
    before = after = None
    if args.eval and known:
        before = known.before
        if accelerator.is_main_process:
            shutil.copytree(known.folder / "eval_before", folder / "eval_before", dirs_exist_ok=True)
    elif args.eval:
        before = evaluate_model(policy, accelerator, sets, skipped, args, folder / "eval_before")
    if before:
        track_scores(accelerator, "eval", before, 0)

    forget = source.task_rows(args.split, task)
    retain = source.retain_rows(args.split, args.task_list[: position + 1])
    model = folder / "model"
    what = f"{source.describe(args.split, task)} unlearned with {losses}"
    trained = folder / "trained.json"
    if args.resume and trained.is_file():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        policy.model = None
    else:
        try:
            log = _unlearn(policy, accelerator, forget, retain, refusals, losses, rate, args, folder)
        except NonFiniteError as error:
            export_model(accelerator, policy, model, model_card(args.model, f"stopped at {error}", args))
            release(policy, accelerator)
            raise NonFiniteError(f"{error}. The weights before this step are in {model}") from None
        export_model(accelerator, policy, model, model_card(args.model, what, args))
        if accelerator.is_main_process:
            write_json(trained, {"steps": len(log)})
        release(policy, accelerator)
    if policy.model is None and (args.eval or position + 1 < len(args.task_list)):
        policy.model = load_policy(dataclasses.replace(args, model=str(model)), accelerator).model

    if args.eval:
        after = evaluate_model(policy, accelerator, sets, skipped, args, folder / "eval")
        track_scores(accelerator, "eval", after, len(log))
        if accelerator.is_main_process:
            write_text(model / "README.md", model_card(args.model, what, args, after))
    return TaskResult(losses, rate, task, folder, model, log, before, after)


def _unlearn(
    policy: Policy,
    accelerator: Accelerator,
    forget_rows: Sequence[Row],
    retain_rows: Sequence[Row],
    refusals: Sequence[str],
    losses: str,
    rate: float,
    args: UnlearnArgs,
    folder: Path,
) -> list[dict[str, Any]]:
    """Unlearn one task in place and return the steps' records."""
    forget, retain = split_objectives(losses)
    terms = {}
    for name, objective, rows, coefficient in (
        ("forget", FORGET[forget], forget_rows, args.forget_coeff),
        ("retain", RETAIN[retain], retain_rows, args.regularization_coeff),
    ):
        score_question = name == "forget" and not args.mask
        build = example_builder(rows, policy.formatter, objective.reads, refusals, args.seed, score_question)
        stream = Stream.of(args, name, len(rows), build, accelerator.process_index, accelerator.num_processes)
        terms[name] = Term(objective, stream, coefficient)

    if args.optim == "adamw":
        cycle: tuple[tuple[str, int], ...] = (("joint", 1),)
        phases = {"joint": Phase(terms, rate, args.max_grad_norm)}
    else:
        cycle = (("forget", args.forget_freq), ("retain", args.retain_freq))
        forget_norm = args.max_grad_norm if args.forget_max_grad_norm is None else args.forget_max_grad_norm
        phases = {
            "forget": Phase({"forget": terms["forget"]}, args.forget_lr or rate, forget_norm),
            "retain": Phase({"retain": terms["retain"]}, rate, args.max_grad_norm),
        }
    plan = Plan.of(args, cycle, len(forget_rows), terms["forget"].stream.global_batch)

    # ---- where an earlier run stopped
    path, checkpoint = folder / "log.jsonl", _checkpoint(args, folder)
    taken = read_checkpoint(accelerator, checkpoint) if checkpoint else 0
    lines = path.read_text(encoding="utf-8").splitlines() if taken else []
    records = [json.loads(line) for line in lines[:taken]]
    accelerator.wait_for_everyone()  # all have read before one writes

    def save(step: int) -> None:
        if args.save_every and step % args.save_every == 0:
            save_checkpoint(accelerator, folder / "checkpoint", step, args.keep_checkpoints)

    with StepLog(path, plan.last_step, "unlearn", accelerator, records) as log:
        train(policy, accelerator, phases, plan, args, args.optim, log, args.beta, checkpoint=checkpoint, after_step=save)
    return log.records


def _demo_recipe(args: UnlearnArgs) -> FinetuneArgs:
    """How the demo's model is taught: fixed, but for what decides how it reads its texts."""
    shared = ("seed", "template", "question_start_tag", "question_end_tag", "answer_tag", "max_length", "packing", "threads")
    return dataclasses.replace(DEMO_RECIPE, **{name: getattr(args, name) for name in shared})


def _teach_demo(args: UnlearnArgs, accelerator: Accelerator, policy: Policy, folder: Path) -> UnlearnArgs:
    """Train the demo's tiny model until it knows its rows, save it, and return the arguments that name it."""
    say(accelerator, "The demo: a tiny model first learns 400 invented facts about twenty authors and some real ones,")
    say(accelerator, "then it is made to forget one author.")
    recipe, source = _demo_recipe(args), Source(DEMO)
    rows = [row for split in recipe.splits for row in source.rows(split)]
    fit(policy, accelerator, rows, recipe, None, "learn")
    export_model(accelerator, policy, folder, model_card(DEMO, "which knows the demo's facts", recipe))
    release(policy, accelerator)
    return dataclasses.replace(args, model=str(folder), data=DEMO, learning_rates=args.rates)
