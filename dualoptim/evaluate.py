"""A model over the evaluation sets, on any number of processes: one file of rows per set, and `summary.json`.

Where other models are measured beside it, one after another is loaded.
"""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dualoptim.config.args import DEMO, EvalArgs, MeasureArgs
from dualoptim.attack import Records, check_attacks, relearning_rows, run_attacks
from dualoptim.models.checkpoint import claim, output_folder, weights_hash, write_json
from dualoptim.data.tofu import HOLDOUT, OwnFiles, Row, load_refusals, open_source
from dualoptim.errors import InputError
from dualoptim.evaluation.lm_harness import check_general_ability, general_ability
from dualoptim.evaluation.judges import Judges, load_judges
from dualoptim.models.load import Policy, load_config, load_policy, start_accelerator
from dualoptim.evaluation.scoring import PRIVACY_SETS, Reference, ScoringPass
from dualoptim.evaluation.retain_only import RetainLogs, of_records, read_retain_logs
from dualoptim.evaluation.measure import measure, summarize
from dualoptim.reporting.tables import evaluation_tables
from dualoptim.reporting.log import resolve, say, write_config

Sets = dict[str, list[Row]]
Measures = tuple[Judges, RetainLogs | None]
"""What an evaluation needs beside the model and the rows."""


def check_measures(args: MeasureArgs, accelerator: Accelerator) -> Measures:
    """Read it, before anything is written.

    Raises:
        InputError: if a part of it cannot be read.
    """
    check_general_ability(args)
    load_refusals(args.idk_file)
    return load_judges(args, accelerator.device), read_retain_logs(args.retain_logs) if args.retain_logs else None


def evaluate_model(
    policy: Policy,
    accelerator: Accelerator,
    sets: Sets,
    skipped: dict[str, str],
    args: MeasureArgs,
    folder: Path,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """Evaluate on every set, write `folder`, and return the summary (the same on all processes).

    `skipped` names what the data could not give, and why. Rows are shared among processes and gathered in order.
    """
    judges, retain = measures or check_measures(args, accelerator)
    scoring = ScoringPass(policy, accelerator, args, judges, HOLDOUT in sets)
    summary = _summary(scoring, measure(scoring, sets, folder), skipped, retain)
    if accelerator.is_main_process:
        write_json(folder / "summary.json", summary)
    return summary


def _summary(scoring: ScoringPass, records: Records, skipped: dict[str, str], retain: RetainLogs | None) -> dict[str, Any]:
    """Everything that is measured of a model as it stands."""
    summary = summarize(scoring, records, skipped, retain)
    if scoring.args.lm_eval_tasks:
        summary["general"] = general_ability(scoring.policy, scoring.accelerator, scoring.args)
    return summary


def evaluate(args: EvalArgs) -> dict[str, Any]:
    """Evaluate a model on disk or from the hub, and attack it; writes `<output_dir>/eval/` and returns the summary.

    An evaluation with the same arguments that was interrupted there is continued. Raises:
        InputError: for anything that is wrong with the arguments, the data or the model.
    """
    if args.model == DEMO:
        raise InputError("--model demo has no weights on disk; give a folder, such as the model/ that a demo run wrote")
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator) / "eval"
    source = open_source(args)
    sets, _ = source.evaluation_sets(args.split, args.task)  # what is wrong with the data shows before a model is loaded
    judges, retain = check_measures(args, accelerator)
    for flag, value in (("--reference-model", args.reference_model), ("--mia-gradnorm", args.mia_gradnorm)):
        if value and HOLDOUT not in sets:
            shown = flag if value is True else f"{flag} {value}"
            raise InputError(f"{shown} is for membership attacks; give --holdout-file, rows that no model has seen")
    check_attacks(args, accelerator, source)
    for flag, model in (("--retain-model", args.retain_model), ("--reference-model", args.reference_model)):
        if model is not None:
            try:
                load_config(dataclasses.replace(args, model=model))
            except InputError as error:
                raise InputError(str(error).replace("--model", flag, 1)) from None
    policy = load_policy(args, accelerator)
    if isinstance(source, OwnFiles):
        source.cut(policy.formatter)
    sets, skipped = source.evaluation_sets(args.split, args.task)
    policy.formatter.check(row for rows in sets.values() for row in rows)
    taught = relearning_rows(args, source, policy.formatter)
    config = resolve(args, policy)
    if args.overwrite or not _was_interrupted(folder, config, accelerator):
        claim(args, accelerator, [folder])
    if accelerator.is_main_process:
        write_config(folder / "config.yaml", config)

    scoring = ScoringPass(policy, accelerator, args, judges, HOLDOUT in sets)
    retain_records: Records | None = None
    if args.reference_model is not None or args.retain_model is not None:
        policy.model = None
        if args.reference_model is not None:
            scoring.reference = _reference(args, args.reference_model, scoring, sets)
        if args.retain_model is not None:
            retain, retain_records = _retain_only(args, args.retain_model, scoring, sets, skipped, folder / "retain_only")
        gc.collect()
        scoring.policy = load_policy(args, accelerator)
    records = measure(scoring, sets, folder)
    summary = _summary(scoring, records, skipped, retain)
    attacks = run_attacks(scoring, sets, taught, records, retain_records, folder / "attacks")
    if attacks:
        summary["attacks"] = attacks
    if accelerator.is_main_process:
        write_json(folder / "summary.json", summary)
    say(accelerator, f"\n{evaluation_tables(summary)}\n\nrows and summary: {folder}")
    return summary


_FREE = "output_dir overwrite threads eval_batch_size packing environment".split()
"""What may differ between an evaluation and its continuation."""


def _was_interrupted(folder: Path, config: dict[str, Any], accelerator: Accelerator) -> bool:
    """Whether an evaluation with this configuration began in `folder` and did not end; the same on all processes."""
    same = False
    if accelerator.is_main_process and (folder / "config.yaml").is_file() and not (folder / "summary.json").is_file():
        earlier = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        same = all(earlier.get(name) == value for name, value in config.items() if name not in _FREE)
    return broadcast_object_list([same])[0]


def _reference(args: EvalArgs, model: str, scoring: ScoringPass, sets: Sets) -> Reference:
    """What `--reference-model` says about the answers that membership attacks look at."""
    other = dataclasses.replace(args, model=model)
    policy = load_policy(other, scoring.accelerator)
    policy.model.eval()
    same = dataclasses.replace(scoring, policy=policy, args=other)
    return Reference(weights_hash(policy.model), {name: same.losses(name, sets[name]) for name in PRIVACY_SETS})


def _retain_only(
    args: EvalArgs, model: str, scoring: ScoringPass, sets: Sets, skipped: dict[str, str], folder: Path
) -> tuple[RetainLogs, Records]:
    """What is measured of `--retain-model` and written to `folder`, and its records."""
    other = dataclasses.replace(args, model=model, retain_model=None)
    same = dataclasses.replace(scoring, policy=load_policy(other, scoring.accelerator), args=other)
    records = measure(same, sets, folder)
    summary = _summary(same, records, skipped, None)
    if scoring.accelerator.is_main_process:
        write_json(folder / "summary.json", summary)
    return of_records(records, summary, model), records
