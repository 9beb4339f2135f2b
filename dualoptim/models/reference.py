"""What the model said before unlearning: scored once, kept on disk, and read back text by text.

No second model lives beside the one that trains. NPO and DPO need the log-probabilities of the scored tokens, 4 bytes each.
KL, JSD and UNDIAL need a distribution over the vocabulary per token: what is kept is the input of the output head (4 H bytes a
token) and one frozen copy of the head, which rebuilds the logits of some rows at a time, capped or scaled as the model does
it. EMBED and CB need a layer's output, 4 H bytes as well. Values are stored by weights and token ids, so all runs of one output
folder share them.
"""

import contextlib
import copy
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dualoptim.config.waiting import pulsing
from dualoptim.data.batches import in_length_order
from dualoptim.data.prompts import Example
from dualoptim.errors import InputError
from dualoptim.method.device import sent
from dualoptim.method.kernels import kept
from dualoptim.method.objectives import Objective
from dualoptim.method.scores import Batch, Reference, TokenScores, score
from dualoptim.models.adapter import without_adapter
from dualoptim.models.hashing import weights_hash
from dualoptim.models.launch import is_sharded, say
from dualoptim.models.loaded import LoadedModel, Use, autocast
from dualoptim.models.sharding import Share, bare, can_divide
from dualoptim.models.store import Store, text_key
from dualoptim.models.together import wait

_FILE_BYTES = 2**26  # as much is held in memory before it is written


class Frozen:
    """The model as it stands now, as a reference for what is trained later: its values on disk, and its output head."""

    def __init__(self, loaded: LoadedModel, folder: Path, objectives: Iterable[Objective], size: int) -> None:
        """`folder` holds the values of all models; `size` texts are scored at once. A head is kept if `objectives` need it."""
        self._accelerator, self._size = loaded.accelerator, size
        self._folder, self._hash = folder, weights_hash(loaded.model)[:16]
        folder.mkdir(parents=True, exist_ok=True)  # now and not later: a folder that is removed during a run stays away
        self._tail: Tail | None = None
        if any(objective.reference == "logits" for objective in objectives):
            tail = Tail.of(loaded).frozen(torch.bfloat16 if self._accelerator.mixed_precision == "bf16" else None)
            self._tail = tail.divided(self._accelerator) if loaded.divided else tail

    @staticmethod
    def use(accelerator: Accelerator) -> Use:
        """Say what a model is loaded for that is scored as training computes: with 16-bit weights, or their products alone."""
        return "measure" if is_sharded(accelerator) and not can_divide(accelerator) else "train"

    def _store(self, objective: Objective) -> Store:
        layer = f"-layer{objective.layer}" if objective.reference == "hidden" else ""
        computed = self._accelerator.mixed_precision
        if computed == "bf16" and is_sharded(self._accelerator):
            computed = "bf16-weights"
        return Store(self._folder / f"{self._hash}-{computed}-{objective.reference}{layer}")

    def score(self, loaded: LoadedModel, objective: Objective, examples: Iterable[Example]) -> None:
        """Make sure that the values of `examples` are on disk; `loaded` must still hold the weights of this reference.

        Processes share the texts that are missing.
        """
        store = self._store(objective)
        for path in store.broken:
            say(self._accelerator, f"{path} is no part of a reference; what it may have held is scored again")
        missing = {key: example for example in examples if (key := text_key(example)) not in store}
        wait(self._accelerator)  # all have looked before one writes
        keys = list(missing)[self._accelerator.process_index :: self._accelerator.num_processes]
        texts = [missing[key] for key in keys]
        values: dict[bytes, Tensor] = {}  # not on disk yet

        def write() -> None:
            # another launch may write to the same folder meanwhile
            name = f"{len(store.files):04d}-{self._accelerator.process_index}-{secrets.token_hex(4)}"
            store.write(name, [*values], [*values.values()])
            values.clear()

        hidden = not self._accelerator.is_main_process
        bar = tqdm(total=len(texts), desc=f"reference: {objective.reference}", unit="text", leave=False, disable=hidden)
        with (
            pulsing(bar),
            torch.no_grad(),
            _evaluating(loaded.model),
            _as_in_training(self._accelerator),
            loaded.in_step(),
        ):
            for chosen in in_length_order([len(text.ids) for text in texts], self._size):
                batch = loaded.batch([texts[index] for index in chosen])
                found: Tensor | None
                if objective.reference == "logits":
                    found = _with_head_input(loaded, batch)[1]
                else:
                    scores = score(loaded.model, batch, objective.layer)
                    found = scores.log_prob if objective.reference == "log_prob" else scores.hidden
                assert found is not None
                counts = [len(texts[index].ids) - texts[index].start for index in chosen]
                values |= zip([keys[index] for index in chosen], found.float().cpu().split(counts), strict=True)
                bar.update(len(chosen))
                if sum(value.nbytes for value in values.values()) > _FILE_BYTES:
                    write()
        if values:
            write()
        wait(self._accelerator)

    def reader(self, objective: Objective) -> "Reader":
        """Give an objective what reads its reference, batch by batch."""
        return Reader(self._store(objective), objective, self._tail, self._accelerator)


