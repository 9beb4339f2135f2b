"""Save a model as `from_pretrained` loads it, one tensor at a time."""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from dualoptim.atomic import beside, write_json
from dualoptim.config.waiting import waiting
from dualoptim.data.prompt_file import PROMPT_FILE
from dualoptim.models.hashing import hashed_meanwhile
from dualoptim.models.launch import is_sharded, prepared
from dualoptim.models.loaded import LoadedModel, precision_of
from dualoptim.models.masters import trained
from dualoptim.models.sharding import whole_shape
from dualoptim.models.together import wait
from dualoptim.models.weights import check_saved
from dualoptim.signals import held

FILE_BYTES = 50 * 10**9  # what transformers puts into one file
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@held()
def export_model(loaded: LoadedModel, folder: Path, card: str, dtype: str = "float32") -> None:
    """Write what `from_pretrained` loads: safetensors weights, configuration, tokenizer and a model card.

    The weights are those that were trained, in float32, rounded to `dtype`, whatever the launch computes in. No process holds
    more than one of them whole that does not hold the model. A signal that asks the command to end waits for it. What is
    saved as it is in memory is hashed meanwhile.

    Raises:
        RuntimeError: if what was written is not that; nothing is replaced then.
    """
    as_it_is = dtype == "float32" and not (is_sharded(loaded.accelerator) or hasattr(loaded.model, "peft_config"))
    hashed = as_it_is and loaded.accelerator.is_main_process
    hashing = (
        hashed_meanwhile(loaded.model, precision_of(loaded.accelerator), str(folder)) if hashed else contextlib.nullcontext()
    )
    with waiting(f"saving {folder}", loaded.accelerator.is_main_process), hashing:
        _export(loaded, folder, card, dtype)


def _export(loaded: LoadedModel, folder: Path, card: str, dtype: str) -> None:
    accelerator, model, kind = loaded.accelerator, loaded.model, getattr(torch, dtype)
    is_adapter = hasattr(model, "peft_config")
    outlines = _outlines(model, kind)
    tensors = ((name, tensor.to(outlines[name].dtype)) for name, tensor in trained(loaded, prepared(loaded), outlines.keys()))
    with beside(folder) if accelerator.is_main_process else contextlib.nullcontext(folder) as place:
        if not accelerator.is_main_process:
            for _ in tensors:
                pass
        elif is_adapter:
            state = {name: tensor.cpu().clone() for name, tensor in tensors}
            # it would ask the hub whether the base's vocabulary has been changed
            model.save_pretrained(place, state_dict=state, safe_serialization=True, save_embedding_layers=False)
        else:
            place.mkdir()
            _write_weights(model, place, outlines, tensors)
            config = copy.deepcopy(model.config)
            config.dtype, config.architectures = kind, [type(model).__name__.removeprefix("FSDP")]
            config.save_pretrained(place)
            if model.can_generate():
                model.generation_config.save_pretrained(place)
        if accelerator.is_main_process:
            check_saved(model, place)
            loaded.tokenizer.save_pretrained(place)
            write_json(place / PROMPT_FILE, _prompt(loaded))
            (place / "README.md").write_text(card, encoding="utf-8")
    wait(accelerator)


def _prompt(loaded: LoadedModel) -> dict[str, Any]:
    """Say how texts were laid out for the model."""
    formatter, tags = loaded.formatter, loaded.formatter.tags
    prompt = {"template": loaded.template, "tags": asdict(tags) if tags else None}
    if tags is None:
        prompt |= {"date_string": formatter.date_string, "system_prompt": formatter.system_prompt}
    return prompt


def _outlines(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give names, shapes and types of all that is saved of a model, or of the adapter that trains: tensors without data."""
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    if hasattr(model, "peft_config"):
        state = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
    left_out = {
        *(getattr(model, "all_tied_weights_keys", None) or {}),
        *(getattr(model, "_keys_to_ignore_on_save", None) or ()),
    }
    return {
        name: torch.empty(whole_shape(tensor), dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")
        for name, tensor in state.items()
        if name not in left_out
    }


def _write_weights(model: Any, folder: Path, outlines: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write a model's tensors as they come, under the names and in the shapes that its checkpoints have.

    These may be others than those of the model: transformers joins and renames some weights when it loads them.
    """
    saved = revert_weight_conversion(model, dict(outlines))
    parts = [set(revert_weight_conversion(model, {name: outline})) for name, outline in outlines.items()]
    if set().union(*parts) != saved.keys():  # some are made of several, which have to be there at once
        tensors = iter(revert_weight_conversion(model, {name: tensor.cpu().clone() for name, tensor in tensors}).items())
    else:
        tensors = (pair for name, tensor in tensors for pair in revert_weight_conversion(model, {name: tensor}).items())
    files = split_torch_state_dict_into_shards(saved, filename_pattern="model{suffix}.safetensors", max_shard_size=FILE_BYTES)
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[Any, int]] = {}
        for name, own in files.filename_to_tensors.items():
            file = stack.enter_context((folder / name).open("wb"))
            places |= {one: (file, offset) for one, offset in _write_header(file, {one: saved[one] for one in own}).items()}
        for name, tensor in tensors:
            file, offset = places[name]
            file.seek(offset)
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if files.is_sharded:
        total = sum(outline.nbytes for outline in saved.values())
        index = {"metadata": {"total_size": total}, "weight_map": files.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_header(file: Any, outlines: Mapping[str, Tensor]) -> dict[str, int]:
    """Write what a safetensors file begins with, and tell where in it each tensor belongs.

    The layout is the library's, which writes none but whole files: tensors of wide types first, those of each by their names.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, outline in sorted(outlines.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + outline.nbytes
        header[name] = {"dtype": _TYPES[outline.dtype], "shape": list(outline.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in outlines}
