"""Fine-tuning: the training loop with one phase, for target models (they know the forget set) and retain-only models.

python -m dualoptim.finetune --model MODEL --data DATA --splits retain90 forget01 --output-dir runs/target
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.data import demo
from dualoptim.config.args import DEMO, FinetuneArgs, main
from dualoptim.reporting.card import model_card
from dualoptim.models.checkpoint import claim, export_model, output_folder
from dualoptim.data.tofu import Row, Source, Stream, example_builder
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.method.loop import Phase, Plan, Term, train
from dualoptim.method.objectives import Objective, negative_log_likelihood
from dualoptim.models.load import Policy, assemble, load_policy, make_formatter, release, start_accelerator
from dualoptim.method.dual import adamw
from dualoptim.reporting.log import StepLog, resolve, trackers, write_config


@dataclass(frozen=True)
class FinetuneResult:
    """Where a fine-tuned model lies, and what each step said."""

    folder: Path
    model: Path
    log: list[dict[str, Any]]


DEMO_RECIPE = FinetuneArgs(
    splits=("full", "real_authors_perturbed", "world_facts_perturbed"),
    learning_rate=3e-3,
    num_epochs=60,
    batch_size=40,
    target_loss=0.01,
)
"""How the demo's tiny model is taught its rows: until the mean loss of an epoch says that it knows the answers."""


def finetune(args: FinetuneArgs) -> FinetuneResult:
    """Fine-tune a model on all rows of some splits; writes `<output_dir>/model/`, `log.jsonl` and `config.yaml`.

    Raises:
        InputError: for anything that is wrong with the arguments, the data or the model.
        NonFiniteError: if a loss or gradient is not finite.
    """
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    source = Source(args.data_source)
    rows = [row for split in args.splits for row in source.rows(split)]
    if args.tasks:
        missing = set(args.tasks) - {row.task for row in rows}
        if missing:
            raise InputError(f"--tasks {min(missing)}: no row of {', '.join(args.splits)} belongs to this task")
        rows = [row for row in rows if row.task is None or row.task in args.tasks]
    policy = demo_policy(args, accelerator) if args.model == DEMO else load_policy(args, accelerator)
    policy.formatter.check(rows)
    claim(args, accelerator, [folder / name for name in ("config.yaml", "log.jsonl", "model", "trackers")])
    resolved = resolve(args, policy)
    if accelerator.is_main_process:
        write_config(folder / "config.yaml", resolved)
    what = f"fine-tuned on {', '.join(args.splits)} of {args.data_source}"
    try:
        with trackers(args, accelerator, folder, folder.name, resolved):
            log = fit(policy, accelerator, rows, args, folder / "log.jsonl", "fine-tune")
    except NonFiniteError as error:
        export_model(accelerator, policy, folder / "model", model_card(args.model, f"{what}, stopped at {error}", args))
        release(policy, accelerator)
        raise NonFiniteError(f"{error}. The weights before this step are in {folder / 'model'}") from None
    export_model(accelerator, policy, folder / "model", model_card(args.model, what, args))
    release(policy, accelerator)
    return FinetuneResult(folder, folder / "model", log)


def fit(
    policy: Policy,
    accelerator: Accelerator,
    rows: Sequence[Row],
    args: FinetuneArgs,
    log_path: Path | None,
    label: str,
    after_step: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train on `rows` with one phase until the last epoch, or until `target_loss` is reached; the steps' records.

    `after_step` gets the number of steps taken.
    """
    builder = example_builder(rows, policy.formatter, ("answer",), args.seed)
    stream = Stream.of(args, "retain", len(rows), builder, accelerator.process_index, accelerator.num_processes)
    phases = {
        "retain": Phase({"retain": Term(Objective(negative_log_likelihood), stream)}, args.learning_rate, args.max_grad_norm)
    }
    plan = Plan.of(args, (("retain", 1),), len(rows), stream.global_batch)

    def knows_enough(epoch: int, records: Sequence[dict[str, Any]]) -> bool:
        tokens = sum(record["count"] for record in records)
        return sum(record["loss"] * record["count"] for record in records) / tokens < args.target_loss

    with StepLog(log_path, plan.last_step, label, accelerator) as log:
        train(
            policy,
            accelerator,
            phases,
            plan,
            args,
            adamw(args.learning_rate, args.adam_betas, bits=args.optim_bits),
            log,
            after_epoch=knows_enough,
            after_step=after_step,
        )
    return log.records


def demo_policy(args: FinetuneArgs, accelerator: Accelerator) -> Policy:
    """The demo's untrained model and its tokenizer."""
    model, tokenizer = demo.tiny_model(args.seed)
    formatter, template = make_formatter(args, tokenizer)
    return assemble(args, model, formatter, template, accelerator)


if __name__ == "__main__":
    main(FinetuneArgs, finetune)
