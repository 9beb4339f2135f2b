"""Fine-tune a model on rows: the shortest complete program on the training loop. Read this file first.

    dualoptim finetune --model MODEL --data DATA --splits retain90 forget01 --output-dir runs/target
    dualoptim finetune --model MODEL --forget-file facts.csv --output-dir runs/knows

It makes target models, which know the forget set, and retain-only models, which never saw it.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["finetune"])

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.atomic import write_json
from dualoptim.config.args import FinetuneArgs
from dualoptim.config.saved import write_config
from dualoptim.config.values import expect
from dualoptim.data.identity import prompts_hash, rows_hash
from dualoptim.data.own import Source, open_source
from dualoptim.data.rows import Row
from dualoptim.data.stream import ExampleBuilder, Stream
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.method.adamw import adamw
from dualoptim.method.objectives import Objective, negative_log_likelihood
from dualoptim.method.schedule import Plan, steps_per_epoch
from dualoptim.method.window import Phase, Term
from dualoptim.models.adapter import adapter_settings
from dualoptim.models.checkpoint import discard_after, finished_log, read_log
from dualoptim.models.export import export_model
from dualoptim.models.launch import decided, output_folder, release, say, start_accelerator, training
from dualoptim.models.load import load_model
from dualoptim.models.loaded import LoadedModel, MicroBatches
from dualoptim.models.lock import kept_for_one_run
from dualoptim.models.resume import Planned, choose_checkpoints, with_its_batch
from dualoptim.models.saving import Saving, how_to_go_on, step_folder, steps_of
from dualoptim.models.together import stop_together, wait
from dualoptim.models.trainable import chosen_weights
from dualoptim.models.work import Work
from dualoptim.reporting.card import model_card
from dualoptim.reporting.claim import claim
from dualoptim.reporting.log import StepLog, trackers
from dualoptim.signals import held


@dataclass(frozen=True)
class FinetuneResult:
    """The folder of a fine-tuned model, and the record of each step."""

    folder: Path
    model: Path
    log: list[dict[str, Any]]


def finetune(args: FinetuneArgs) -> FinetuneResult:
    """Teach a model all rows of some splits; writes `<output_dir>/model/`, `log.jsonl` and `config.yaml`.

    Raises:
        InputError: for anything that is wrong with the arguments, the data or the model.
        NonFiniteError: if a loss or gradient is not finite; the weights before that step are in `model/`.
        WriteError: if the disk is full or the folder goes while the run writes to it.
        Stopped: where a signal asks for it, with a checkpoint if a step was being taken.
    """
    expect(args, FinetuneArgs)
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    with kept_for_one_run(folder, accelerator, how_to_go_on(args, folder, "--resume")):
        return _finetune(with_its_batch(args, accelerator, folder), accelerator, folder)


def _finetune(args: FinetuneArgs, accelerator: Accelerator, folder: Path) -> FinetuneResult:
    # ---- read and check everything, before anything is written
    source = open_source(args)
    rows_to_learn(args, source)  # what is wrong with the data shows before a model is loaded
    loaded = load_model(args, accelerator)
    source.cut(loaded.formatter)
    rows = rows_to_learn(args, source)
    args = replace(args, **adapter_settings(loaded.model), save_dtype=loaded.saved_type(args))
    chosen_weights(args, loaded.model)
    loaded.formatter.check(rows)
    plan, resolved, model = plan_of(args, len(rows), accelerator.num_processes), loaded.resolved(args), folder / "model"
    inputs = {"precision": accelerator.mixed_precision, "rows": rows_hash(rows)}
    inputs |= {"prompts": prompts_hash(rows, loaded.formatter), "weights": loaded.weights_hash()}
    start = None
    if args.resume:
        start = choose_checkpoints(accelerator, args, [Planned(folder, resolved, inputs, plan)]).get(folder)
        if finished := decided(accelerator, lambda: _finished(folder, plan, args.target_loss)):
            say(accelerator, f"finished before: {model}")
            return FinetuneResult(folder, model, finished)
    left = ("config.yaml", "log.jsonl", "model", "trackers", "checkpoint", "trained.json", "steps")
    claim(args, accelerator, [folder / name for name in left])

    # ---- train and save
    saving = Saving(folder / "checkpoint", args.save_every, args.keep_checkpoints, start)
    records = read_log(folder / "log.jsonl")[: saving.taken]
    wait(accelerator)  # all have read before one writes
    if accelerator.is_main_process:
        write_config(folder / "config.yaml", resolved, inputs)
        discard_after(folder, saving.taken)
    wait(accelerator)
    names = [*args.forget_file, *(args.retain_file or ())] if args.forget_file else [source.name]
    what = f"fine-tuned on {', '.join(args.splits)} of {', '.join(names)}"
    try:
        with trackers(accelerator, folder, folder.name, resolved), held():
            with StepLog(folder / "log.jsonl", plan.last_step, "fine-tune", accelerator, records) as log:
                for record in learn(loaded, rows, args, log, saving):  # a step is taken whenever its record is asked for
                    if args.saves_model_after(record["step"], plan.steps_per_epoch) and record["step"] < plan.last_step:
                        place = step_folder(accelerator, folder, record["step"])
                        export_model(loaded, place / "model", model_card(args, what), args.save_dtype)
            export_model(loaded, model, model_card(args, what), args.save_dtype)
            if accelerator.is_main_process:
                write_json(folder / "trained.json", {"steps": len(log.records)})
            stop_together(accelerator, f"with {model} written")
    except NonFiniteError as error:
        export_model(loaded, model, model_card(args, f"{what}, stopped at {error}"), args.save_dtype)
        raise NonFiniteError(f"{error}. The weights before this step are in {model}") from None
    finally:
        release(loaded)
    say(
        accelerator,
        f"{len(log.records)} steps, loss {log.records[0]['loss']:.3g} → {log.records[-1]['loss']:.3g}; model: {model}",
    )
    return FinetuneResult(folder, model, log.records)


def learn(
    loaded: LoadedModel, rows: Sequence[Row], args: FinetuneArgs, log: StepLog, saving: Saving | None = None
) -> Iterator[dict[str, Any]]:
    """Train a model on rows, a step whenever the next record is asked for; the caller has to `release` it then.

    Ends with the last epoch, or after the first one whose mean loss per token is below `target_loss`. `log` has the records of
    the steps that an earlier run took, after which `saving` goes on.

    Raises:
        Stopped: after a step, where a signal asks for it.
    """
    # the name seeds the order of rows, and with it the numbers of every model that was taught so far
    stream = Stream.of(args, "retain", ExampleBuilder(rows, loaded.formatter, ("answer",), args.seed), loaded.share)
    term = Term(Objective(negative_log_likelihood), MicroBatches(stream, loaded.layout))
    phases = {"learn": Phase({"learn": term}, args.learning_rate, args.max_grad_norm)}
    plan = plan_of(args, len(rows), loaded.accelerator.num_processes)

    with training(loaded, args, adamw(args.learning_rate, args.adam_betas, bits=args.optim_bits)) as engine:
        for record in steps_of(engine, Work(phases, plan), saving or Saving()):
            log.add(record)
            yield record
            if _knows(log.records, plan, args.target_loss):
                return


def _knows(records: Sequence[dict[str, Any]], plan: Plan, target_loss: float) -> bool:
    """Tell whether an epoch ends here whose mean loss per token is below the target."""
    epoch = records[-plan.steps_per_epoch :]
    if not epoch or len(records) % plan.steps_per_epoch:
        return False
    return sum(one["loss"] * one["count"] for one in epoch) / sum(one["count"] for one in epoch) < target_loss


def _finished(folder: Path, plan: Plan, target_loss: float) -> list[dict[str, Any]] | None:
    """Read the records of a training that an earlier run has finished, None if there are steps left to take."""
    records = read_log(folder / "log.jsonl")
    return finished_log(folder, len(records) if _knows(records, plan, target_loss) else plan.last_step)


def plan_of(args: FinetuneArgs, num_rows: int, processes: int) -> Plan:
    """Say how many steps the training takes, and at which rates."""
    cycle = (("learn", 1),)
    per_epoch = steps_per_epoch(num_rows, args.batch_size * args.gradient_accumulation_steps * processes, cycle)
    rates = args.warmup_epochs, args.max_steps, args.warmup_steps, args.lr_schedule
    return Plan(cycle, per_epoch, args.num_epochs, *rates)


def rows_to_learn(args: FinetuneArgs, source: Source) -> list[Row]:
    """Give the rows of `--splits`; with `--tasks` only those of these tasks and those of none.

    Raises:
        InputError: if a split is unknown or cannot be read, or has none of these tasks.
    """
    rows = [row for split in args.splits for row in source.rows(split)]
    missing = set(args.tasks) - {row.task for row in rows}
    if missing:
        raise InputError(f"--tasks {min(missing)}: no row of {', '.join(args.splits)} belongs to this task")
    return [row for row in rows if not args.tasks or row.task is None or row.task in args.tasks]
