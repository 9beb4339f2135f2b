"""Have a model continue texts: greedily, up to its end token, or by draws.

What the teacher-forced pass has found to be the model's first choices is not generated again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dualoptim.data.rows import Asking, Row
from dualoptim.evaluation.decoding import Decoding, MakeProcessor, end_tokens, suppressed_tokens
from dualoptim.evaluation.noise import gumbel, seed_of
from dualoptim.evaluation.scoring import ScoringPass, Share
from dualoptim.evaluation.vllm_answers import Unfinished
from dualoptim.models.loaded import LoadedModel


@dataclass(frozen=True)
class Continuation:
    """Tokens that the model goes on from, the text that it should give, and that text's tokens, the end among them.

    The first `agreed` of these are what it answers by itself: the teacher-forced pass has found each to be its first choice.
    It answers `tokens` at most (None: --max-new-tokens), up to the first of each of the words `stop`, one after the other.
    """

    ids: list[int]
    wanted: str
    answer: list[int]
    agreed: int = 0
    tokens: int | None = None
    stop: tuple[str, ...] = ()


def continuation(loaded: LoadedModel, row: Row, correct: Sequence[bool] = ()) -> Continuation:
    """Say what the model is to continue for a row: its question, or the first half of a passage.

    `correct` says which tokens of the row's own text are the model's first choice.
    """
    example = loaded.formatter.of_row(row, row.answer)
    start, wanted = example.start, row.answer
    if row.question is None:  # a passage is continued from its middle
        start = max(start, len(example.ids) // 2)
        wanted = loaded.tokenizer.decode(example.ids[start:], skip_special_tokens=True).strip()
    flags = correct[start - example.start :]
    agreed = next((n for n, right in enumerate(flags) if not right), len(flags))
    asking = row.asking or Asking()
    return Continuation(example.ids[:start], wanted, example.ids[start:], agreed, asking.tokens, asking.stop)


@torch.no_grad()
def generate(
    scoring: ScoringPass, label: str, continuations: Sequence[Continuation], processor: MakeProcessor | None = None
) -> list[str]:
    """Generate the texts of continuations greedily, in their order; `processor` makes what changes a batch's logits first.

    What is agreed upon is not generated again, unless the processor or tokens that the model never answers make it other than
    the likeliest.
    """
    loaded, ends = scoring.loaded, end_tokens(scoring.loaded)
    plain = not processor and not suppressed_tokens(loaded)
    bound = loaded.answering.positions
    limits = [one.tokens or scoring.args.max_new_tokens for one in continuations]
    if bound is not None:
        limits = [min(limit, bound - len(one.ids)) for limit, one in zip(limits, continuations, strict=True)]
    answers = [
        _cut_at_end(one.answer[: one.agreed if plain else 0], ends, limit)
        for one, limit in zip(continuations, limits, strict=True)
    ]
    unfinished = {
        n: Unfinished(one.ids + own, limit - len(own), len(one.answer) - len(own))
        for n, (one, own, limit) in enumerate(zip(continuations, answers, limits, strict=True))
        if len(own) < limit and not (own and own[-1] in ends)
    }
    with scoring.progress(label, len(continuations)) as bar:
        bar.update(len(continuations) - len(unfinished))
        for n, added in Decoding(loaded, unfinished, scoring.args, processor).answers():
            answers[n] = _cut_at_end(answers[n] + added, ends, limits[n])
            bar.update()
    texts = [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]  # an end may be ordinary text
    decoded = loaded.tokenizer.batch_decode(texts, skip_special_tokens=True)
    return [before_stop(text, one.stop).strip() for text, one in zip(decoded, continuations, strict=True)]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Keep what stands before the first of each word, one word after the other: a later one is looked for in what is left."""
    for word in stop:
        text = text.partition(word)[0]
    return text


def sample(scoring: ScoringPass, rows: Sequence[Row], samples: int, temperature: float) -> list[list[str]]:
    """Draw `samples` answers to every scored row of the forget set."""

    def compute(share: Share) -> list[list[str]]:
        seeds = [seed_of("sample", index, draw) for index, _ in share for draw in range(samples)]
        repeated = [one for _, row in share for one in [continuation(scoring.loaded, row)] * samples]
        texts = generate(
            scoring, "sample forget", repeated, lambda batch, starts: Gumbel([seeds[n] for n in batch], starts, temperature)
        )
        return [texts[k * samples : (k + 1) * samples] for k in range(len(share))]

    return scoring.shared_out(rows, compute)


class Gumbel(LogitsProcessor):
    """Makes greedy choice a draw: argmax of logits / temperature plus Gumbel noise is a sample of the softmax.

    Every sequence has noise of its own, from its seed, so that what is drawn does not depend on what it is batched with.
    """

    def __init__(self, seeds: Sequence[int], starts: int | Sequence[int], temperature: float) -> None:
        """Take each sequence's seed, and the length of what they go on from, of all or of each, as `starts`."""
        self._seeds, self._starts, self._temperature = torch.tensor(seeds), torch.tensor(starts), temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Divide logits [B, V] by the temperature, and add noise."""
        self._seeds, self._starts = self._seeds.to(scores.device), self._starts.to(scores.device)
        noise = gumbel(self._seeds, input_ids.shape[1] - self._starts, scores.shape[-1])
        return scores / self._temperature + noise.to(scores.dtype)


def _cut_at_end(tokens: Sequence[int], ends: Sequence[int], limit: int) -> list[int]:
    """Keep the first tokens: up to the first of `ends`, and at most `limit`."""
    end = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: min(end, limit)])
