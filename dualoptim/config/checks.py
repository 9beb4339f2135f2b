"""Refuse settings that make no sense together, one rule after another; bounds of single flags stand on the flags.

A rule gives the line that the user reads. Rules of a class hold for the classes that are built on it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.config.flags import check_bounds, default_of, flag_name, flags
from dualoptim.config.optimizers import kind_of, unread_settings
from dualoptim.config.values import settle
from dualoptim.config.varying import varied
from dualoptim.errors import InputError
from dualoptim.method.objectives import FORGET, RETAIN, flags_of, split_objectives

if TYPE_CHECKING:
    from dualoptim.config.args import CommonArgs, EvalArgs, FinetuneArgs, MeasureArgs, SweepArgs, TrainArgs, UnlearnArgs

DATE_FORMAT = "%d %b %Y"
TRACKERS = ("wandb", "tensorboard", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")


def check(args: CommonArgs) -> None:
    """Make sure that every value has its type, that every number is within its bounds and that no rule is broken.

    Raises:
        InputError: with the line of the first that is.
    """
    settle(args)
    check_bounds(args)
    for kind in reversed(type(args).__mro__):
        for line in RULES[kind.__name__](args) if kind.__name__ in RULES else ():
            raise InputError(line)


def _common(args: CommonArgs) -> Iterator[str]:
    if args.model == "demo" and args.data not in (None, "demo"):
        yield f"--data {args.data} needs a model that can read it; give --model, because the demo's knows its own data"
    if args.benchmark is not None and args.model == "demo":
        yield f"--benchmark {args.benchmark} needs a model that can know it; give --model"
    if args.benchmark_rows and args.benchmark is None:
        yield f"--benchmark-rows {args.benchmark_rows} draws rows of a benchmark; give --benchmark, or take --eval-rows"
    if args.retain_file is not None and args.forget_file is None and args.benchmark is None:
        yield f"{_typed(args, 'retain_file')} needs --forget-file, the rows to forget"
    if args.forget_file is not None and args.data is not None:
        yield f"{_typed(args, 'forget_file')} takes the place of --data {args.data}; give one of them"
    if args.benchmark is not None and args.forget_file is not None:
        yield f"{_typed(args, 'forget_file')} and --benchmark {args.benchmark} both say what is forgotten; give one of them"
    columns = dict.fromkeys(("question_column", "answer_column", "text_column", "group_column"), args.reads_own_files)
    forgets, keeps = args.forget_file is not None, args.retain_file is not None
    columns |= {"refusal_column": forgets or keeps, "alternative_column": forgets}
    why = f", and --benchmark {args.benchmark} has its own; drop it" if args.benchmark else "; give --forget-file"
    for name, is_read in columns.items():
        if not is_read and name in flags(type(args)) and _is_given(args, name):
            yield f"{flag_name(name)} {getattr(args, name)} names a column of your own files{why}"
    if args.forget_file is not None and args.model == "demo":
        yield (
            f"{_typed(args, 'forget_file')} needs a model that knows its rows, and --model demo is taught the built-in ones "
            "alone; give another, such as the folder demo_model in that of a demo run (with --learning-rates 1.5e-4)"
        )
    if args.template == "chat" and args.has_tags:
        yield "--template chat cannot take tags; drop the --*-tag flags or choose --template qa"
    if args.date_string is not None and not _is_date(args.date_string):
        yield f"--date-string {args.date_string!r} is not a date; write it as 10 Apr 2025"
    if args.system_prompt is not None and not args.system_prompt.strip():
        yield "--system-prompt is empty; drop the flag, or give a text"


def _is_date(text: str) -> bool:
    try:
        return bool(datetime.strptime(text, DATE_FORMAT))
    except ValueError:
        return False


def _measure(args: MeasureArgs) -> Iterator[str]:
    if args.targets is not None and args.benchmark is None:
        yield f"{_typed(args, 'targets')} are those of a benchmark; give --benchmark rwku, for example"
    yield from _twice("targets", args.targets or ())
    if args.benchmark is not None and _is_given(args, "split"):
        yield f"{_typed(args, 'split')} is of TOFU; --benchmark {args.benchmark} says by itself what is forgotten; drop it"
    if not args.split:
        yield "--split is empty; give at least one such as forget05"
    if len(args.split) > 1 and "forget" in args.split:
        yield f"{_typed(args, 'split')}: forget is of the real-world scenario, which other data hold; give it alone"
    yield from _twice("split", args.split)
    if len(args.split) > 1 and args.retain_logs is not None:
        yield f"--retain-logs {args.retain_logs} is an evaluation of one split's rows; give one --split with it"
    yield from _twice("metrics", args.metrics)
    if args.sentence_encoder is not None and not _is_installed("sentence_transformers"):
        yield "--sentence-encoder needs the package sentence-transformers; pip install sentence-transformers"
    yield from _twice("lm_eval_tasks", args.lm_eval_tasks)
    if args.lm_eval_tasks and not _is_installed("lm_eval"):
        yield "--lm-eval-tasks needs the package lm-eval; pip install lm-eval"
    for flag, folder, what, files in (
        ("--lm-eval-path", args.lm_eval_path, "tasks", "your tasks' .yaml files"),
        ("--lm-eval-data", args.lm_eval_data, "data sets", "data sets as owner/name"),
    ):
        if folder is not None and not args.lm_eval_tasks:
            yield f"{flag} {folder} has {what} that nothing asks for; name some with --lm-eval-tasks"
        if folder is not None and not Path(folder).expanduser().is_dir():
            yield f"{flag} {folder}: no such folder; give the one with {files}"


def _train(args: TrainArgs) -> Iterator[str]:
    if args.warmup_steps is not None and _is_given(args, "warmup_epochs"):
        default = f"{flag_name('warmup_epochs')} {default_of(type(args), 'warmup_epochs'):g}"
        yield f"{_typed(args, 'warmup_steps')} takes the place of {_typed(args, 'warmup_epochs')}; drop it, or give {default}"
    for name in ("save_model_every", "eval_every"):
        if getattr(args, name, 0) and getattr(args, f"{name}_epochs"):
            yield f"{_typed(args, f'{name}_epochs')} takes the place of {_typed(args, name)}; give one of them"
    if args.state_bits == 8 and not _is_installed("bitsandbytes"):
        yield "--optim-bits 8 needs the package bitsandbytes; pip install bitsandbytes"
    if args.quantize_embeddings and args.state_bits != 8:
        yield "--quantize-embeddings has no effect with --optim-bits 32; give --optim-bits 8"
    if args.trainable is not None:
        yield from _of_names(args, args.trainable)
    if not args.lora_target_modules:
        yield "--lora-target-modules is empty; give all-linear or names of modules"
    for name in () if args.use_lora else ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"):
        if _is_given(args, name):
            value = getattr(args, name)
            shown = " ".join(value) if isinstance(value, tuple) else f"{value:g}"
            yield f"{flag_name(name)} {shown} has no effect without an adapter; add --use-lora, or drop it"
    if args.load_in_4bit and not args.use_lora:
        yield "--load-in-4bit freezes the weights, so that only an adapter can learn; add --use-lora"
    if args.resume is not None and args.output_dir is None:
        yield "--resume needs the folder of the run to go on with; give --output-dir"
    if args.resume is not None and args.overwrite:
        yield "--resume keeps what --overwrite would remove; give one of them"
    yield from _twice("log_with", args.log_with)
    for tracker in args.log_with:
        if tracker not in TRACKERS:
            yield f"--log-with {tracker} is unknown; choose from {', '.join(TRACKERS)}"
        if not _can_track(tracker):
            yield f"--log-with {tracker} needs its package; pip install {tracker}"


def _of_names(args: TrainArgs, trainable: str) -> Iterator[str]:
    """Choices of weights that no model could have."""
    last = trainable.removeprefix("last:") if trainable.startswith("last:") else "1"
    if not (last.isdecimal() and int(last[:9]) > 0):
        yield f"--trainable {trainable} is no number of layers; give last:2, for example"
    try:
        re.compile(trainable)
    except re.error as error:
        yield f"--trainable {trainable} is no regular expression ({error}); give one such as 'layers.(5|6|7).mlp.down_proj'"
    if args.use_lora:
        yield (
            f"--trainable {trainable} chooses among the model's own weights, of which none trains with --use-lora; name the "
            "modules that get an adapter with --lora-target-modules, or drop one of them"
        )


def _unlearn(args: UnlearnArgs) -> Iterator[str]:
    if not args.forget_losses:
        yield "--forget-losses is empty; give at least one pair such as ME+GD"
    for pair in args.forget_losses:
        split_objectives(pair)
    if not args.task_list:
        yield "--task-list is empty; give at least one task number"
    if args.fix_ref_model and args.tasks_independent:
        yield "--fix-ref-model has no effect with --tasks-independent, where every task starts from the first model; drop it"
    yield from _twice("task_list", args.task_list)
    yield from _twice("forget_losses", args.forget_losses)
    yield from _twice("learning_rates", [f"{rate:g}" for rate in args.learning_rates])  # they name folders
    yield from _of_objectives(args)
    yield from unread_settings(args)
    if args.retain_questions is not None and not args.makes_rows:
        needs = "--forget-file without --retain-file and a pair that keeps, such as ME+GD"
        yield f"{_typed(args, 'retain_questions')} has no effect without {needs}; drop it"
    for name, about in flags(type(args)).items() if not args.eval else ():
        if about.group == "evaluation" and about.changes == "measures" and name != "eval" and _is_given(args, name):
            yield f"{_typed(args, name)} has no effect with --no-eval, which leaves out the evaluation; drop one of them"
    if args.keep_best is not None and not args.measures_on_the_way:
        yield f"--keep-best {args.keep_best:g} chooses among models that are measured on the way; give --eval-every"
    if args.measures_on_the_way and args.mia_gradnorm:
        yield "--mia-gradnorm takes backward passes of its own, which --eval-every cannot take between steps; drop one of them"
    if args.push_to_hub is not None:
        if args.dry_run:
            yield f"--push-to-hub {args.push_to_hub}: --dry-run makes no model to upload; give one of them"
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError:
            yield (
                f"--push-to-hub {args.push_to_hub!r} is no repository's name; give one such as me/model, of letters, "
                "digits, -, _ and ."
            )
    elif args.hub_public:
        yield "--hub-public makes the repository of --push-to-hub public; give that as well"


def _of_objectives(args: UnlearnArgs) -> Iterator[str]:
    """Constants of objectives that this run does not have, and pairs of rows that no micro-batch has."""
    have = flags_of(objective for pair in args.forget_losses for objective in split_objectives(pair))
    for name in sorted(flags_of([*FORGET.values(), *RETAIN.values()]) - have):
        value = getattr(args, name)
        if _is_given(args, name):
            shown = "" if value is True else f" {value}" if isinstance(value, str) else f" {value:g}"
            yield (
                f"{flag_name(name)}{shown} has no effect with {' '.join(args.forget_losses)}; drop it, or choose "
                "objectives that have it (dualoptim/method/README.md lists them)"
            )
    for pair in args.forget_losses if args.batch_size == 1 else ():
        if (also := split_objectives(pair)[0].also) and also.per == "pair":
            yield f"--batch-size 1: {pair} compares the rows of a micro-batch; give --batch-size 2 or more"


def _sweep(args: SweepArgs) -> Iterator[str]:
    if args.forget_lrs and args.forget_lr is not None:
        yield f"--forget-lr {args.forget_lr:g} and --forget-lrs both set the rate of forget steps; give one of them"
    if args.forget_lrs and args.forget_strength is not None:
        yield f"{_typed(args, 'forget_strength')} and --forget-lrs both set the rate of forget steps; give one of them"
    if args.forget_lrs and "forget_lr" not in kind_of(args).reads:
        yield f"--forget-lrs has no effect with --optim {args.optim}, whose steps take both losses; drop it"
    if args.resume:
        yield "--resume is for one run; a sweep skips what is finished by itself"
    if args.budget and not args.eval:
        yield f"--budget {args.budget} chooses by what runs keep, which --no-eval does not measure; drop one of them"
    if args.push_to_hub is not None:
        yield f"--push-to-hub {args.push_to_hub} is for one run; upload a sweep's best model with `hf upload`"
    varied(args)
    yield from _twice("seeds", args.seeds)
    yield from _twice("forget_lrs", [f"{rate:g}" for rate in args.forget_lrs])


def _finetune(args: FinetuneArgs) -> Iterator[str]:
    if not args.splits:
        yield "--splits is empty; give at least one split such as full"


def _eval(args: EvalArgs) -> Iterator[str]:
    if args.retain_model is not None and args.retain_logs is not None:
        yield f"--retain-model {args.retain_model} and --retain-logs {args.retain_logs} say the same; give one of them"
    kinds = ("relearn_rows", "relearn_lr", "relearn_lora")
    for attack, names in (
        ("relearn", (*kinds, "relearn_share", "relearn_batch_size", "relearn_every")),
        ("sample", ("sample_temperature",)),
    ):
        for name in names if not getattr(args, attack) else ():
            if _is_given(args, name):
                yield f"{_typed(args, name)} has no effect without --{attack}; give the number of its steps or draws"
    for name in (name for name in kinds if not getattr(args, name)):
        yield f"{flag_name(name)} is empty; give a value, or leave it out"
    if _is_given(args, "relearn_share") and "forget" not in args.relearn_rows:
        yield f"--relearn-share {args.relearn_share:g} is of the forget set; give --relearn-rows forget, or drop it"
    for name in ("relearn", *kinds, "quantize"):
        yield from _twice(name, getattr(args, name))
    if args.generate_with == "vllm" and not _is_installed("vllm"):
        yield "--generate-with vllm needs the package vllm; pip install vllm"


RULES: dict[str, Callable[[Any], Iterable[str]]] = {
    "CommonArgs": _common,
    "MeasureArgs": _measure,
    "TrainArgs": _train,
    "UnlearnArgs": _unlearn,
    "SweepArgs": _sweep,
    "FinetuneArgs": _finetune,
    "EvalArgs": _eval,
}


def _is_given(args: Any, name: str) -> bool:
    """Whether a flag has another value than its default."""
    return getattr(args, name) != default_of(type(args), name)


def _typed(args: Any, name: str) -> str:
    """Show a flag with its value, as it is typed."""
    value = getattr(args, name)
    return " ".join([flag_name(name), *map(str, value if isinstance(value, tuple) else () if value is True else (value,))])


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _can_track(name: str) -> bool:
    """Whether the package of a tracker is there; Accelerate leaves a missing one out without a word."""
    from accelerate.tracking import get_available_trackers

    return name in map(str, get_available_trackers())


def _twice(name: str, values: Sequence[object]) -> Iterator[str]:
    """Refuse a list that names something twice: two runs would share one folder."""
    for value in values:
        if values.count(value) > 1:
            yield f"{flag_name(name)} names {value} twice; give each value once"
