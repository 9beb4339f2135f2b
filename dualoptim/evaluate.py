"""Evaluate a model on any number of processes: one file of rows per set, and `summary.json`.

Where other models are measured beside it, one after another is loaded.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.attack import ATTACKED_SETS, Target, attack_answers, attack_weights, check_attacks, make_lesson
from dualoptim.config.args import DEMO, EvalArgs, MeasureArgs
from dualoptim.config.saved import changed_input, difference, write_config
from dualoptim.config.values import expect
from dualoptim.data.declaration import read_declaration
from dualoptim.data.identity import sets_hash
from dualoptim.data.own import Source, open_source
from dualoptim.data.rows import HOLDOUT, Row
from dualoptim.errors import InputError
from dualoptim.evaluation.benchmark_scores import benchmark_scores, check_scores
from dualoptim.evaluation.judges import Judges, load_judges
from dualoptim.evaluation.lm_harness import check_general_ability, general_ability
from dualoptim.evaluation.measure import measure
from dualoptim.evaluation.records import Records
from dualoptim.evaluation.retain_only import RetainLogs, of_records, read_retain_logs
from dualoptim.evaluation.scoring import MEMBERSHIP_SETS, ReferenceLosses, ScoringPass
from dualoptim.evaluation.summarize import summarize
from dualoptim.evaluation.summary import Attacks, Summary
from dualoptim.evaluation.vllm_answers import check_generation
from dualoptim.models.launch import decided, output_folder, say, start_accelerator
from dualoptim.models.load import load_config, load_model
from dualoptim.models.loaded import LoadedModel, precision_of
from dualoptim.models.lock import kept_for_one_run
from dualoptim.models.measured import check_sharded
from dualoptim.models.saving import how_to_go_on
from dualoptim.models.together import wait
from dualoptim.reporting.claim import claim
from dualoptim.reporting.console import evaluation_tables

SetsAndSkipped = tuple[Mapping[str, list[Row]], Mapping[str, str]]
"""The rows of evaluation sets, and why others are missing, as a source of rows gives them."""


@dataclass(frozen=True)
class Measures:
    """What an evaluation needs beside the model and the rows."""

    args: MeasureArgs
    judges: Judges
    retain: RetainLogs | None = None
    reference: ReferenceLosses | None = None

    @classmethod
    def load(cls, args: MeasureArgs, accelerator: Accelerator) -> "Measures":
        """Read what the arguments name, before anything is written.

        Raises:
            InputError: if a part of it cannot be read.
        """
        check_sharded(args, accelerator)
        check_generation(args, accelerator)
        check_general_ability(args)
        if args.benchmark:
            check_scores(read_declaration(args.benchmark))
        judges = load_judges(args, accelerator)
        retain = read_retain_logs(args.retain_logs) if args.retain_logs else None
        if retain and retain.summary is not None:
            own, other = str(precision_of(accelerator)).removeprefix("torch."), retain.summary.precision or "float32"
            if own != other:
                say(accelerator, f"--retain-logs {args.retain_logs} is in {other}, and this launch measures in {own}")
        return cls(args, judges, retain)

    def check(self, loaded: LoadedModel) -> None:
        """Make sure that all that is asked for can be measured of a model, before anything is.

        Raises:
            InputError: naming what needs the whole of a model that is divided.
        """
        bits = getattr(self.args, "quantize", ()) if loaded.device.type == "cpu" else ()  # simulated there
        asked = {"--mia-gradnorm": self.args.mia_gradnorm, f"--quantize {' '.join(map(str, bits))}": bits}
        for flag in (flag for flag, given in asked.items() if given and loaded.divided):
            raise InputError(f"{flag} needs the whole model in every process; drop it, or give --evaluate-sharded no")

    def identity(self) -> list[Any]:
        """Give what tells whether files and models that the arguments name are still the same."""
        models = [judge and judge.weights for judge in (self.judges.encoder, self.judges.entailment)]
        return [*models, self.judges.refusals, self.retain and [self.retain.truth_ratios, self.retain.min_k_auc]]


def evaluate_model(loaded: LoadedModel, asked: SetsAndSkipped, measures: Measures, folder: Path) -> Summary:
    """Evaluate a model on every set, write `folder`, and return the summary (the same on all processes)."""
    summary, _ = _measured(loaded, asked, measures, folder)
    if loaded.accelerator.is_main_process:
        summary.write(folder / "summary.json")
    return summary


def _measured(loaded: LoadedModel, asked: SetsAndSkipped, measures: Measures, folder: Path) -> tuple[Summary, Records]:
    """Measure everything of a model as it stands; its rows are written to `folder`."""
    measures.check(loaded)
    (sets, skipped), args = asked, measures.args
    records = measure(ScoringPass(loaded, args, measures.judges, HOLDOUT in sets, measures.reference), sets, folder)
    summary = summarize(records, skipped, measures.judges, measures.retain)
    summary = replace(summary, precision=None if loaded.precision == "float32" else loaded.precision)
    if args.lm_eval_tasks:
        summary = replace(summary, general=general_ability(loaded, args))
    if args.benchmark:
        scores, missing = benchmark_scores(read_declaration(args.benchmark), summary)
        summary = replace(summary, benchmark=scores, skipped={**summary.skipped, **missing})
    return summary, records


def evaluate(args: EvalArgs) -> Summary:
    """Evaluate a model on disk or from the hub, and attack it; writes `<output_dir>/eval/` and returns the summary.

    An evaluation with the same arguments, rows and weights that was interrupted there is continued.

    Raises:
        InputError: for anything that is wrong with the arguments, the data or the model.
        WriteError: if the disk is full or the folder goes meanwhile; the same evaluation goes on then.
    """
    expect(args, EvalArgs)
    if args.model == DEMO:
        raise InputError("--model demo has no weights on disk; give a folder, such as the model/ that a demo run wrote")
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    with kept_for_one_run(folder, accelerator, how_to_go_on(args, folder)):
        return _evaluate(args, accelerator, folder / "eval")


def _evaluate(args: EvalArgs, accelerator: Accelerator, folder: Path) -> Summary:
    source = open_source(args)
    source.evaluation_sets(args.split, args.task)  # what is wrong with the data shows before a model is loaded
    measures = Measures.load(args, accelerator)
    _check(args, source, accelerator)

    loaded = load_model(args, accelerator, "measure")
    source.cut(loaded.formatter)
    sets, skipped = source.evaluation_sets(args.split, args.task)
    loaded.formatter.check(row for rows in sets.values() for row in rows)
    measures.check(loaded)
    lesson = make_lesson(args, source, loaded.formatter)
    config = loaded.resolved(args)
    inputs = {"precision": loaded.precision, "weights": loaded.weights_hash()}
    inputs["evaluation"] = sets_hash(sets, loaded.formatter, *measures.identity())
    if args.overwrite or not _was_interrupted(folder, accelerator, config, inputs):
        claim(args, accelerator, [folder])
    if accelerator.is_main_process:
        write_config(folder / "config.yaml", config, inputs)

    retain_records: Records | None = None
    if args.reference_model is not None or args.retain_model is not None:
        del loaded  # each model has the memory for itself
        if args.reference_model is not None:
            other = load_model(replace(args, model=args.reference_model), accelerator, "measure")
            measures = replace(measures, reference=_reference_losses(other, measures, sets))
            del other
        if args.retain_model is not None:
            other = load_model(replace(args, model=args.retain_model), accelerator, "measure")
            alone, retain_records = _measured(other, (sets, skipped), measures, folder / "retain_only")
            if accelerator.is_main_process:
                alone.write(folder / "retain_only" / "summary.json")
            measures = replace(measures, retain=of_records(retain_records["forget"], alone, args.retain_model))
            del other
        gc.collect()
        loaded = load_model(args, accelerator, "measure")
    summary, records = _measured(loaded, (sets, skipped), measures, folder)

    if accelerator.is_main_process and (lesson or args.quantize or args.paraphrase or args.sample):
        (folder / "attacks").mkdir(exist_ok=True)
    attacked = {name: rows for name, rows in sets.items() if name in ATTACKED_SETS}
    target = Target(args, accelerator, measures.judges, attacked, records, retain_records, folder / "attacks")
    attacks = attack_answers(target, loaded)
    del loaded
    gc.collect()
    changed = attack_weights(target, lesson)
    attacks = replace(attacks, quantize=changed.quantize, relearn=changed.relearn)
    if attacks != Attacks():
        summary = replace(summary, attacks=attacks)
    if accelerator.is_main_process:
        summary.write(folder / "summary.json")
    say(accelerator, f"\n{evaluation_tables(summary)}\n\nrows and summary: {folder}")
    wait(accelerator)
    return summary


def _check(args: EvalArgs, source: Source, accelerator: Accelerator) -> None:
    """Refuse what the data, the launch or the models named cannot serve, before anything is written.

    Raises:
        InputError: naming the flag and why.
    """
    sets, _ = source.evaluation_sets(args.split, args.task)
    for flag, value in (("--reference-model", args.reference_model), ("--mia-gradnorm", args.mia_gradnorm)):
        if value and HOLDOUT not in sets:
            shown = flag if value is True else f"{flag} {value}"
            raise InputError(f"{shown} is for membership attacks; give --holdout-file, rows that no model has seen")
    check_attacks(args, accelerator, source)
    for flag, model in (("--retain-model", args.retain_model), ("--reference-model", args.reference_model)):
        if model is not None:
            try:
                load_config(replace(args, model=model))
            except InputError as error:
                raise InputError(str(error).replace("--model", flag, 1)) from None


def _was_interrupted(folder: Path, accelerator: Accelerator, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Tell whether an evaluation with this configuration, of these rows and weights, began in `folder` and did not end.

    The same on all processes.
    """
    path = folder / "config.yaml"

    def same() -> bool:
        if not path.exists() or (folder / "summary.json").exists() or any(file.is_dir() for file in folder.glob("*.json*")):
            return False
        return difference(path, config, EvalArgs, may_change=("speed", "nothing")) is None and not changed_input(path, inputs)

    return decided(accelerator, same)


def _reference_losses(loaded: LoadedModel, measures: Measures, sets: Mapping[str, list[Row]]) -> ReferenceLosses:
    """Compute what another model says of the answers that membership attacks look at."""
    loaded.model.eval()
    scoring = ScoringPass(loaded, measures.args, measures.judges)
    return ReferenceLosses(
        loaded.weights_hash(), {name: scoring.losses(name, sets[name]) for name in MEMBERSHIP_SETS if name in sets}
    )
