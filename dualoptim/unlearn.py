"""`run(args)`: every pair of objectives, every rate, every task, from the model to the tables."""

import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dualoptim.config.args import DEMO, NEWEST, FinetuneArgs, TrainArgs, UnlearnArgs, split_objectives
from dualoptim.reporting.card import model_card
from dualoptim.models.checkpoint import (
    claim,
    export_model,
    list_checkpoints,
    output_folder,
    read_checkpoint,
    read_json_lines,
    save_checkpoint,
    write_json,
    write_text,
)
from dualoptim.data.tofu import HOLDOUT, Example, OwnFiles, Row, Source, Stream, example_builder, load_refusals, open_source
from dualoptim.errors import InputError, NonFiniteError, reason
from dualoptim.evaluate import Measures, check_measures, evaluate_model
from dualoptim.finetune import DEMO_RECIPE, demo_policy, fit
from dualoptim.reporting.hub import check_push, push, repositories
from dualoptim.method.loop import Phase, Plan, Term, train
from dualoptim.method.objectives import PUBLISHED_LAYER, Objective
from dualoptim.models.load import Policy, load_policy, release, start_accelerator
from dualoptim.method.dual import PHASES, DualOptimizer, Groups, MakeOptimizer, adamw, named_optimizer, takes_betas
from dualoptim.models.reference import Frozen, check_reference
from dualoptim.method.schedule import phase_at
from dualoptim.method.plus import DualAdamWPlus, PartlyDecoupledAdamW
from dualoptim.reporting.tables import (
    SEQUENCE_FILES,
    example_answers,
    results_row,
    score_table,
    write_results,
    write_sequence,
)
from dualoptim.reporting.log import StepLog, check_same, resolve, say, track_scores, trackers, write_config

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
        raise InputError("dry_run trains nothing; call dualoptim.memory_plan.dry_run(args), or run without it")
    accelerator = start_accelerator(args)
    output = output_folder(args, accelerator)

    # ---- read everything that can be wrong before anything is written
    source = open_source(args)
    rows: list[Row] = []
    for position, task in enumerate(args.task_list):
        rows += source.task_rows(args.split, task) + source.retain_rows(args.split, args.task_list[: position + 1])
        if args.eval:
            sets = source.evaluation_sets(args.split, task)[0]
            rows += [row for name, compared in sets.items() if name != HOLDOUT for row in compared]
    refusals = load_refusals(args.idk_file)
    optimizer_of(args)
    check_push(args)
    measures = check_measures(args, accelerator) if args.eval else None
    folders = {
        (losses, rate, task): output / f"{losses}_lr{rate:g}" / f"task{task}"
        for losses in args.forget_losses
        for rate in args.rates
        for task in args.task_list
    }
    policy = demo_policy(_demo_recipe(args), accelerator) if args.model == DEMO else load_policy(args, accelerator)
    if isinstance(source, OwnFiles):
        source.cut(policy.formatter)
        rows = [row for task in args.task_list for row in source.task_rows(args.split, task)] + source.retain_rows(
            args.split, ()
        )
    unseen = source.evaluation_sets(args.split, args.task_list[0])[0].get(HOLDOUT, []) if args.eval else []
    policy.formatter.check([*rows, *unseen])
    args = dataclasses.replace(args, output_dir=str(output), learning_rates=args.rates)
    _check_objectives(args, rows, source, policy, accelerator)
    if args.model == DEMO and args.resume and (output / "demo_model").is_dir():
        args = dataclasses.replace(args, model=str(output / "demo_model"), data=DEMO)
        policy = load_policy(args, accelerator)
    if args.resume:
        _check_resume(args, accelerator, policy, folders)
    else:
        targets = [*folders.values(), *([output / "demo_model"] if args.model == DEMO else [])]
        if args.eval and len(args.task_list) > 1:
            targets += [folder / name for folder in {f.parent for f in folders.values()} for name in SEQUENCE_FILES]
        claim(args, accelerator, targets)
    if args.model == DEMO:
        args = _teach_demo(args, accelerator, policy, output / "demo_model")
        if args.use_lora:
            policy = load_policy(args, accelerator)

    # ---- one run per pair of objectives and rate; its tasks follow one another on the same weights
    results: list[TaskResult] = []
    for losses, rate in itertools.product(args.forget_losses, args.rates):
        if policy.model is None or results:  # released, or changed by the last pair or rate
            policy = load_policy(args, accelerator)
        works = [_work(policy, accelerator, source, refusals, args, losses, rate, n) for n in range(len(args.task_list))]
        first = _freeze(policy, accelerator, works, args) if args.fix_ref_model else None
        for position, task in enumerate(args.task_list):
            folder = folders[losses, rate, task]
            say(accelerator, f"{losses}, rate {rate:g}, {args.optim}: {source.describe(args.split, task)} -> {folder}")
            # every pair and rate starts from the same weights, which are evaluated once
            known = results[0] if results and position == 0 else None
            resolved = _resolved(args, policy, losses, rate)
            if accelerator.is_main_process:
                write_config(folder / "config.yaml", resolved)
            with trackers(args, accelerator, folder, f"{losses}_lr{rate:g}_task{task}", resolved):
                result = _run_task(policy, accelerator, source, args, works[position], first, folder, known, measures)
            results.append(result)
            if accelerator.is_main_process:
                write_results(
                    output, [results_row(r.losses, r.learning_rate, r.task, r.before, r.after, r.folder) for r in results]
                )
                if args.eval and len(args.task_list) > 1:
                    write_sequence(folder.parent, [r for r in results if (r.losses, r.learning_rate) == (losses, rate)])
            if result.before and result.after:
                say(accelerator, "\n" + score_table({"before": result.before, "after": result.after}) + "\n")
                say(
                    accelerator,
                    example_answers(folder / "eval_before", folder / "eval", {"forget": 2, "retain": 2}) + "\n",
                )
            say(accelerator, f"model: {result.model}")
            if args.push_to_hub and accelerator.is_main_process:
                print(push(result.model, repositories(args)[losses, rate, task], args.hub_public))
    return RunResult(output, results)


