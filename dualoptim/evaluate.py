"""Evaluate a model on any number of processes: one file of rows per set, and `summary.json`.

Where other models are measured beside it, one after another is loaded.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["eval"])

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.attack import attack_answers, attack_weights, check_attacks, hints
from dualoptim.config.args import EvalArgs, MeasureArgs
from dualoptim.config.saved import changed_input, difference, write_config
from dualoptim.config.values import expect
from dualoptim.data.declaration import read_declaration
from dualoptim.data.identity import sets_hash
from dualoptim.data.own import Source, open_source
from dualoptim.data.rows import HOLDOUT, Row
from dualoptim.data.targets import with_targets
from dualoptim.data.unseen import known_to_train
from dualoptim.errors import InputError
from dualoptim.evaluation.benchmark_scores import benchmark_scores, check_benchmark
from dualoptim.evaluation.comparisons import COMPARISONS
from dualoptim.evaluation.generation import check_asked
from dualoptim.evaluation.judges import Judges, load_judges
from dualoptim.evaluation.lm_harness import check_general_ability, general_ability
from dualoptim.evaluation.measure import measure
from dualoptim.evaluation.open_unlearning import suites_of, with_aggregates, write_suites
from dualoptim.evaluation.past import Past, before_unlearning, otherwise
from dualoptim.evaluation.records import Records
from dualoptim.evaluation.retain_only import RetainLogs, of_records, read_retain_logs
from dualoptim.evaluation.scoring import ReferenceLosses, ScoringPass
from dualoptim.evaluation.summarize import summarize
from dualoptim.evaluation.summary import Attacks, Summary
from dualoptim.evaluation.unseen import with_unseen
from dualoptim.evaluation.verdict import judge
from dualoptim.evaluation.vllm_answers import check_generation
from dualoptim.models.launch import decided, output_folder, say, start_accelerator
from dualoptim.models.load import load_config, load_model
from dualoptim.models.loaded import LoadedModel, precision_of
from dualoptim.models.lock import kept_for_one_run
from dualoptim.models.measured import check_sharded
from dualoptim.models.saving import how_to_go_on
from dualoptim.models.together import wait
from dualoptim.relearn import make_lessons
from dualoptim.reporting.claim import claim
from dualoptim.reporting.console import evaluation_tables, shown
from dualoptim.reporting.results import SPLITS_FILES, write_splits
from dualoptim.reporting.verdicts import verdict_text
from dualoptim.target import ATTACKED_SETS, Target

SetsAndSkipped = tuple[Mapping[str, list[Row]], Mapping[str, str]]
"""The rows of evaluation sets, and why others are missing, as a source of rows gives them."""


@dataclass(frozen=True)
class Measures:
    """What an evaluation needs beside the model and the rows."""

    args: MeasureArgs
    judges: Judges
    retain: RetainLogs | None = None
    reference: ReferenceLosses | None = None
    before: Summary | None = None  # of the model before unlearning, with which one after it is compared
    trained: frozenset[str] | None = None  # the rows that steps train on, as `said` names them; None: not known
    first: Summary | None = None  # of the model before the first task, as a share of whose utility OpenUnlearning counts
    ended_by: str = ""  # the limit that ended the unlearning of what is measured, if one did
    pair: str = ""  # of objectives by which what is measured has forgotten

    @classmethod
    def load(cls, args: MeasureArgs, accelerator: Accelerator, source: Source) -> "Measures":
        """Read what the arguments name, before anything is written; the rows of `source` that are measured were read.

        Raises:
            InputError: if a part of it cannot be read.
        """
        check_sharded(args, accelerator)
        check_generation(args, accelerator)
        check_general_ability(args)
        for name in (name for name in args.metrics if not COMPARISONS[name].can()):
            raise InputError(f"--metrics {name} {COMPARISONS[name].needs}")
        if note := check_benchmark(source):
            say(accelerator, note)
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
        kinds = getattr(self.args, "quantize", ())
        here = [str(kind) for kind in kinds if loaded.device.type == "cpu" or isinstance(kind, str)]  # rounded in this process
        asked = {"--mia-gradnorm": self.args.mia_gradnorm, f"--quantize {' '.join(here)}": here}
        for flag in (flag for flag, given in asked.items() if given and loaded.divided):
            raise InputError(f"{flag} needs the whole model in every process; drop it, or give --evaluate-sharded no")

    def identity(self) -> list[Any]:
        """Give what tells whether files and models that the arguments name, and a benchmark's formulas, are still the same."""
        judges, formulas = self.judges, [read_declaration(b).formulas()] if (b := self.args.benchmark) else []
        known = judges.encoder, judges.entailment, *([judges.gibberish] if judges.gibberish else [])
        models = [judge and judge.weights for judge in known]
        return [*models, judges.refusals, self.retain and [self.retain.truth_ratios, self.retain.min_k_auc], *formulas]


