"""Keep code out of what is resumed: libraries write checkpoints as pickles, and a pickle may name any function to call."""

import contextlib
import importlib
import io
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_HARMLESS = (
    # states of random generators
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "_codecs.encode",
    # what DeepSpeed writes of its settings beside the tensors
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What checkpoints name beside tensors: data classes, and functions that build numbers."""

_INDEX = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What the index of an FSDP2 checkpoint (`.metadata`) names, beside the kinds of numbers and the classes of its own module."""

_FORCE = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


def named_code(file: Path) -> list[str]:
    """List what a file of a checkpoint names that is none of a checkpoint's, or would have called; nothing in it is called.

    Raises:
        OSError, pickle.UnpicklingError, ...: if it is cut, or none of the kinds that checkpoints are made of.
    """
    if file.name.endswith(".metadata"):
        return _in_index(file)
    if file.suffix not in (".pt", ".bin", ".pkl"):
        return []
    return sorted({*get_unsafe_globals_in_checkpoint(file)} - {*_HARMLESS})


class _Index(pickle.Unpickler):
    """Reads an index that holds what an index holds, and stops at the first other name."""

    def find_class(self, module: str, name: str) -> Any:
        known = module == "torch" or module == metadata.__name__ or (module, name) in _INDEX
        found = getattr(importlib.import_module(module), name, None) if known else None
        own = isinstance(found, type) and found.__module__ == metadata.__name__
        if not ((module, name) in _INDEX or own or isinstance(found, torch.dtype)):
            raise _Code(f"{module}.{name}")
        return found


class _Code(Exception):
    """A name that an index has no use for."""


def _in_index(file: Path) -> list[str]:
    """List what an index, or a value in the files that it lists, names; tensors there are read as tensors alone anyway."""
    try:
        with file.open("rb") as opened:
            index = _Index(opened).load()
    except _Code as error:
        return [str(error)]
    found = set()
    for place, stored in index.storage_data.items():
        if isinstance(index.state_dict_metadata[place.fqn], metadata.BytesStorageMetadata):
            with (file.parent / stored.relative_path).open("rb") as opened:
                opened.seek(stored.offset)
                found |= {*get_unsafe_globals_in_checkpoint(io.BytesIO(opened.read(stored.length)))}
    return sorted(found - {*_HARMLESS})


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Have every `torch.load` inside, whoever calls it and however, take tensors and what is harmless alone."""
    before = {name: os.environ.get(name) for name in _FORCE}
    known = [_located(name) for name in _HARMLESS if name.startswith("deepspeed")]
    os.environ |= _FORCE
    try:
        with safe_globals([one for one in known if one is not None]):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def _located(name: str) -> Any:
    """Find a class by its full name, if its package is in use."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute, None) if module.partition(".")[0] in sys.modules else None
