"""Go on from texts token by token, in batches: in each until its longest text ends, or in one that is refilled meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dualoptim.config.args import MeasureArgs
from dualoptim.data.batches import in_length_order
from dualoptim.evaluation.vllm_answers import Answers, Unfinished, by_vllm
from dualoptim.models.continuing import Texts
from dualoptim.models.loaded import LoadedModel

_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
"""Settings of a model's own `generation_config` that name tokens which it never answers, or never begins with."""

_MOST = 8
"""Times `--eval-batch-size` texts that are answered at once on CUDA."""

_MULTIPLE = 64
"""Tokens whose multiples texts are padded to where steps are compiled, so that few shapes are."""

MakeProcessor = Callable[[list[int], list[int]], LogitsProcessor]
"""Makes what changes the logits of a batch, from the numbers of its texts and the columns where their answers begin."""


@dataclass(frozen=True)
class Decoding:
    """Unfinished texts by their numbers, and the model that goes on from them greedily, so many at once."""

    loaded: LoadedModel
    unfinished: Mapping[int, Unfinished]
    args: MeasureArgs
    processor: MakeProcessor | None = None

    def answers(self) -> Answers:
        """Go on from all texts, by what is asked for where it can serve, and in the way that the model takes."""
        quantized = getattr(self.loaded.model, "hf_quantizer", None) is not None
        if self._asks_for("vllm") and not (self.processor or suppressed_tokens(self.loaded) or quantized):
            yield from by_vllm(self.loaded, self.args, self.unfinished, end_tokens(self.loaded))
        elif self.loaded.answering.together == "refilled" and not self._compiles:
            yield from self._refilled()
        else:
            yield from self._in_batches()

    def _asks_for(self, name: str) -> bool:
        return getattr(self.args, "generate_with", None) == name

    @property
    def _compiles(self) -> bool:
        """Tell whether transformers is to compile each step; it does on CUDA, and needs caches of one size for that."""
        able = getattr(self.loaded.model, "_can_compile_fullgraph", False)
        return self._asks_for("compiled") and able and self.loaded.answering.together in ("refilled", "any")

    def _in_batches(self) -> Answers:
        """Go on in batches until the longest text of each ends, so that those are together that should end together.

        Only those are that the model answers in one batch as it answers each alone (`Answering`).
        """
        together = self.loaded.answering.together
        size = 1 if together == "none" else self.args.eval_batch_size
        lengths = {len(one.ids) for one in self.unfinished.values()}
        for length in sorted(lengths) if together == "equally long" else [None]:
            alike = [n for n, one in self.unfinished.items() if length in (None, len(one.ids))]
            for places in in_length_order([self.unfinished[n].missing for n in alike], size):
                texts = self._texts([alike[place] for place in places])
                self._go_on(texts)
                yield from zip(texts.numbers, self._added(texts), strict=True)

    def _refilled(self) -> Answers:
        """Go on in one batch, in which others take the places of those that have ended as soon as a quarter has.

        Those that should take longest come first. New texts are read by themselves, and what the model keeps of them joins the
        rest.
        """
        model, size = self.loaded.model, self.args.eval_batch_size
        waiting = sorted(self.unfinished, key=lambda n: (-self.unfinished[n].missing, n))
        texts: Texts | None = None
        while waiting or texts:
            free = size - len(texts or ())
            if waiting and free >= max(1, size // 4):
                new, waiting = self._texts(waiting[:free]).with_cache(model), waiting[free:]
                self._go_on(new, tokens=1)
                size = max(size, self._fitting(new))
                yield from self._leave(new)
                if texts:
                    texts.add(new)
                else:
                    texts = new
            elif texts:
                self._go_on(texts, enough=max(1, len(texts) // 4))
                yield from self._leave(texts)

    @property
    def _padding(self) -> int:
        """Name the token that stands where a text is absent."""
        pad, vocabulary = self.loaded.tokenizer.pad_token_id, self.loaded.formatter.vocabulary
        # what is hidden may be any token that the model has
        return pad if vocabulary is None or pad < vocabulary else self.loaded.tokenizer.eos_token_id

    def _texts(self, numbers: Sequence[int]) -> Texts:
        """Lay out texts by their numbers."""
        return Texts.of({n: self.unfinished[n].ids for n in numbers}, self._padding, _MULTIPLE if self._compiles else 1)

    def _fitting(self, texts: Texts) -> int:
        """Find how many texts of the longest kind memory has room for; on CUDA, whose time for a step hardly grows with them.

        At most half of what is free is taken, and powers of 2 alone, so that runs seldom differ in it.
        """
        free, size = free_memory(self.loaded.device), self.args.eval_batch_size
        longest = max(len(one.ids) + one.room for one in self.unfinished.values())
        while 2 * size <= _MOST * self.args.eval_batch_size and 2 * size * longest * texts.bytes_per_token() < free / 2:
            size *= 2
        return size

    def _go_on(self, texts: Texts, tokens: int | None = None, enough: int | None = None) -> None:
        """Add tokens, so many or until all texts have ended, or `enough` of them."""
        ends, starts, width = end_tokens(self.loaded), self._starts(texts), texts.ids.shape[1]
        limits = [start + self.unfinished[n].room for n, start in zip(texts.numbers, starts, strict=True)]
        suppressed = suppressed_tokens(self.loaded)
        if min(starts) < width:  # their answers have begun
            suppressed.pop("begin_suppress_tokens", None)
        static = {"cache_implementation": "static"} if self._compiles else {}
        most = max(one.room for one in self.unfinished.values()) if static else max(limits) - width
        settings = GenerationConfig(
            max_new_tokens=tokens or most,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self._padding,
            **suppressed,
            **static,
        )
        texts.go_on(
            self.loaded.model,
            settings,
            logits_processor=LogitsProcessorList([self.processor(texts.numbers, starts)] if self.processor else []),
            stopping_criteria=StoppingCriteriaList([_Enough(ends, limits, enough)] if enough else []),
        )

    def _starts(self, texts: Texts) -> list[int]:
        """Find the columns where the answers of texts begin."""
        width = texts.ids.shape[1]
        lengths = zip(texts.numbers, texts.lengths, strict=True)
        return [width - length + len(self.unfinished[n].ids) for n, length in lengths]

    def _added(self, texts: Texts) -> list[list[int]]:
        """Give the tokens that were added to each text."""
        return [row[start:] for row, start in zip(texts.ids.tolist(), self._starts(texts), strict=True)]

    def _leave(self, texts: Texts) -> Answers:
        """Take the texts that have ended out of a batch."""
        ends, stay = end_tokens(self.loaded), []
        for row, (n, added) in enumerate(list(zip(texts.numbers, self._added(texts), strict=True))):
            if len(added) >= self.unfinished[n].room or any(token in ends for token in added):
                yield n, added
            else:
                stay.append(row)
        texts.keep(stay)


class _Enough(StoppingCriteria):
    """Ends a batch once so many of its texts have ended, by an end token or in a column that is their last."""

    def __init__(self, ends: Sequence[int], limits: Sequence[int], enough: int) -> None:
        self._ends, self._limits, self._enough = torch.tensor(ends), torch.tensor(limits), enough
        self._ended = torch.zeros(len(limits), dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Say of all texts [B] that they are done, or that they are not."""
        last, self._ends, self._limits, self._ended = (
            of.to(input_ids.device) for of in (input_ids[:, -1], self._ends, self._limits, self._ended)
        )
        self._ended |= torch.isin(last, self._ends) | (input_ids.shape[1] >= self._limits)
        return torch.full_like(self._ended, bool(self._ended.sum() >= self._enough))


def free_memory(device: torch.device) -> float:
    """Count the bytes of a GPU that nothing takes, or 0 on a CPU, where a batch is as large as was asked for."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def end_tokens(loaded: LoadedModel) -> list[int]:
    """List the token that ends an answer, the end-of-sequence, and those that the model's own configuration stops at."""
    own = loaded.model.generation_config.eos_token_id
    ends = {loaded.formatter.end, loaded.tokenizer.eos_token_id}
    return sorted(ends | set(own if isinstance(own, list) else [] if own is None else [own]))


def suppressed_tokens(loaded: LoadedModel) -> dict[str, list[int]]:
    """Read which tokens the model's own configuration forbids in an answer, or at its beginning; all else in it is ignored."""
    own = loaded.model.generation_config
    return {name: tokens for name in _SUPPRESSED if (tokens := getattr(own, name, None))}
