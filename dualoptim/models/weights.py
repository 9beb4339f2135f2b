"""Make sure that the weights in a file are those of the model, when it is loaded and when it is saved.

Where a name is missing in the file, transformers and PEFT draw the weight at random and go on.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from dualoptim.errors import InputError
from dualoptim.models.sharding import whole_shape

logger = logging.getLogger(__name__)


def check_loaded(place: str, model: Any, info: Mapping[str, Any]) -> None:
    """Make sure that loading found every weight of a model, and warn of tensors that are none of its weights.

    `info` is what `from_pretrained(..., output_loading_info=True)` says; `place` is the flag and what the user gave.

    Raises:
        InputError: naming the first weights that are missing or of another shape, and the likely cause.
    """
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise InputError(
            f"{place}: {name} has the shape {tuple(found)} in its file and {tuple(wanted)} by its config.json; "
            "give the whole folder that save_pretrained wrote"
        )
    if missing:
        head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
        cause = (
            "it has no output head, as embedding models and classifiers have none; give a model that predicts the next token"
            if head and all(name.startswith(f"{head}.") for name in missing)
            else likely_cause(missing, unexpected)
        )
        raise InputError(f"{place}: its file lacks {listed(missing)}; {cause}")
    if unexpected:
        logger.warning("%s: its file also has what the model does not: %s", place, listed(unexpected))


def likely_cause(missing: Collection[str], unexpected: Collection[str]) -> str:
    """Say what may have happened to weights that a file lacks, by the names that it has instead, and what to do."""
    for name in sorted(unexpected):
        parts = name.split(".")
        for start in range(len(parts)):
            for end in range(start + 1, len(parts)):
                if ".".join(parts[:start] + parts[end:]) in missing:
                    extra = ".".join(parts[start:end]) + "."
                    return f"its names have {extra!r} in them, left by a wrapper; save what that wraps, or rename the tensors"
    return "config.json is of another model, or a part of the weights is gone; give the whole folder that save_pretrained wrote"


def listed(names: Collection[str]) -> str:
    """Count names, and give the first three."""
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensors ({first}{', ...' if len(names) > 3 else ''})" if len(names) > 1 else first


@contextlib.contextmanager
def no_load_report() -> Iterator[None]:
    """Leave out the table that transformers prints about names that do not fit: `check_loaded` says it in one line."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Show no bar of loading where no weight is loaded."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def check_saved(model: Any, folder: Path) -> None:
    """Make sure, by names and shapes, that a saved model or adapter is what loads as `model`; no weight is read.

    Raises:
        RuntimeError: if it is not; the folder stays where it is.
    """
    saved: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as part:
            shapes = {name: part.get_slice(name).get_shape() for name in part.keys()}  # noqa: SIM118
        saved |= {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        state = model.state_dict(keep_vars=True).items()
        outlines = {name: torch.empty(whole_shape(weight), device="meta") for name, weight in state}  # PEFT would gather them
        wanted = get_peft_model_state_dict(model, state_dict=outlines, save_embedding_layers=False)
        shapes = {name: weight.shape for name, weight in wanted.items()}
        wrong = {name for name in shapes.keys() | saved.keys() if name not in saved or shapes.get(name) != saved[name].shape}
    else:
        unset_hf_deepspeed_config()
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with no_load_report(), _no_bar():
            _, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=saved,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        wrong = {*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if wrong or not saved:
        raise RuntimeError(f"{folder}: what was saved would not load as the model that was trained: {listed(wrong)}")