def _check_objectives(
    args: UnlearnArgs, rows: Sequence[Row], source: Source | OwnFiles, policy: Policy, accelerator: Accelerator
) -> None:
    """Refuse pairs that the data or the model cannot serve.

    Raises:
        InputError: naming the pair and why.
    """
    layer, layers = _layer(args, policy)
    for pair in args.forget_losses:
        objectives = [objective for objective in split_objectives(pair) if objective]
        if layer >= layers - 1 and any(objective.needs_layer for objective in objectives):
            raise InputError(
                f"--layer {layer}: {pair} takes one of the model's layers 0 to {layers - 2} (of the last one's output only the "
                "final norm is seen)"
            )
        check_reference(policy, accelerator, objectives, _reference_folder(args))
        texts = {text for o in objectives for text in (*o.reads, *(o.also.reads if o.also else ()))}
        if texts - {"answer"} and any(row.question is None for row in rows):
            raise InputError(
                f"--forget-losses {pair}: it compares answers to a question, and passages of text have none; "
                "take GA, ME, NPO, SimNPO, WGA, SatImp, UNDIAL, CE-U, PDU or RMU with GD, KL, EMBED or none"
            )
        for position in range(len(args.task_list)):
            needed = len(objectives) > 1 or "mismatch" in texts
            if needed and not source.retain_rows(args.split, args.task_list[: position + 1]):
                raise InputError(f"--forget-losses {pair} needs rows to keep; give --retain-file, or a pair such as NPO+none")


