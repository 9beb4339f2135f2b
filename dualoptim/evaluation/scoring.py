"""The teacher-forced pass over texts, and how rows are shared among processes.

All answers of a row (its own, the paraphrase, the wrong ones) lie packed in one forward, with what they begin with there once
where the model allows it; probabilities, memorization and membership scores all come from that, and so do the first tokens of
the model's own answer, as far as it is the true one (`generation`). No value depends on what a row is batched with, but for
rounding: in 16 bits a GPU's kernels go by the shape of the batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from dualoptim.config.args import MeasureArgs
from dualoptim.config.waiting import pulsing
from dualoptim.data.prompts import Example
from dualoptim.data.rows import HOLDOUT, MEMBERS, Row
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.membership import MIN_K_SHARE, membership_scores, min_k, without_end
from dualoptim.method.scores import TokenScores, score
from dualoptim.models.loaded import LoadedModel

MEMBERSHIP_SETS = ("forget", MEMBERS, HOLDOUT)
"""What membership attacks try to tell apart: the last from the members, which without a set of their own are the first."""

Share = Sequence[tuple[int, Row]]
"""The rows that one process scores, each with its number in the set."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class TextScore:
    """What the pass says of one text: mean negative log-likelihood per token, which tokens are the model's first choice, and
    how unlikely its unlikeliest tokens are (`metrics.min_k`), where membership is attacked.

    The end token is among them, but for `min_k`.
    """

    loss: float
    correct: list[bool]
    ended: bool = True  # an end token follows the text
    min_k: float | None = None
    min_k_plus_plus: float | None = None


@dataclass(frozen=True)
class ReferenceLosses:
    """What another model says of the answers that membership attacks look at: losses by set, and a hash of its weights."""

    weights: str
    losses: dict[str, list[float]]


@dataclass(frozen=True)
class ScoringPass:
    """A model, and everything that decides what it scores."""

    loaded: LoadedModel
    args: MeasureArgs
    judges: Judges = field(default_factory=Judges)
    membership: bool = False  # whether it is attacked; there are rows that no model has seen
    reference: ReferenceLosses | None = None

    def scored_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Cut a set to the rows that are scored (`--eval-rows`)."""
        return rows[: self.args.eval_rows or None]

    def attacks_membership_of(self, name: str) -> bool:
        """Tell whether membership attacks look at a set."""
        return self.membership and name in MEMBERSHIP_SETS

    def examples(self, row: Row) -> list[Example]:
        """Tokenize all texts of a row, its own answer first."""
        return [self.loaded.formatter.of_row(row, text) for text in row.texts()]

    def reference_losses(self, sets: Mapping[str, Sequence[Row]]) -> ReferenceLosses:
        """Compute what this model says of the answers that membership attacks look at."""
        self.loaded.model.eval()
        losses = {name: self.losses(f"reference {name}", sets[name]) for name in MEMBERSHIP_SETS if name in sets}
        return ReferenceLosses(self.loaded.weights_hash(), losses)

    def losses(self, label: str, rows: Sequence[Row]) -> list[float]:
        """Compute the loss per token of every scored row's own answer; `label` names the bar."""

        def compute(share: Share) -> list[float]:
            texts = [[self.loaded.formatter.of_row(row, row.answer)] for _, row in share]
            return [scores[0].loss for scores in self.score_texts(label, texts)]

        return self.shared_out(rows, compute)

    def shared_out(self, rows: Sequence[Row], compute: Callable[[Share], list[Result]]) -> list[Result]:
        """Compute the results of all scored rows, in order, on all processes, each of which computes those of every n-th."""
        rows, accelerator = self.scored_rows(rows), self.loaded.accelerator
        mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
        with self.loaded.autocast(), self.loaded.in_step():
            results = compute([(index, rows[index]) for index in mine]) if len(mine) else []
        gathered = gather_object(list(zip(mine, results, strict=True)))
        return [result for _, result in sorted(gathered, key=lambda item: item[0])]

    @torch.no_grad()
    def score_texts(self, label: str, rows: Sequence[Sequence[Example]], least: float | None = None) -> list[list[TextScore]]:
        """Score all texts of all rows; also the share `least` of the tokens of their first ones. `label` names the bar."""
        scores: list[dict[int, TextScore]] = [{} for _ in rows]
        with self.progress(label, sum(map(len, rows))) as bar:
            for places in _in_batches([[len(text.ids) for text in row] for row in rows], self.args.eval_batch_size):
                # in the order of their tokens the texts of a row share the most
                flat = [(row, k) for row, texts in places for k in sorted(texts, key=lambda k: rows[row][k].ids)]
                texts = [rows[row][k] for row, k in flat]
                attacked = [n for n, (_, k) in enumerate(flat) if least and k == 0]
                found = _scored(score(self.loaded.model, self.loaded.batch(texts)), texts, attacked, least or MIN_K_SHARE)
                for (row, k), one in zip(flat, found, strict=True):
                    scores[row][k] = one
                bar.update(len(flat))
        return [[own[k] for k in range(len(own))] for own in scores]

    def progress(self, label: str, total: int) -> Any:
        """Show a progress bar over texts, on the main process alone."""
        hidden = not self.loaded.accelerator.is_main_process
        return pulsing(tqdm(total=total, desc=label, unit="text", leave=False, disable=hidden))


def _scored(result: TokenScores, texts: Sequence[Example], attacked: Sequence[int], share: float) -> list[TextScore]:
    """Read what a pass says of each of its texts, and of the least likely `share` of some, in one transfer from the device."""
    lengths = [len(text.ids) - text.start for text in texts]
    losses, correct = -result.per_sequence(result.log_prob) / result.lengths(), result.correct.to(result.log_prob.dtype)
    parts = [losses, correct, *(membership_scores(result, attacked, lengths) if attacked else ())]
    read = iter(torch.cat(parts).tolist())
    means, flags = list(islice(read, len(texts))), [[bool(flag) for flag in islice(read, length)] for length in lengths]
    plain, normed = ([list(islice(read, lengths[n])) for n in attacked] for _ in range(2))
    least = {
        n: [min_k(without_end(values, texts[n].ended), share) for values in both]
        for n, *both in zip(attacked, plain, normed, strict=True)
    }
    return [TextScore(means[n], flags[n], text.ended, *least.get(n, ())) for n, text in enumerate(texts)]


def _in_batches(lengths: Sequence[Sequence[int]], size: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Group rows of texts, longest first, into batches of at most `size` texts: lists of (row, its texts).

    A row with more texts than that is cut.
    """
    pieces = [
        (max(own[start : start + size]), row, list(range(start, min(start + size, len(own)))))
        for row, own in enumerate(lengths)
        for start in range(0, len(own), size)
    ]
    batch: list[tuple[int, list[int]]] = []
    for _, row, texts in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2])):
        if sum(len(own) for _, own in batch) + len(texts) > size:
            yield batch
            batch = []
        batch.append((row, texts))
    if batch:
        yield batch