class Reader:
    """The reference of one objective for the texts of a batch."""

    def __init__(self, store: Store, objective: Objective, tail: "Tail | None", accelerator: Accelerator) -> None:
        self._store, self._kind, self._tail, self._accelerator = store, objective.reference, tail, accelerator

    def __call__(self, examples: Sequence[Example], device: torch.device) -> Reference:
        """Read the reference at the scored tokens of `examples`, in their order."""
        values = sent(torch.cat([self._store[text_key(example)] for example in examples]), device)
        if self._kind == "log_prob":
            return Reference(log_prob=values)
        if self._kind == "hidden":
            return Reference(hidden=values)

        assert self._tail is not None
        tail = self._tail.whole()

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), _as_in_training(self._accelerator):
                return tail(values[part])

        return Reference(logits=logits)


def check_reference(loaded: LoadedModel, objectives: Iterable[Objective], folder: Path) -> None:
    """Make sure, before anything is written, that `objectives` can have their references from the model.

    Raises:
        InputError: if the model's logits cannot be rebuilt from what its output head gets and one needs them, or if `folder`
            cannot be one.
    """
    kinds = {objective.reference for objective in objectives} - {None}
    for place in (folder, *folder.parents) if kinds else ():
        if place.exists():
            if not (place.is_dir() and os.access(place, os.W_OK)):
                raise InputError(f"--reference-dir {folder}: {place} is no folder that can be written to; give another")
            break
    if "logits" not in kinds:
        return
    Tail.of(loaded)


