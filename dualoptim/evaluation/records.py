"""Keep the records of scored rows: what one line of `<set>.jsonl` holds, and which sets are finished."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualoptim.atomic import read_json, read_json_lines, write_json, write_json_lines
from dualoptim.errors import InputError
from dualoptim.evaluation.json_form import from_json, to_json


@dataclass(frozen=True)
class Record:
    """Everything that was measured of one row. What was not measured is None, and absent in its file.

    Losses are mean negative log-likelihoods per token of an answer, the end token among them.
    """

    question: str | None  # None for a passage
    answer: str | None  # None where texts were not kept
    # by the teacher-forced pass
    probability: float | None = None
    extraction_strength: float | None = None
    exact_memorization: float | None = None
    loss: float | None = None
    tokens: int | None = None
    truth_ratio: float | None = None
    paraphrased_loss: float | None = None
    perturbed_losses: Sequence[float] | None = None
    # where membership is attacked; high: not a member
    min_k: float | None = None
    min_k_plus_plus: float | None = None
    zlib: float | None = None
    reference: float | None = None  # this model's loss minus another's
    gradnorm: float | None = None
    # of the model's own answer
    generated: str | None = None
    rouge_l_recall: float | None = None
    recall_beyond_question: float | None = None
    token_entropy: float | None = None
    cosine_similarity: float | None = None
    entailment_score: float | None = None
    refusal: str | None = None
    refusal_entailment_score: float | None = None
    clean_probability: float | None = None
    # of the model's own answer, where `--metrics` or a benchmark asks for it
    rouge_1_recall: float | None = None
    rouge_1_f1: float | None = None
    rouge_l_f1: float | None = None
    rouge_l_f1_unstemmed: float | None = None
    exact_match: float | None = None
    ngram_entropy: float | None = None
    ngram_entropy_of_sentences: float | None = None
    distinct_rouge_l_recall: float | None = None
    bag_f1: float | None = None
    stated_answer: float | None = None
    # by the pass, where a benchmark asks for it; those of passages are high where they are not known
    right_choice: float | None = None
    passage_loss: float | None = None
    passage_zlib: float | None = None
    passage_min_k: float | None = None
    passage_min_k_plus_plus: float | None = None
    group: str | None = None  # of its set, with means of its own

    @classmethod
    def from_json(cls, line: Any, where: str) -> "Record":
        """Read one line of a set's file.

        Raises:
            ValueError: if it is no row, naming `where` it stands.
        """
        without = {"question": None, "answer": None} if isinstance(line, dict) and "row" in line else {}
        return from_json(cls, line | without if without else line, where)

    def to_json(self) -> dict[str, Any]:
        """Return the line of a set's file."""
        return to_json(self)

    def numbered(self, row: int) -> dict[str, Any]:
        """Return the line of a file without texts: the number of the row, and its scores."""
        return {"row": row} | {name: value for name, value in to_json(self).items() if name not in _TEXTS}


_TEXTS = ("question", "answer", "generated", "refusal")

Records = dict[str, list[Record]]
"""The records of sets by the sets' names."""


def read_records(path: Path) -> list[Record]:
    """Read the file of a set.

    Raises:
        OSError, ValueError: if it is no such file.
    """
    return [Record.from_json(line, f"{path}:{number}") for number, line in enumerate(read_json_lines(path), 1)]


def hand_on(earlier: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy the sets that another evaluation has finished into a folder where none has begun, which takes those that it has too.

    Which they are is told by weights and texts (`Finished`).
    """
    with contextlib.suppress(InputError):
        known = read_json(earlier / "finished.json", {}, "")
        same = {} if folder.exists() else {name: known[name] for name in names if name in known}
        for name in same:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(earlier / f"{name}.jsonl", folder / f"{name}.jsonl")
        if same:
            write_json(folder / "finished.json", same)


class Finished:
    """The sets that an evaluation of these weights and texts has finished in a folder."""

    def __init__(self, folder: Path, fingerprints: Mapping[str, dict[str, str]]) -> None:
        """Read what is there of the sets whose `fingerprints` (hashes of what decides their scores) are given."""
        self._folder, self._fingerprints = folder, fingerprints
        self._recorded: dict[str, dict[str, str]] = {}
        self.records: Records = {}
        if fingerprints:
            with contextlib.suppress(InputError):  # sets of which nothing is known are measured anew
                self._recorded = read_json(folder / "finished.json", {}, "")
        for name in fingerprints:
            # the file's own hash tells when a kill or an edit has left other rows than those recorded
            if self._path(name).is_file() and self._recorded.get(name) == self._entry(name):
                self.records[name] = read_records(self._path(name))

    def add(self, name: str, records: Sequence[Record], texts: bool = True) -> None:
        """Write the records of a set, with their texts or without, and then that it is finished."""
        lines = [record.to_json() if texts else record.numbered(number) for number, record in enumerate(records, 1)]
        write_json_lines(self._path(name), lines)
        self._recorded[name] = self._entry(name)
        write_json(self._folder / "finished.json", self._recorded)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _entry(self, name: str) -> dict[str, str]:
        return {**self._fingerprints[name], "file": hashlib.sha256(self._path(name).read_bytes()).hexdigest()}
