"""Write the README of a saved model: what was done to which model, with which settings, and how it scores."""

import contextlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.config.args import DEMO, CommonArgs, TrainArgs, UnlearnArgs
from dualoptim.config.flags import flags
from dualoptim.config.optimizers import OPTIMIZERS
from dualoptim.config.saved import to_dict
from dualoptim.evaluation.metrics import AGGREGATES
from dualoptim.evaluation.summary import Summary
from dualoptim.models.adapter import hub_revision
from dualoptim.reporting import tables
from dualoptim.reporting.attack_tables import attack_table
from dualoptim.reporting.commands import UNNAMED, evaluated
from dualoptim.reporting.page import to_markdown
from dualoptim.reporting.unread import unread
from dualoptim.reporting.verdicts import verdict_section

_PLAIN = ("probability", "rouge_l_recall")


def model_card(args: CommonArgs, what: str, before: Summary | None = None, after: Summary | None = None) -> str:
    """Write a model card in Markdown of `args.model` after `what`, with the summaries of the evaluations that there are.

    `args` are those of this one model: of one pair and rate. The front matter names the base model where it is on the hub.
    """
    known = flags(type(args))
    values = to_dict(args)
    silent = unread(values)
    settings = {name: value for name, value in values.items() if known[name].changes != "nothing" and name not in silent}
    parts = [
        _front_matter(args, after),
        f"# {_name(args.model)}, {what}",
        _what_was_done(args, what),
        "## Settings",
        tables.setting_table(settings, type(args)).markdown(),
        *(part.replace(UNNAMED, _measured(args)) for part in _scores(before, after)),
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


def _measured(args: CommonArgs) -> str:
    """Write the flags that measure the model by the rows of its run, with a word for the model and for one of several tasks."""
    values = {**to_dict(args), "model": "MODEL"}
    if several := len(values.get("task_list", ())) > 1:
        values |= {"targets": None}
    elif values.get("task_list"):
        values |= {"task": values["task_list"][0]}
    return evaluated(values) + several * (" --targets TARGET" if getattr(args, "targets", None) else " --task TASK")


def _front_matter(args: CommonArgs, after: Summary | None) -> str:
    """Say in YAML, for the hub, what kind of model this is, what it was made of, and how it scores."""
    adapter, base = _is_adapter(args), _of_base(args.model)
    origin = hub_revision(args.model)[0] if is_hub_id(args.model) else base.get("base_model")
    origin = origin if isinstance(origin, str) and is_hub_id(origin) else None  # others may be folders of some machine
    more: dict[str, Any] = {"license": base.get("license", "unknown")}
    if origin:
        more |= {"base_model": origin, "base_model_relation": "adapter" if adapter else "finetune"}
    if _data_on_hub(args):
        more["datasets"] = [args.data_source]
    if results := _results(args, after):
        more |= {"model_name": _name(args.model), "eval_results": results}
    tags = ["dualoptim", *(["unlearning"] if isinstance(args, UnlearnArgs) else []), *(["lora"] if adapter else [])]
    library = "peft" if adapter else "transformers"
    data = ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags, **more)
    return f"---\n{data.to_yaml()}\n---"


def _data_on_hub(args: CommonArgs) -> bool:
    return not args.forget_file and bool(args.data or not args.benchmark) and is_hub_id(args.data_source)


@cache
def _of_base(model: str) -> Mapping[str, Any]:
    """Read what the card of a model says, in its folder or on the hub; nothing where it cannot be read, or for the demo MIT."""
    if model == DEMO:
        return {"license": "mit"}
    with contextlib.suppress(Exception):  # of the network, of the hub, of a card that is none
        name, revision = hub_revision(model)
        on_hub = is_hub_id(model)
        path = hf_hub_download(name, "README.md", revision=revision) if on_hub else Path(model).expanduser() / "README.md"
        return {key: value for key, value in (metadata_load(path) or {}).items() if key in ("license", "base_model") and value}
    return {}


def _results(args: CommonArgs, after: Summary | None) -> list[EvalResult]:
    """List the plainest scores for the hub's `model-index`."""
    if after is None:
        return []
    where = args.data_source if _data_on_hub(args) else "own-data"
    measured = {(name, metric): scores[metric] for name, scores in after.sets.items() for metric in _PLAIN if metric in scores}
    measured |= {("all", name): score for name in AGGREGATES if "." not in name and (score := after.score(name)) is not None}
    measured |= {("all", name): score for name, score in (after.benchmark.scores if after.benchmark else {}).items()}
    return [
        EvalResult("text-generation", where, _name(where), metric, round(value, 4), dataset_split=name)
        for (name, metric), value in measured.items()
    ]


def is_hub_id(name: str) -> bool:
    """Tell whether a model or data set is named as on the hub, and is nothing on this disk."""
    if name == DEMO or name.endswith(".gguf") or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(hub_revision(name)[0])
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
    counts = ", ".join(f"{count} of {tables.set_title(name, newest)}" for name, count in newest.rows.items())
    scores = (
        *tables.benchmark_tables(columns),
        tables.aggregate_table(columns),
        tables.set_table(columns),
        tables.privacy_table(columns),
    )
    parts = [*([to_markdown(verdict, 2).rstrip()] if (verdict := verdict_section(before, after)) else []), "## Evaluation"]
    parts.append(f"Rows: {counts}." if counts else "Scores of the evaluation sets:")
    parts += [table.markdown() for table in scores if table]
    if after is not None and (attacks := attack_table(before, after)):
        parts += ["### What attacks bring back", attacks.markdown()]
    if skipped := tables.skipped_table(newest):
        parts += ["### Not measured", skipped.markdown()]
    return parts


def _name(path: str) -> str:
    """Name a model or data set without the folders of the machine that it lies on."""
    return path if is_hub_id(path) else Path(path).name or path
