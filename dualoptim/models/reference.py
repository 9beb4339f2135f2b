"""What the model said before unlearning: scored once, kept on disk, and read back text by text.

No second model lives beside the one that trains. NPO and DPO need the log-probabilities of the scored tokens, 4 bytes each.
KL and UNDIAL need a distribution over the vocabulary per token: what is kept is the input of the output head (4 H bytes a
token) and one frozen copy of the head, which rebuilds the logits of some rows at a time. EMBED needs a layer's output, 4 H
bytes as well. Values are stored by weights and token ids, so all runs of one output folder share them.
"""

import contextlib
import copy
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualoptim.data.batches import in_length_order
from dualoptim.data.prompts import Example
from dualoptim.errors import InputError
from dualoptim.method.objectives import Objective
from dualoptim.method.scores import Batch, Reference, score
from dualoptim.models.loaded import LoadedModel, autocast, weights_hash

_FILE_BYTES = 2**26  # as much is held in memory before it is written


def text_key(example: Example) -> bytes:
    """Identify a text by: its tokens and where scoring starts."""
    return hashlib.sha256(np.asarray([example.start, *example.ids], dtype=np.int64).tobytes()).digest()[:16]


class Store:
    """Values [n, ...] of texts with n scored tokens, in the files of one folder; values are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read which texts the folder holds; it need not exist."""
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        self._places: dict[bytes, tuple[Any, int, int]] = {}
        for path in self.files:
            part = safe_open(path, framework="pt")
            ends = [0, *part.get_tensor("ends").tolist()]
            for key, start, end in zip(part.get_tensor("keys").numpy(), ends, ends[1:], strict=False):
                self._places[key.tobytes()] = (part, start, end)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> Tensor:
        part, start, end = self._places[key]
        return part.get_slice("values")[start:end]

    def write(self, name: str, texts: Sequence[bytes], values: Sequence[Tensor]) -> None:
        """Add a file, whole or not at all; a store that is opened afterwards has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = torch.from_numpy(np.stack([np.frombuffer(key, dtype=np.uint8) for key in texts]))
        ends = torch.tensor([len(value) for value in values]).cumsum(0)
        beside = self.folder / f"{name}.tmp"
        save_file({"keys": keys, "ends": ends, "values": torch.cat(list(values))}, beside)
        beside.rename(self.folder / f"{name}.safetensors")


class Frozen:
    """The model as it stands now, as a reference for what is trained later: its values on disk, and its output head."""

    def __init__(self, loaded: LoadedModel, folder: Path, objectives: Iterable[Objective], size: int) -> None:
        """`folder` holds the values of all models; `size` texts are scored at once. A head is kept if `objectives` need it."""
        self._accelerator, self._size = loaded.accelerator, size
        self._folder, self._hash = folder, weights_hash(loaded.model)[:16]
        self._head: Any = None
        if any(objective.reference == "logits" for objective in objectives):
            self._head = copy.deepcopy(loaded.model.get_output_embeddings()).requires_grad_(False)

    def _store(self, objective: Objective) -> Store:
        layer = f"-layer{objective.layer}" if objective.reference == "hidden" else ""
        return Store(self._folder / f"{self._hash}-{self._accelerator.mixed_precision}-{objective.reference}{layer}")

    def score(self, loaded: LoadedModel, objective: Objective, examples: Iterable[Example]) -> None:
        """Make sure that the values of `examples` are on disk; `loaded` must still hold the weights of this reference.

        Processes share the texts that are missing.
        """
        store = self._store(objective)
        missing = {key: example for example in examples if (key := text_key(example)) not in store}
        self._accelerator.wait_for_everyone()  # all have looked before one writes
        keys = list(missing)[self._accelerator.process_index :: self._accelerator.num_processes]
        texts = [missing[key] for key in keys]
        values: dict[bytes, Tensor] = {}  # not on disk yet

        def write() -> None:
            # another launch may write to the same folder meanwhile
            name = f"{len(store.files):04d}-{self._accelerator.process_index}-{secrets.token_hex(4)}"
            store.write(name, [*values], [*values.values()])
            values.clear()

        with torch.no_grad(), _evaluating(loaded.model), loaded.autocast():
            for chosen in in_length_order([len(text.ids) for text in texts], self._size):
                batch = loaded.batch([texts[index] for index in chosen])
                found: Tensor | None
                if objective.reference == "logits":
                    found = _head_input(loaded, batch)
                else:
                    scores = score(loaded.model, batch, objective.layer)
                    found = scores.log_prob if objective.reference == "log_prob" else scores.hidden
                assert found is not None
                counts = [len(texts[index].ids) - texts[index].start for index in chosen]
                values |= zip([keys[index] for index in chosen], found.float().cpu().split(counts), strict=True)
                if sum(value.nbytes for value in values.values()) > _FILE_BYTES:
                    write()
        if values:
            write()
        self._accelerator.wait_for_everyone()

    def reader(self, objective: Objective) -> "Reader":
        """Give an objective what reads its reference, batch by batch."""
        return Reader(self._store(objective), objective, self._head, self._accelerator)


class Reader:
    """The reference of one objective for the texts of a batch."""

    def __init__(self, store: Store, objective: Objective, head: Any, accelerator: Accelerator) -> None:
        self._store, self._kind, self._head, self._accelerator = store, objective.reference, head, accelerator

    def __call__(self, examples: Sequence[Example], device: torch.device) -> Reference:
        """Read the reference at the scored tokens of `examples`, in their order."""
        values = torch.cat([self._store[text_key(example)] for example in examples]).to(device)
        if self._kind == "log_prob":
            return Reference(log_prob=values)
        if self._kind == "hidden":
            return Reference(hidden=values)

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), autocast(self._accelerator):
                return self._head(values[part].to(self._head.weight.dtype)).float()

        return Reference(logits=logits)


def check_reference(loaded: LoadedModel, objectives: Iterable[Objective], folder: Path) -> None:
    """Make sure, before anything is written, that `objectives` can have their references from the model.

    Raises:
        InputError: if the model's logits are not what its output head gives (some scale or cap them) and one needs them, or if
            `folder` cannot be one.
    """
    kinds = {objective.reference for objective in objectives} - {None}
    for place in (folder, *folder.parents) if kinds else ():
        if place.exists():
            if not (place.is_dir() and os.access(place, os.W_OK)):
                raise InputError(f"--reference-dir {folder}: {place} is no folder that can be written to; give another")
            break
    if "logits" not in kinds:
        return
    batch = loaded.batch([Example([1, 2, 3], 1)])
    head = loaded.model.get_output_embeddings()
    with torch.no_grad(), _evaluating(loaded.model), loaded.autocast():
        logits = score(loaded.model, batch).logits.float()
        rebuilt = head(_head_input(loaded, batch)).float()
    if not torch.allclose(rebuilt, logits, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{type(loaded.model).__name__} changes its logits after the output head, so KL and UNDIAL have no reference here; "
            "choose GD or AP, or NPO"
        )


def _head_input(loaded: LoadedModel, batch: Batch) -> Tensor:
    """What the output head gets at the scored tokens: [N, H]."""
    seen: list[Tensor] = []
    handle = loaded.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        score(loaded.model, batch)
    finally:
        handle.remove()
    return seen[-1][batch.row, batch.column]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
