"""Write the README of a saved model: what was done to which model, with which settings, and how it scores."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.config.args import DEMO, CommonArgs, MeasureArgs, TrainArgs, UnlearnArgs
from dualoptim.config.flags import flags
from dualoptim.config.optimizers import OPTIMIZERS
from dualoptim.config.saved import to_dict
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting import tables


def model_card(args: CommonArgs, what: str, before: Summary | None = None, after: Summary | None = None) -> str:
    """Write a model card in Markdown of `args.model` after `what`, with the summaries of the evaluations that there are.

    `args` are those of this one model: of one pair and rate. The front matter names the base model where it is on the hub.
    """
    known = flags(type(args))
    settings = {name: value for name, value in to_dict(args).items() if known[name].changes != "nothing"}
    parts = [
        _front_matter(args),
        f"# {_name(args.model)}, {what}",
        _what_was_done(args, what),
        "## Settings",
        tables.setting_table(settings, type(args)).markdown(),
        *_scores(before, after),
        "## Limits",
        "These numbers say what was measured on these rows. They do not show that nothing else can bring the facts back.",
        "## All settings",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```",
    ]
    card = "\n\n".join(parts) + "\n"
    given = [getattr(args, name) for name, flag in known.items() if flag.path and getattr(args, name)]
    places = {place for value in given for place in (value if isinstance(value, tuple) else (value,))}
    for place in sorted(places, key=len, reverse=True):  # where the run was made is no matter of the model
        card = card.replace(place, _name(place))
    return card


def _front_matter(args: CommonArgs) -> str:
    """Say in YAML, for the hub, what kind of model this is and what it was made of."""
    adapter = _is_adapter(args)
    matter: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id(args.model):
        matter |= {"base_model": args.model, "base_model_relation": "adapter" if adapter else "finetune"}
    own = isinstance(args, MeasureArgs) and args.forget_file
    if not own and (args.data or not args.benchmark) and is_hub_id(args.data_source):
        matter["datasets"] = [args.data_source]
    matter["tags"] = ["dualoptim", *(["unlearning"] if isinstance(args, UnlearnArgs) else []), *(["lora"] if adapter else [])]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def is_hub_id(name: str) -> bool:
    """Tell whether a model or data set is named as on the hub, and is nothing on this disk."""
    if name == DEMO or name.endswith(".gguf") or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_adapter(args: CommonArgs) -> bool:
    return isinstance(args, TrainArgs) and args.use_lora


def _what_was_done(args: CommonArgs, what: str) -> str:
    saved = "A low-rank adapter" if _is_adapter(args) else "The weights"
    text = f"{saved} of {_name(args.model)}, {what}. Made with dualoptim."
    if isinstance(args, UnlearnArgs):
        text += (
            " Machine unlearning makes a model forget some rows on purpose and keep the rest: "
            f"{OPTIMIZERS[args.optim].about.rstrip('.')}. Scores of the forget set should fall, those of the others stay."
        )
    if isinstance(args, TrainArgs) and args.save_dtype != "auto":
        text += f" Saved in {args.save_dtype}" + (", rounded from float32." if args.save_dtype != "float32" else ".")
    return text + " `prompt.json` says how a question becomes a prompt."


def _scores(before: Summary | None, after: Summary | None) -> list[str]:
    """Show everything that was measured and why the rest was not."""
    columns, newest = tables.side_by_side(before, after), after if after is not None else before
    if newest is None:
        return []
    counts = ", ".join(f"{count} of {tables.set_title(name)}" for name, count in newest.rows.items())
    scores = (
        *tables.benchmark_tables(columns),
        tables.aggregate_table(columns),
        tables.set_table(columns),
        tables.privacy_table(columns),
    )
    parts = ["## Evaluation", f"Rows: {counts}." if counts else "Scores of the evaluation sets:"]
    parts += [table.markdown() for table in scores if table]
    if after is not None and (attacks := tables.attack_table(before, after)):
        parts += ["### What attacks bring back", attacks.markdown()]
    if skipped := tables.skipped_table(newest):
        parts += ["### Not measured", skipped.markdown()]
    return parts


def _name(path: str) -> str:
    """Name a model or data set without the folders of the machine that it lies on."""
    return path if is_hub_id(path) else Path(path).name or path
