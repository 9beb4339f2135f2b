"""The README of a saved model: what was done to which model, with which settings, and how it scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.reporting import tables
from dualoptim.config.args import DEMO, CommonArgs, UnlearnArgs, to_dict

# Where a run was made and sent is no matter of the model.
_LEFT_OUT = """output_dir overwrite threads reference_dir resume dry_run log_with save_every keep_checkpoints push_to_hub
hub_public""".split()
_PATHS = """model data forget_file retain_file holdout_file idk_file lm_eval_path sentence_encoder entailment_model
retain_logs""".split()


def model_card(
    base: str,
    what: str,
    args: CommonArgs,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
) -> str:
    """A model card in Markdown of `base` after `what`, with the summaries of the evaluations that there are.

    `own` are this model's settings where `args` has several. The front matter names the base model where that is on the hub.
    """
    settings = {name: value for name, value in {**to_dict(args), **(own or {})}.items() if name not in _LEFT_OUT}
    name = _name(base)
    parts = [_front_matter(args), f"# {name}, {what}", _what_was_done(name, what, args)]
    parts += ["## Settings", tables.markdown_table(tables.setting_rows(settings), left=2)]
    columns = tables.side_by_side(before, after)
    if columns:
        parts += ["## Evaluation", _rows_measured(after or before or {})]
        for rows, left in (
            (tables.aggregate_rows(columns), 1),
            (tables.set_rows(columns), 2),
            (tables.privacy_rows(columns), 1),
        ):
            parts += [tables.markdown_table(rows, left)] if len(rows) > 1 else []
        if after and after.get("attacks"):
            parts += ["### What attacks bring back", tables.markdown_table(tables.attack_rows(before, after))]
        skipped = tables.skipped_rows(after or before or {})
        parts += ["### Not measured", tables.markdown_table(skipped, left=2)] if len(skipped) > 1 else []
    parts += [
        "## Limits",
        "These numbers say what was measured on these rows. They do not show that nothing else can bring the facts back.",
        "## All settings",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```",
    ]
    card = "\n\n".join(parts) + "\n"
    for path in sorted((str(getattr(args, name, None) or "") for name in _PATHS), key=len, reverse=True):
        card = card.replace(path, _name(path)) if path else card
    return card


def _front_matter(args: CommonArgs) -> str:
    adapter = getattr(args, "use_lora", False)
    matter: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id(args.model):
        matter |= {"base_model": args.model, "base_model_relation": "adapter" if adapter else "finetune"}
    if getattr(args, "forget_file", None) is None and is_hub_id(args.data_source):
        matter["datasets"] = [args.data_source]
    matter["tags"] = ["dualoptim", *(["unlearning"] if isinstance(args, UnlearnArgs) else []), *(["lora"] if adapter else [])]
    return f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def is_hub_id(name: str) -> bool:
    """Whether a model or data set is named as on the hub, and is nothing on this disk."""
    if name == DEMO or name.endswith(".gguf") or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _what_was_done(name: str, what: str, args: CommonArgs) -> str:
    saved = "A low-rank adapter" if getattr(args, "use_lora", False) else "The weights"
    text = f"{saved} of {name}, {what}. Made with dualoptim."
    if isinstance(args, UnlearnArgs):
        how = {
            "dual-adamw": "forget steps and retain steps alternate, each with an optimizer state of its own (arXiv 2504.15827)",
            "dual-adamw-plus": "forget steps and retain steps alternate, with a state that they share and each one's "
            "difference from it (arXiv 2605.21539)",
            "adamw-alternate": "forget steps and retain steps alternate over one optimizer state",
            "adamw": "every step takes the forget loss and the retain loss together",
        }[args.optim]
        text += (
            " Machine unlearning makes a model forget some rows on purpose and keep the rest: "
            f"{how}. Scores of the forget set should fall, those of the others stay."
        )
    return text + " `prompt.json` says how a question becomes a prompt."


def _rows_measured(summary: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} of {tables.set_title(name)}" for name, count in summary.get("rows", {}).items())
    return f"Rows: {counts}." if counts else "Scores of the evaluation sets:"


def _name(path: str) -> str:
    """A model or data set without the folders of the machine that it lies on."""
    return path if is_hub_id(path) else Path(path).name or path
