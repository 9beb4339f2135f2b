"""Write a command that works as typed: with the model and the data that a run was about, where they are known."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualoptim.config.args import EvalArgs, UnlearnArgs
from dualoptim.config.flags import default_of, flag_name
from dualoptim.config.optimizers import OPTIMIZERS, kind_of
from dualoptim.config.saved import earlier_value, load_yaml
from dualoptim.errors import InputError
from dualoptim.evaluation.judged import ENOUGH

Settings = Mapping[str, Any] | EvalArgs

NO_RUN = "To forget more, begin a run of dualoptim unlearn from this model: it lies beside none that could be repeated."
"""Stands for advice to repeat a run where none has left the model: it is the hub's, the demo's, or one that was only taught."""

UNNAMED = "--model MODEL --data DATA"
"""Stands in advice for the flags that `evaluated` gives."""

_SAYS_WHICH = (
    "data", "forget_file", "retain_file", "holdout_file", "question_column", "answer_column", "text_column", "group_column",
    "benchmark", "benchmark_rows", "max_length", "split", "task", "targets", "retain_held_out",
)  # fmt: skip


def evaluated(settings: Settings) -> str:
    """Write the flags with which `dualoptim eval` measures the model and rows of some settings; how to ask, a model knows."""
    settings = vars(settings) if isinstance(settings, EvalArgs) else settings
    if not settings.get("model"):
        return UNNAMED
    words = ["--model", str(settings["model"])]
    for name in _SAYS_WHICH:
        value, default = settings.get(name), default_of(EvalArgs, name)
        if name == "task" and settings.get("targets"):  # which say it
            continue
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if value is not None and values != (default if isinstance(default, tuple) else (default,)):
            words += [flag_name(name), *map(str, values)]
    return shlex.join(words)


def said_and_typed(advice: str) -> tuple[str, str]:
    """Take advice apart into what it says and the command that it ends with, on a line of its own; either may be empty."""
    said, _, command = advice.partition("\n")
    return said, command


def with_model(advice: str, settings: Settings | None) -> str:
    """Put the model and the data of some settings into the command that advice ends with, or the run that left the model."""
    if settings is None:
        return advice
    model = settings.model if isinstance(settings, EvalArgs) else settings.get("model")
    rates = None if isinstance(settings, EvalArgs) else settings.get("learning_rates")
    if rates:  # a model relearns at the rate that moved it
        advice = advice.replace("--relearn 20", f"--relearn 20 --relearn-lr {rates[0]:g}")
    if "--config CONFIG" in advice:
        return _again(advice, Path(model or "").expanduser().parent / "config.yaml")
    return advice.replace(UNNAMED, evaluated(settings))


def _again(advice: str, config: Path) -> str:
    """Put the unlearning whose `config` this is into the command that repeats it otherwise; words where there is none."""
    try:
        run = load_yaml(config, UnlearnArgs) if earlier_value(config, "forget_losses") else None
    except InputError:
        run = None
    if run is None:
        said, _ = said_and_typed(advice)
        return NO_RUN if said.startswith("To forget more") else f"{said.rstrip(':')}."
    words = {"CONFIG": str(config), "FOLDER": f"{(run.output_dir or 'run').rstrip('/')}-more"}
    advice = re.sub("|".join(words), lambda found: shlex.quote(words[found[0]]), advice)
    longer = f"--max-steps {2 * run.max_steps}" if run.max_steps else f"--num-epochs {2 * run.num_epochs}"
    advice = advice.replace("--num-epochs TWICE", longer)
    reference = Path(f"{run.output_dir}/reference").expanduser()
    if reference.is_dir() and not run.reference_dir:  # what the model answered and knew at first need not be asked again
        advice += f" --reference-dir {shlex.quote(str(reference))}"
    if run.average_cycles:  # whose mean of weights no limit measures
        advice = re.sub(rf"{ENOUGH}| --forget-until \S+", "", advice)
    kind, rate = kind_of(run), run.rates[0]
    if kind in (OPTIMIZERS["adamw"], OPTIMIZERS["adamw-alternate"]):  # retain steps carry on what forget steps do
        both = r" \g<0>" if kind.alternates else ""
        for strength in re.findall(r"--forget-strength (\S+)", advice):
            advice = re.sub(r"--forget-strength \S+", f"--learning-rates {rate * float(strength):g}{both}", advice)
    return advice


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
"""A flag within a text, which no line may break at its dashes."""