def evaluate_model(loaded: LoadedModel, asked: SetsAndSkipped, measures: Measures, folder: Path) -> Summary:
    """Evaluate a model on every set, write `folder`, and return the summary (the same on all processes)."""
    summary, records = _measured(loaded, asked, measures, folder)
    if measures.before:
        past = Past(measures.first, measures.ended_by, measures.pair)
        summary = replace(summary, verdict=judge(measures.before, summary, past))
    if loaded.accelerator.is_main_process:
        _write(folder, summary, records, measures)
    return summary


def _write(folder: Path, summary: Summary, records: Records, measures: Measures) -> None:
    """Write a summary, and the same in the form of OpenUnlearning's."""
    args, aucs = measures.args, measures.retain.aucs if measures.retain else {}
    suites = suites_of(summary, records, read_declaration(args.benchmark) if args.benchmark else None)
    whole = {name: with_aggregates(results, records, aucs, measures.first) for name, results in suites.items()}
    write_suites(folder, whole, summary)
    summary.write(folder / "summary.json")  # the last, which says that the evaluation is whole


def _measured(loaded: LoadedModel, asked: SetsAndSkipped, measures: Measures, folder: Path) -> tuple[Summary, Records]:
    """Measure everything of a model as it stands; its rows are written to `folder`."""
    measures.check(loaded)
    (sets, skipped), args = asked, measures.args
    records = measure(ScoringPass(loaded, args, measures.judges, HOLDOUT in sets, measures.reference), sets, folder)
    summary = summarize(records, skipped, measures.judges, measures.retain)
    summary = with_unseen(summary, sets.get("retain", []), records.get("retain", []), measures.trained)
    precision, made = None if loaded.precision == "float32" else loaded.precision, "model" if args.makes_rows else None
    summary = replace(summary, precision=precision, retain_from=made)
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
        InputError: for anything that is wrong with the arguments, the data or the model, or if there are several splits.
        WriteError: if the disk is full or the folder goes meanwhile; the same evaluation goes on then.
    """
    expect(args, EvalArgs)
    if len(args.split) > 1:
        raise InputError("several --split are several evaluations; call dualoptim.evaluate.evaluate_splits(args)")
    args = with_targets(args)
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    with kept_for_one_run(folder, accelerator, how_to_go_on(args, folder)):
        return _evaluate(args, accelerator, folder / "eval")


def evaluate_splits(args: EvalArgs) -> dict[str, Summary]:
    """Evaluate by the rows of each split, each in a folder of its name; writes `<output_dir>/splits.csv` and `splits.md`.

    Splits that an earlier call has finished with the same arguments, rows and weights are not measured again.

    Raises:
        InputError: as `evaluate` does.
        WriteError: as `evaluate` does.
    """
    expect(args, EvalArgs)
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator)
    with kept_for_one_run(folder, accelerator, how_to_go_on(args, folder)):
        claim(args, accelerator, [], [folder / name for name in SPLITS_FILES])
        alone = {split: replace(args, split=(split,), output_dir=str(folder / split)) for split in args.split}
        found = {split: _evaluate(one, accelerator, folder / split / "eval", keeps=True) for split, one in alone.items()}
        if accelerator.is_main_process:
            print(f"\n{shown(write_splits(folder, found))}")
        wait(accelerator)
    return found


def command(args: EvalArgs) -> object:
    """Evaluate as a command, by one split or by several."""
    return evaluate(args) if len(args.split) == 1 else evaluate_splits(args)


def _evaluate(args: EvalArgs, accelerator: Accelerator, folder: Path, keeps: bool = False) -> Summary:
    """Evaluate into `folder`; if it `keeps` what is finished there, only what is missing is measured."""
    source = open_source(args)
    source.evaluation_sets(args.split[0], args.task)  # what is wrong with the data shows before a model is loaded
    measures = Measures.load(args, accelerator, source)
    _check(args, source, accelerator)
    loaded = load_model(args, accelerator, "measure")
    source.cut(loaded.formatter)
    sets, skipped = source.evaluation_sets(args.split[0], args.task)
    measures = replace(measures, trained=known_to_train(args, source))
    check_asked(loaded, args, [sets])
    measures.check(loaded)
    lessons, hinted = make_lessons(args, source, loaded), hints(args, sets.get("forget", []), loaded.formatter)
    config = loaded.resolved(args)
    inputs = {"precision": loaded.precision, "weights": loaded.weights_hash()}
    inputs["evaluation"] = sets_hash(sets, loaded.formatter, *measures.identity())
    finished = not keeps and decided(accelerator, (folder / "summary.json").exists)
    if args.overwrite or finished or not _began(folder, accelerator, config, inputs):
        claim(args, accelerator, [folder])
    if accelerator.is_main_process:
        write_config(folder / "config.yaml", config, inputs)

    attacked = {name: rows for name, rows in sets.items() if name in ATTACKED_SETS}
    target = Target(args, accelerator, measures.judges, attacked, folder / "attacks", hinted)
    if args.reference_model is not None or args.retain_model is not None:
        del loaded  # each model has the memory for itself
        if args.reference_model is not None:
            other = load_model(replace(args, model=args.reference_model), accelerator, "measure")
            measures = replace(measures, reference=ScoringPass(other, args, measures.judges).reference_losses(sets))
            del other
        if args.retain_model is not None:
            other = load_model(replace(args, model=args.retain_model), accelerator, "measure")
            alone, retain_records = _measured(other, (sets, skipped), measures, folder / "retain_only")
            if accelerator.is_main_process:
                _write(folder / "retain_only", alone, retain_records, measures)
            measures = replace(measures, retain=of_records(retain_records["forget"], alone, args.retain_model))
            target = replace(target, retain_records=retain_records, alone=attack_answers(target.beside(retain_records), other))
            del other
        gc.collect()
        loaded = load_model(args, accelerator, "measure")
    summary, records = _measured(loaded, (sets, skipped), measures, folder)

    target = replace(target, records=records)
    attacks = attack_answers(target, loaded)
    del loaded
    gc.collect()
    attacks = attack_weights(target, lessons, attacks)
    if attacks != Attacks():
        summary = replace(summary, attacks=attacks)
    task = Path(args.model).expanduser().absolute().parent
    before, past = decided(accelerator, lambda: before_unlearning(task, folder))
    if not before and (why := decided(accelerator, lambda: otherwise(task, config))):
        say(accelerator, why)
    summary = replace(summary, verdict=judge(before, summary, past))
    if accelerator.is_main_process:
        _write(folder, summary, records, measures)
    say(accelerator, f"\n{evaluation_tables(summary)}\n\n{verdict_text(summary.verdict, args)}\n\nrows and summary: {folder}")
    wait(accelerator)
    return summary


def _check(args: EvalArgs, source: Source, accelerator: Accelerator) -> None:
    """Refuse what the data, the launch or the models named cannot serve, before anything is written.

    Raises:
        InputError: naming the flag and why.
    """
    sets, _ = source.evaluation_sets(args.split[0], args.task)
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


def _began(folder: Path, accelerator: Accelerator, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Tell whether an evaluation with this configuration, of these rows and weights, began in `folder`.

    The same on all processes.
    """
    path = folder / "config.yaml"

    def same() -> bool:
        if not path.exists() or any(file.is_dir() for file in folder.glob("*.json*")):
            return False
        return difference(path, config, EvalArgs, may_change=("speed", "nothing")) is None and not changed_input(path, inputs)

    return decided(accelerator, same)