def _layer(args: UnlearnArgs, policy: Policy) -> tuple[int, int]:
    """The layer that RMU and EMBED read, and how many the model has."""
    layers = policy.model.config.get_text_config().num_hidden_layers
    return (min(PUBLISHED_LAYER, layers // 2) if args.layer is None else args.layer), layers


def _reference_folder(args: UnlearnArgs) -> Path:
    return Path(args.reference_dir or f"{args.output_dir}/reference").expanduser()


def _resolved(args: UnlearnArgs, policy: Policy, losses: str, rate: float) -> dict[str, Any]:
    """The arguments of one pair and rate."""
    return resolve(args.of_pair(losses, rate), policy)


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


@dataclass(frozen=True)
class Work:
    """What one task asks for: its rows as phases of terms, and the steps over them."""

    losses: str
    learning_rate: float
    position: int  # of the task in the list
    phases: dict[str, Phase]
    plan: Plan

    def referring(self) -> Iterator[tuple[str, str, Objective, Iterator[Example]]]:
        """Phase, term, objective and all texts of each term that asks what the frozen model says."""
        for phase_name, phase in self.phases.items():
            steps = sum(phase_at(step, self.plan.cycle) == phase_name for step in range(self.plan.last_step))
            for name, term in phase.terms.items():
                if term.objective.reference:
                    yield phase_name, name, term.objective, term.stream.visited(steps)

    def with_reference(self, frozen: Frozen) -> "Work":
        """The same with `frozen` as its reference."""
        phases = dict(self.phases)
        for phase, name, objective, _ in self.referring():
            terms = phases[phase].terms
            terms = terms | {name: dataclasses.replace(terms[name], reference=frozen.reader(objective))}
            phases[phase] = dataclasses.replace(phases[phase], terms=terms)
        return dataclasses.replace(self, phases=phases)


def _work(
    policy: Policy,
    accelerator: Accelerator,
    source: Source | OwnFiles,
    refusals: Sequence[str],
    args: UnlearnArgs,
    losses: str,
    rate: float,
    position: int,
) -> Work:
    """What the task at `position` of the list asks for, from its rows and the arguments."""
    forget_rows = source.task_rows(args.split, args.task_list[position])
    retain_rows = source.retain_rows(args.split, args.task_list[: position + 1])
    layer, _ = _layer(args, policy)
    forget, retain = (objective and objective.resolved(args.beta, args.gamma, layer) for objective in split_objectives(losses))
    assert forget is not None
    wanted = {"forget": forget, "mismatch": forget.also, "retain": retain}
    terms = {}
    for name, objective in wanted.items():
        if objective is None:
            continue
        rows, coefficient = (retain_rows, args.regularization_coeff) if name == "retain" else (forget_rows, args.forget_coeff)
        whole = objective.whole_text or (name != "retain" and not args.mask)
        build = example_builder(rows, policy.formatter, objective.reads, args.seed, refusals, retain_rows, whole)
        order = "retain" if name == "retain" else "forget"  # both losses of a phase meet the same rows
        stream = Stream.of(args, order, len(rows), build, accelerator.process_index, accelerator.num_processes)
        terms[name] = Term(objective, stream, coefficient)

    kept = terms.pop("retain", None)
    if args.optim == "adamw":
        cycle: tuple[tuple[str, int], ...] = (("joint", 1),)
        phases = {"joint": Phase(terms | ({"retain": kept} if kept else {}), rate, args.max_grad_norm)}
    else:
        forget_norm = args.max_grad_norm if args.forget_max_grad_norm is None else args.forget_max_grad_norm
        cycle, phases = (("forget", args.forget_freq),), {"forget": Phase(terms, args.forget_lr or rate, forget_norm)}
        if kept:
            cycle += (("retain", args.retain_freq),)
            phases["retain"] = Phase({"retain": kept}, rate, args.max_grad_norm)
    plan = Plan.of(args, cycle, len(forget_rows), terms["forget"].stream.global_batch)
    return Work(losses, rate, position, phases, plan)


def _freeze(policy: Policy, accelerator: Accelerator, works: Sequence[Work], args: UnlearnArgs) -> Frozen | None:
    """The model as it stands, as the reference of `works`, whose texts are scored while it is here; None if none asks."""
    asked = [(objective, texts) for work in works for _, _, objective, texts in work.referring()]
    if not asked:
        return None
    frozen = Frozen(policy, accelerator, _reference_folder(args), [objective for objective, _ in asked], args.eval_batch_size)
    for objective, texts in asked:
        frozen.score(policy, objective, texts)
    return frozen


def _run_task(
    policy: Policy,
    accelerator: Accelerator,
    source: Source | OwnFiles,
    args: UnlearnArgs,
    work: Work,
    first: Frozen | None,
    folder: Path,
    known: TaskResult | None,
    measures: Measures | None,
) -> TaskResult:
    """Evaluate, unlearn one task, save, evaluate again; `policy` then holds the new weights.

    `first` is the reference if that stays the same for all tasks. `known` is an earlier result that started from the same
    weights.
    """
    position = work.position
    task = args.task_list[position]
    sets, skipped = source.evaluation_sets(args.split, task) if args.eval else ({}, {})
    for earlier in args.task_list[:position] if args.eval else ():  # is it remembered again?
        sets[f"forget_task{earlier}"] = source.evaluation_sets(args.split, earlier)[0]["forget"]
    before = after = None
    if args.eval and known:
        before = known.before
        if accelerator.is_main_process:
            shutil.copytree(known.folder / "eval_before", folder / "eval_before", dirs_exist_ok=True)
    elif args.eval:
        before = evaluate_model(policy, accelerator, sets, skipped, args, folder / "eval_before", measures)
    if before:
        track_scores(accelerator, "eval", before, 0)

    model = folder / "model"
    what = f"{source.describe(args.split, task)} unlearned with {work.losses}"
    own = {"forget_losses": [work.losses], "learning_rates": [work.learning_rate]}
    trained = folder / "trained.json"
    if args.resume and trained.is_file() and json.loads(trained.read_text())["steps"] == work.plan.last_step:
        log = read_json_lines(folder / "log.jsonl")
        policy.model = None
    else:
        frozen = first or _freeze(policy, accelerator, [work], args)
        if frozen:
            work = work.with_reference(frozen)
        try:
            log = _unlearn(policy, accelerator, work, args, folder)
        except NonFiniteError as error:
            export_model(accelerator, policy, model, model_card(args.model, f"{what}, stopped at {error}", args, own=own))
            release(policy, accelerator)
            raise NonFiniteError(f"{error}. The weights before this step are in {model}") from None
        export_model(accelerator, policy, model, model_card(args.model, what, args, before, own=own))
        if accelerator.is_main_process:
            write_json(trained, {"steps": len(log)})
        release(policy, accelerator)
    if policy.model is None and (args.eval or position + 1 < len(args.task_list)):
        policy.model = load_policy(dataclasses.replace(args, model=str(model)), accelerator).model

    if args.eval:
        after = evaluate_model(policy, accelerator, sets, skipped, args, folder / "eval", measures)
        track_scores(accelerator, "eval", after, len(log))
        if accelerator.is_main_process:
            write_text(model / "README.md", model_card(args.model, what, args, before, after, own))
    return TaskResult(work.losses, work.learning_rate, task, folder, model, log, before, after)


def _unlearn(policy: Policy, accelerator: Accelerator, work: Work, args: UnlearnArgs, folder: Path) -> list[dict[str, Any]]:
    """Unlearn one task in place, from where an earlier run stopped, and return the steps' records."""
    path, checkpoint = folder / "log.jsonl", _checkpoint(args, folder)
    taken = read_checkpoint(accelerator, checkpoint) if checkpoint else 0
    if taken > work.plan.last_step:
        raise InputError(f"--resume: {checkpoint} has taken {taken} steps, more than this run would; raise --max-steps")
    lines = path.read_text(encoding="utf-8").splitlines() if taken else []
    records = [json.loads(line) for line in lines[:taken]]
    accelerator.wait_for_everyone()  # all have read before one writes

    def save(step: int) -> None:
        if args.save_every and step % args.save_every == 0:
            save_checkpoint(accelerator, folder / "checkpoint", step, args.keep_checkpoints)

    with StepLog(path, work.plan.last_step, "unlearn", accelerator, records) as log:
        train(
            policy, accelerator, work.phases, work.plan, args, optimizer_of(args), log, checkpoint=checkpoint, after_step=save
        )
    return log.records


def optimizer_of(args: UnlearnArgs) -> MakeOptimizer:
    """What builds the optimizer of a run from parameter groups. Its rates are set before each step.

    Raises:
        InputError: if an import path leads to no optimizer that can be one of two.
    """
    one = adamw(0.0, args.adam_betas, bits=args.optim_bits)
    if args.optim in ("adamw", "adamw-alternate") or args.decouple == "none":
        return one
    if args.optim == "dual-adamw-plus":
        whole = args.optim_bits == 8
        return lambda groups: DualAdamWPlus(
            groups,
            lr=0.0,
            betas=args.adam_betas,
            base_betas=args.base_betas,
            max_update=args.max_update,
            quantize_delta=whole or args.quantize_delta,
            quantize_base=whole or args.quantize_base,
        )
    if args.decouple != "both":
        return lambda groups: PartlyDecoupledAdamW(groups, lr=0.0, betas=args.adam_betas, decouple=args.decouple)
    standard = "adamw-8bit" if args.optim_bits == 8 else "adamw"
    names = args.forget_optimizer or standard, args.retain_optimizer or standard
    decay = args.weight_decay if args.forget_weight_decay is None else args.forget_weight_decay
    try:
        forget = named_optimizer(names[0], args.forget_adam_betas or args.adam_betas, decay)
        retain = named_optimizer(names[1], args.adam_betas, args.weight_decay)

        def make(groups: Groups) -> DualOptimizer:
            return DualOptimizer(groups, forget=forget, retain=retain)

        # a step of both phases over the groups that a model has, so that what cannot be one of two shows now
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = zip(weights, (True, False), strict=True)
        trial = make([{"params": [weight], "decayed": decayed, "bits": 32} for weight, decayed in groups])
        for phase in PHASES:
            trial.use(phase, 1e-3)
            for weight in weights:
                weight.grad = torch.ones(2)
            trial.step()
        unread = [args.forget_adam_betas] if args.forget_adam_betas and not takes_betas(names[0]) else []
        if args.adam_betas != TrainArgs.adam_betas and not any(map(takes_betas, names)):
            unread.append(args.adam_betas)
        if unread:
            raise ValueError(f"no moments that betas {unread[0][0]:g} {unread[0][1]:g} could be of")
    except Exception as error:  # an optimizer's constructor and step raise what they like
        raise InputError(
            f"--forget-optimizer {names[0]}, --retain-optimizer {names[1]}: {reason(error)}; give "
            "adamw, adamw-8bit, sgd, signsgd or the import path of a torch optimizer, such as torch.optim.RMSprop"
        ) from None
    return make


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
