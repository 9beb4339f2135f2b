"""Have a model continue texts: greedily, up to its end token, or by draws.

What the teacher-forced pass has found to be the model's first choices is not generated again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dualoptim.config.args import MeasureArgs
from dualoptim.data.declaration import benchmarks
from dualoptim.data.rows import HOLDOUT, MEMBERS, Asking, Row
from dualoptim.evaluation.decoding import Decoding, MakeProcessor, end_tokens, suppressed_tokens
from dualoptim.evaluation.noise import gumbel, seed_of
from dualoptim.evaluation.scoring import ScoringPass, Share
from dualoptim.evaluation.vllm_answers import Unfinished
from dualoptim.models.launch import say
from dualoptim.models.loaded import LoadedModel


@dataclass(frozen=True)
class Continuation:
    """Tokens that the model goes on from, the text that it should give, and that text's tokens, the end among them.

    The first `agreed` of these are what it answers by itself: the teacher-forced pass has found each to be its first choice.
    It answers `tokens` at most (None: --max-new-tokens), up to the first token whose text is one of `stop_tokens`, and of that
    up to the first of each of the words `stop`, one after the other.
    """

    ids: list[int]
    wanted: str
    answer: list[int]
    agreed: int = 0
    tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()


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
    return Continuation(
        example.ids[:start], wanted, example.ids[start:], agreed, asking.tokens, asking.stop, asking.stop_tokens
    )


def check_asked(loaded: LoadedModel, args: MeasureArgs, asked: Sequence[Mapping[str, Sequence[Row]]]) -> None:
    """Tokenize all sets that are measured, and warn of true answers that are longer than the model's own may be.

    Not of those that a benchmark of the package cuts: so its own code does.

    Raises:
        InputError: as `Formatter.check` does.
    """
    loaded.formatter.check(row for sets in asked for rows in sets.values() for row in rows)
    answers: dict[int, dict[tuple[str, str], int]] = {}  # by how many tokens an answer may have: tokens of each true one
    for rows in (rows for sets in asked for name, rows in sets.items() if name not in (HOLDOUT, MEMBERS)):
        for row in rows[: args.eval_rows or None]:
            own = row.asking.tokens if row.asking else None
            if row.question is not None and not (own and args.benchmark in benchmarks()):
                example = loaded.formatter.of_row(row, row.answer)
                tokens = len(example.ids) - example.start - example.ended
                answers.setdefault(own or args.max_new_tokens, {})[row.question, row.answer] = tokens
    for limit, known in answers.items():
        if longer := [tokens for tokens in known.values() if tokens > limit]:
            what = f"true answers longer than the {limit} tokens of the model's own: {len(longer):,} of {len(known):,}"
            remedy = f"give --max-new-tokens {max(longer)}, or so many tokens in a benchmark of your own"
            say(loaded.accelerator, f"{what}, which caps exact match and ROUGE-L there; {remedy}")


def generate(
    scoring: ScoringPass, label: str, continuations: Sequence[Continuation], processor: MakeProcessor | None = None
) -> list[str]:
    """Generate the texts of continuations greedily, in their order; `processor` makes what changes a batch's logits first."""
    answers = generate_tokens(scoring, label, continuations, processor)
    return [in_words(scoring.loaded, one, answer) for one, answer in zip(continuations, answers, strict=True)]


def in_words(loaded: LoadedModel, asked: Continuation, answer: Sequence[int]) -> str:
    """Write the tokens of an answer as text, without the end token and what its question asks to leave out."""
    ends = end_tokens(loaded)
    tokens = list(answer[:-1] if answer and answer[-1] in ends else answer)  # an end may be ordinary text
    text = loaded.tokenizer.decode(_before_token(loaded, tokens, asked.stop_tokens), skip_special_tokens=True)
    return before_stop(text, asked.stop).strip()


@torch.no_grad()
def generate_tokens(
    scoring: ScoringPass, label: str, continuations: Sequence[Continuation], processor: MakeProcessor | None = None
) -> list[list[int]]:
    """Generate the same as tokens, of which the last one is an end token where an answer ends before it has to.

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
    return answers


def _before_token(loaded: LoadedModel, tokens: list[int], stop: Sequence[str]) -> list[int]:
    """Keep the tokens before the first whose text is one of `stop`."""
    found = (n for n, token in enumerate(tokens) if stop and loaded.tokenizer.decode([token]) in stop)
    return tokens[: next(found, None)]


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
