"""Make rows to keep where a user gives none: what the model itself answers to general questions before it forgets.

They keep nothing but that. What a model was taught beside needs rows of its own.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualoptim.atomic import write_json_lines
from dualoptim.config.args import MeasureArgs, UnlearnArgs
from dualoptim.data.questions import ANSWER_TOKENS, not_about
from dualoptim.data.readers import Columns, read_own
from dualoptim.data.rows import Asking, Row
from dualoptim.errors import InputError
from dualoptim.evaluation.decoding import end_tokens, suppressed_tokens
from dualoptim.evaluation.generation import continuation, generate_tokens, in_words
from dualoptim.evaluation.looping import LOOPING, repeats
from dualoptim.evaluation.scoring import ScoringPass, Share
from dualoptim.models.launch import decided
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.work import reference_folder


@dataclass(frozen=True)
class Made:
    """Rows that a model has made, and the file for them, which a later run from the same weights reads."""

    rows: list[Row]
    path: Path

    def write(self) -> None:
        """Write the file; whoever gives it as --retain-file keeps these rows."""
        lines = ({"question": row.question, "answer": row.answer, "ends": row.asking is None} for row in self.rows)
        write_json_lines(self.path, lines)


def make_rows(loaded: LoadedModel, args: UnlearnArgs, questions: Sequence[Row], forgotten: Sequence[Row]) -> Made:
    """Have a model answer questions, and keep the rows that have nothing of what is to be forgotten; the same on all processes.

    Answers are greedy, and those that repeat themselves are none to keep. Where texts are kept and a run from these weights has
    made the rows before, they are read.
    """
    starts = [continuation(loaded, row).ids for row in questions]
    decides: list[Any] = [loaded.weights_hash(), loaded.precision, starts, end_tokens(loaded), suppressed_tokens(loaded)]
    decides += [min(ANSWER_TOKENS, args.max_new_tokens), args.max_length, [[row.question, row.answer] for row in forgotten]]
    decides += [LOOPING]
    name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    path = reference_folder(args) / f"own-answers-{name}.jsonl"
    found = decided(loaded.accelerator, lambda: _read(path)) if args.texts else None
    if found is None:
        whole = (row for row in answered(loaded, args, questions) if not repeats(loaded.tokenizer.tokenize(row.answer)))
        found = not_about(whole, forgotten)
    return Made(found, path)


def _read(path: Path) -> list[Row] | None:
    """Read the rows of a file; None where it is not there, or no such file."""
    with contextlib.suppress(InputError):
        return read_own(path, Columns())
    return None


def answered(loaded: LoadedModel, args: MeasureArgs, questions: Sequence[Row]) -> list[Row]:
    """Give the rows with the model's own answers, of those that are not empty; one that goes on has no end token."""
    ends = end_tokens(loaded)
    scoring = ScoringPass(loaded, replace(args, eval_rows=0))

    def compute(share: Share) -> list[Row]:
        asked = [continuation(loaded, row) for _, row in share]
        longest = min(ANSWER_TOKENS, args.max_new_tokens)  # or no answer that is measured could be whole
        asked = [replace(one, tokens=min(longest, args.max_length - len(one.ids))) for one in asked]  # ends among them
        made = []
        for (_, row), one, answer in zip(share, asked, generate_tokens(scoring, "answer questions", asked), strict=True):
            text = in_words(loaded, one, answer).rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that was cut
            ended, place = bool(answer) and answer[-1] in ends, f"the model's own answer to {row.question!r}"
            made.append(Row(row.question, text, asking=None if ended else Asking(end=False), place=place))
        return made

    was_training = loaded.model.training
    loaded.model.eval()
    try:
        return [row for row in scoring.shared_out(questions, compute) if row.answer.strip()]
    finally:
        loaded.model.train(was_training)
