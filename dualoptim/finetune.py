"""Fine-tune a model on rows: the shortest complete program on the training loop. Read this file first.

    dualoptim finetune --model MODEL --data DATA --splits retain90 forget01 --output-dir runs/target

It makes target models, which know the forget set, and retain-only models, which never saw it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualoptim.config.args import FinetuneArgs
from dualoptim.config.cli import main
from dualoptim.config.saved import write_config
from dualoptim.data.rows import Row
from dualoptim.data.stream import ExampleBuilder, Stream
from dualoptim.data.tofu import tofu_source
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.method.adamw import adamw
from dualoptim.method.loop import Phase, Term, steps
from dualoptim.method.objectives import Objective, negative_log_likelihood
from dualoptim.method.schedule import Plan, steps_per_epoch
from dualoptim.models.export import export_model
from dualoptim.models.launch import claim, output_folder, release, start_accelerator, training
from dualoptim.models.load import load_model
from dualoptim.models.loaded import LoadedModel, MicroBatches
from dualoptim.reporting.card import model_card
from dualoptim.reporting.log import StepLog, trackers


@dataclass(frozen=True)
class FinetuneResult:
    """Where a fine-tuned model lies, and what each step said."""

    folder: Path
    model: Path
    log: list[dict[str, Any]]


def finetune(args: FinetuneArgs) -> FinetuneResult:
    """Teach a model all rows of some splits; writes `<output_dir>/model/`, `log.jsonl` and `config.yaml`.

    Raises:
        InputError: for anything that is wrong with the arguments, the data or the model.
        NonFiniteError: if a loss or gradient is not finite.
    """
    # ---- read everything that can be wrong, before anything is written
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    rows = rows_to_learn(args)
    loaded = load_model(args, accelerator)
    loaded.formatter.check(rows)
    claim(args, accelerator, [folder / name for name in ("config.yaml", "log.jsonl", "model", "trackers")])

    # ---- train and save
    if accelerator.is_main_process:
        write_config(folder / "config.yaml", loaded.resolved(args))
    what, model = f"fine-tuned on {', '.join(args.splits)} of {args.data_source}", folder / "model"
    log = StepLog(folder / "log.jsonl", plan_of(args, len(rows), accelerator.num_processes).last_step, "fine-tune", accelerator)
    try:
        with trackers(accelerator, folder, folder.name, loaded.resolved(args)), log:
            for _ in learn(loaded, rows, args, log):
                pass  # a step is taken whenever its record is asked for
        export_model(loaded, model, model_card(args, what))
    except NonFiniteError as error:
        export_model(loaded, model, model_card(args, f"{what}, stopped at {error}"))
        raise NonFiniteError(f"{error}. The weights before this step are in {model}") from None
    finally:
        release(loaded)
    return FinetuneResult(folder, model, log.records)


def learn(loaded: LoadedModel, rows: Sequence[Row], args: FinetuneArgs, log: StepLog) -> Iterator[dict[str, Any]]:
    """Train a model on rows, a step whenever the next record is asked for, and leave it prepared.

    Ends with the last epoch, or after the first one whose mean loss per token is below `target_loss`.
    """
    stream = Stream.of(args, "retain", ExampleBuilder(rows, loaded.formatter, ("answer",), args.seed), loaded.share)
    term = Term(Objective(negative_log_likelihood), MicroBatches(stream, loaded.layout))
    phases = {"learn": Phase({"learn": term}, args.learning_rate, args.max_grad_norm)}
    plan = plan_of(args, len(rows), loaded.accelerator.num_processes)

    with training(loaded, args, adamw(args.learning_rate, args.adam_betas, bits=args.optim_bits)) as engine:
        for record in steps(engine, phases, plan):
            log.add(record)
            yield record
            if record["step"] % plan.steps_per_epoch == 0:
                epoch = log.records[-plan.steps_per_epoch :]
                tokens = sum(one["count"] for one in epoch)
                if sum(one["loss"] * one["count"] for one in epoch) / tokens < args.target_loss:
                    return


def plan_of(args: FinetuneArgs, rows: int, processes: int) -> Plan:
    """How many steps the training takes, and at which rates."""
    cycle = (("learn", 1),)
    per_epoch = steps_per_epoch(rows, args.batch_size * args.gradient_accumulation_steps * processes, cycle)
    return Plan(cycle, per_epoch, args.num_epochs, args.warmup_epochs, args.max_steps)


def rows_to_learn(args: FinetuneArgs) -> list[Row]:
    """The rows of `--splits`, or those of `--tasks` among them.

    Raises:
        InputError: if a split is unknown or cannot be read, or has none of these tasks.
    """
    source = tofu_source(args.data_source)
    rows = [row for split in args.splits for row in source.rows(split)]
    missing = set(args.tasks) - {row.task for row in rows}
    if missing:
        raise InputError(f"--tasks {min(missing)}: no row of {', '.join(args.splits)} belongs to this task")
    return [row for row in rows if not args.tasks or row.task is None or row.task in args.tasks]


if __name__ == "__main__":
    main(FinetuneArgs, finetune)
