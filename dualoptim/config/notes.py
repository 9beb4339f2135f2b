"""Say which settings do less, or more, than their names promise, and what works instead."""

from collections.abc import Collection, Mapping
from typing import Any

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.optimizers import OPTIMIZERS, Flags, bank_names, kind_of

_OTHER_DIALS = {
    "forget_coeff": "--forget-strength, --forget-lr or --retain-freq",
    "regularization_coeff": "--learning-rates or --retain-freq",
}


def setting_notes(flags: Flags) -> list[str]:
    """Say which settings do less, or more, than their names promise, and what works instead."""
    return [*_coefficient_notes(flags), *_carried_on(flags)]


def low_rates(args: UnlearnArgs, least: float) -> list[str]:
    """Name the flags whose rates are all below `least`, that of forget steps too where they have one of their own."""
    own = args.forget_lr is not None and args.forget_lr < least
    return ["--learning-rates"] * (max(args.rates) < least) + ["--forget-lr"] * own


def tasks_note(args: UnlearnArgs) -> list[str]:
    """Say of several tasks from which model each of them starts."""
    if len(args.task_list) < 2:
        return []
    listed = ", ".join(map(str, args.targets or args.task_list)) if len(args.task_list) <= 10 else len(args.task_list)
    how = "each from the first model" if args.tasks_independent else "one after another, each from what the last one left"
    return [f"{'targets' if args.targets else 'tasks'} {listed}: {how}"]


def template_note(settings: Mapping[str, Any], named: Collection[str]) -> str:
    """Say that a preset's prompts stay where another model was `named` beside it and no template."""
    template = settings.get("template", "auto")
    if template == "auto" or "model" not in named or "template" in named:
        return ""
    return f"--preset: prompts are those of its own model, --template {template}; another kind of model takes --template auto"


def _carried_on(flags: Flags) -> list[str]:
    """Say of a rate of forget steps alone that retain steps carry them on, where both have the same moments."""
    if kind_of(flags) is not OPTIMIZERS["adamw-alternate"] or (flags.forget_lr or flags.forget_strength) is None:
        return []
    name = "forget_lr" if flags.forget_lr else "forget_strength"
    flag = f"--{name.replace('_', '-')} {getattr(flags, name):g}"
    return [f"{flag}: retain steps carry forgetting on at their own rate, for --optim {flags.optim} has one state for both; "
            "take --optim dual-adamw, or change --learning-rates"]  # fmt: skip


def _coefficient_notes(flags: Flags) -> list[str]:
    """Say of the factor of a loss, where it is set, that the phase's own AdamW divides it out again, and what works instead."""
    if kind_of(flags) is not OPTIMIZERS["dual-adamw"]:  # moments that phases share weigh the one against the other
        return []
    found = []
    for (name, others), bank in zip(_OTHER_DIALS.items(), bank_names(flags), strict=True):
        if getattr(flags, name) != 1 and bank in ("adamw", "adamw-8bit", "signsgd"):
            own = f"the {name.partition('_')[0].replace('regularization', 'retain')} steps have an optimizer state of their own"
            flag = f"--{name.replace('_', '-')} {getattr(flags, name):g}"
            found.append(f"{flag} changes little, for {own}, which divides it out; to change their weight give {others}")
    return found