@dataclass(frozen=True)
class Tail:
    """What a model makes of the input of its output head: the head's output, and that scaled or capped as some models do.

    These last operations are the model's own: its `forward` around a body and a head that hand on what they are given.
    """

    head: Any
    around: Any = None  # the model without body and head, where it does something after the head
    shares: Mapping[str, Share] | None = None  # of the head's parameters, which are whole for one micro-batch at a time

    @staticmethod
    def of(loaded: LoadedModel) -> "Tail":
        """Take the tail of a model, whose logits it must give.

        Raises:
            InputError: if it does not.
        """
        model = without_adapter(loaded.model)
        own, batch = model.get_output_embeddings(), loaded.batch([Example([1, 2, 3], 1)])
        head = bare(own) if loaded.divided else own
        with torch.no_grad(), _evaluating(loaded.model), loaded.autocast():
            scores, values = _with_head_input(loaded, batch)
            alone, whole = Tail(head), Tail(head, _around(model, own))
            with contextlib.suppress(Exception):  # models that are not ours raise anything
                large = 1e3 * values  # there a cap shows that is not reached here
                if _equal(whole(values), scores.logits) and not _equal(whole(large), alone(large)):
                    return whole
            if _equal(alone(values), scores.logits):
                return alone
        raise InputError(
            f"{type(model).__name__} changes its logits after the output head, so KL, JSD and UNDIAL have no reference here; "
            "choose GD or AP, or NPO"
        )

    def frozen(self, dtype: torch.dtype | None = None) -> "Tail":
        """Copy it, so that training changes nothing in it, in `dtype` if the launch's products are of that type anyway."""
        weights = [weight for weight in self.head.parameters() if dtype and weight.is_floating_point()]
        copied: dict[int, Any] = {id(one): torch.nn.Parameter(one.detach().to(dtype, copy=True)) for one in weights}
        return replace(self, head=copy.deepcopy(self.head, copied).requires_grad_(False))

    def divided(self, accelerator: Accelerator) -> "Tail":
        """Leave each process a share of the head, which `whole` makes one again."""
        shares = {name: Share.of(weight.data, accelerator) for name, weight in self.head.named_parameters()}
        for weight in self.head.parameters():
            weight.data = weight.new_empty(0)
        return replace(self, shares=shares)

    def whole(self) -> "Tail":
        """Gather what `divided` has divided, on all processes alike."""
        if self.shares is None:
            return self
        head = copy.deepcopy(self.head)
        for name, weight in head.named_parameters():
            weight.data = self.shares[name].gathered()
        return replace(self, head=head)

    def __call__(self, values: Tensor) -> Tensor:
        """Compute logits [n, V] in float32 from head inputs [n, H]."""
        logits = self.head(values.to(self.head.weight.dtype))
        if self.around is not None:
            for stand_in in (self.around.body, self.around.head):
                stand_in.given = logits[None]
            logits = self.around.model(input_ids=torch.zeros(1, len(values), dtype=torch.long, device=values.device)).logits[0]
        return logits.float()


def _equal(logits: Tensor, expected: Tensor) -> bool:
    near = 1e-3 if expected.dtype == torch.float32 else 1e-2  # products in 16 bits may round otherwise in another shape
    return bool(((logits - expected.float()).norm(dim=-1) <= near * expected.float().norm(dim=-1)).all())


def _as_in_training(accelerator: Accelerator) -> contextlib.AbstractContextManager[Any]:
    """Compute as the prepared model will: DeepSpeed's and FSDP's has 16-bit weights, any other 16-bit products."""
    return contextlib.nullcontext() if is_sharded(accelerator) else autocast(accelerator)


class _StandIn(torch.nn.Module):
    """Gives what it is told to, whatever it is asked: all of a body's output, or that of a head."""

    def __init__(self, module: torch.nn.Module, is_body: bool) -> None:
        super().__init__()
        self.__dict__ |= {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
        self.is_body = is_body
        self.given: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output(self.given) if self.is_body else self.given


class _Output(tuple):
    """The output of a body: its last states, and None for all else that may be looked for."""

    def __new__(cls, states: Tensor) -> "_Output":
        return super().__new__(cls, (states,))

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


@dataclass(frozen=True)
class _Around:
    model: Any
    body: _StandIn
    head: _StandIn


def _around(model: Any, head: Any) -> _Around:
    """Make a model of which nothing is left but what it does with the outputs of its body and its head."""
    body = model._modules.get(model.base_model_prefix, model)
    around = _Around(bare(model, of_values=False), _StandIn(body, True), _StandIn(head, False))
    stand_ins = {id(body): around.body, id(head): around.head}
    around.model._modules = {name: stand_ins[id(part)] for name, part in model._modules.items() if id(part) in stand_ins}
    return around


def _with_head_input(loaded: LoadedModel, batch: Batch) -> tuple[TokenScores, Tensor]:
    """Score a batch, and keep what the output head got at the scored tokens: [N, H]."""
    seen: list[Tensor] = []
    handle = loaded.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        scores = score(loaded.model, batch)
    finally:
        handle.remove()
    return scores, kept(seen[-1], batch.keep)[batch.row, batch.column]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
