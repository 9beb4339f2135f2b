"""Have a model go on from texts greedily: from a batch as it is, or from one whose texts come and go.

Texts end at the last column [B, T], and what the model has read of them is a cache: keys and values of every layer, a row for
each text, a column for each token but the last. Of either, rows can be dropped and others added, padded on the left to the
longest.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from dualoptim.models.adapter import without_adapter

_NAMES = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _NAMES else "past_key_values"  # as this version of transformers calls it


def continue_greedily(model: Any, settings: GenerationConfig, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    """Have a model go on from token ids [B, T] with these settings alone, none of its own `generation_config`."""
    inner = without_adapter(model)
    own, inner.generation_config = inner.generation_config, settings
    try:
        return model.generate(
            input_ids=ids.to(model.device),
            attention_mask=(torch.ones_like(ids) if mask is None else mask).to(model.device),
            generation_config=settings,
            # where processes have to call the model equally often, `together.in_step` sees to it: transformers would have those
            # that are done go on beyond the positions that there are
            synced_gpus=False,
            **options,
        )
    finally:
        inner.generation_config = own


@dataclass
class Texts:
    """Texts that a model goes on from together, and the number of each."""

    numbers: list[int]
    ids: Tensor  # [B, T], padded on the left
    lengths: list[int]  # tokens of each that are its own
    cache: DynamicCache | None = None  # where rows come and go

    @classmethod
    def of(cls, known: Mapping[int, Sequence[int]], padding: int, multiple: int = 1) -> "Texts":
        """Lay out token ids by number, padded with the token `padding` to as many columns as the longest has, or a multiple."""
        width = -(-max(map(len, known.values())) // multiple) * multiple
        ids = torch.tensor([[padding] * (width - len(own)) + list(own) for own in known.values()])
        return cls(list(known), ids, [len(own) for own in known.values()])

    def with_cache(self, model: Any) -> "Texts":
        """Keep what the model reads of them, which is nothing yet.

        Raises:
            ValueError: if the model keeps more than keys and values, as recurrent layers do.
        """
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers):
            raise ValueError(f"{type(model).__name__} keeps more than keys and values")
        return self

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.numbers)

    def bytes_per_token(self) -> float:
        """Count the bytes that are kept of one token of one text; of a window fewer, once it is full."""
        states = [each for layer in _filled(self.cache) for each in (layer.keys, layer.values)]
        return sum(each.numel() * each.element_size() for each in states) / (len(self) * (self.ids.shape[1] - 1))

    def go_on(self, model: Any, settings: GenerationConfig, **options: Any) -> list[Tensor]:
        """Have the model add tokens, as many to each text; gives logits [B, V] of each step, if the settings ask for them."""
        width = self.ids.shape[1]
        mask = (torch.arange(width) >= width - torch.tensor(self.lengths)[:, None]).long()
        cache = {} if self.cache is None else {_CACHE: self.cache}
        output = continue_greedily(model, settings, self.ids, mask, **cache, **options)
        self.ids = getattr(output, "sequences", output)
        self.lengths = [length + self.ids.shape[1] - width for length in self.lengths]
        return list(getattr(output, "logits", None) or ())

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that these do not need."""
        self.numbers, self.lengths = ([of[row] for row in rows] for of in (self.numbers, self.lengths))
        width = max(self.lengths, default=1)
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        self.ids = self.ids[index, -width:]
        for layer in _filled(self.cache):
            first = max(layer.keys.shape[2] - (width - 1), 0)  # a window may have fewer columns than that
            layer.keys, layer.values = (states[index, :, first:] for states in (layer.keys, layer.values))
            _set_length(layer, width - 1)

    def add(self, others: "Texts") -> None:
        """Take in the rows of other texts."""
        self.numbers, self.lengths = self.numbers + others.numbers, self.lengths + others.lengths
        width = max(self.ids.shape[1], others.ids.shape[1])
        self.ids = torch.cat([pad(one.ids, (width - one.ids.shape[1], 0)) for one in (self, others)])
        for layer, other in zip(_filled(self.cache), _filled(others.cache), strict=True):
            columns = max(layer.keys.shape[2], other.keys.shape[2])
            for name in ("keys", "values"):
                states = [getattr(one, name) for one in (layer, other)]
                both = torch.cat([pad(one, (0, 0, columns - one.shape[2], 0)) for one in states])
                setattr(layer, name, both)
            _set_length(layer, width - 1)


def _filled(cache: DynamicCache | None) -> list[Any]:
    """List the layers that have read something; where layers share what is kept some have not."""
    return [layer for layer in cache.layers if layer.is_initialized] if cache else []


def _set_length(layer: Any, length: int) -> None:
    """Tell a layer with a window how many tokens it has read, of which it keeps the last ones."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
