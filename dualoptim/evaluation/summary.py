"""The summary of an evaluation: what `summary.json` holds, read and written here alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualoptim.atomic import write_json
from dualoptim.errors import InputError
from dualoptim.evaluation.json_form import from_json, to_json

Scores = Mapping[str, float]
"""Scores by the names of metrics."""

SetScores = Mapping[str, Scores]
"""Scores by the names of sets, and of metrics."""

SEEN, UNSEEN = "retain_seen", "retain_unseen"
"""The parts of the set `retain`, as sets of their own: rows that some step trained on, and rows that none did."""
PARTS = {SEEN: "retain rows that steps trained on", UNSEEN: "retain rows that no step trained on"}
"""What a reader finds them called, everywhere."""


@dataclass(frozen=True)
class Attacked:
    """The scores under an attack, how far each rose that rises when knowledge comes back, and a retain-only model's."""

    sets: SetScores = field(default_factory=dict)
    came_back: Scores = field(default_factory=dict)
    retain_only: SetScores | None = None
    above_retain_only: Scores | None = None  # how far the forget set's lie above that
    what: str | None = None  # was asked, if that is no other wording


@dataclass(frozen=True)
class Sampled:
    """Several drawn answers to each forget question: the best and the mean of their ROUGE-L recall.

    Also the share of questions of which some draw has the whole true answer, and the same of a retain-only model.
    """

    samples: int | None = None
    temperature: float | None = None
    sets: SetScores = field(default_factory=dict)
    came_back: Scores = field(default_factory=dict)
    retain_only: SetScores | None = None
    above_retain_only: Scores | None = None


@dataclass(frozen=True)
class Quantized:
    """The scores of a model with weights of fewer bits, how it got there, and what came back."""

    how: str | None = None
    sets: SetScores = field(default_factory=dict)
    came_back: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """The scores after some steps of relearning; `stopped` says why there was no further step."""

    step: int
    sets: SetScores
    stopped: str | None = None


@dataclass(frozen=True)
class Relearned:
    """Scores while a model is taught some rows again, in order of steps, and those of the retain-only model taught the same."""

    what: str | None = None  # was taught
    rows: int | None = None
    curve: Sequence[Point] = ()
    retain_only: Sequence[Point] | None = None
    came_back: Scores = field(default_factory=dict)  # from the start to the peak, of the forget set
    above_retain_only: Scores | None = None  # how far the peak lies above the retain-only model's, of the set that counts
    learning_rate: float | None = None
    lora_rank: int | None = None  # None: all weights were taught

    @property
    def counts(self) -> str:
        """Name the set that tells whether anything came back: the forget rows that were not taught, if there are any."""
        return "forget_unseen" if self.curve and "forget_unseen" in self.curve[-1].sets else "forget"

    @property
    def peak(self) -> Point | None:
        """The point of the curve at which most had come back."""
        return _peak(self.curve, self.counts)

    @property
    def peak_retain_only(self) -> Point | None:
        """The same of the retain-only model."""
        return _peak(self.retain_only or (), self.counts)


def _peak(curve: Sequence[Point], name: str) -> Point | None:
    """Find the last point with the highest probability of a set; the one before any step counts where there is no other."""
    later = list(curve[1:]) or list(curve)
    return max(reversed(later), key=lambda point: point.sets.get(name, {}).get("probability", 0.0), default=None)


@dataclass(frozen=True)
class Attacks:
    """What attacks brought back; each is None if it was not made."""

    paraphrase: Attacked | None = None
    sample: Sampled | None = None
    quantize: Mapping[str, Quantized] | None = None  # by the number of bits, or what is stored
    few_shot: Attacked | None = None
    prefix: Attacked | None = None
    relearn: Relearned | None = None  # of several the one that brought back the most
    relearnings: Mapping[str, Relearned] | None = None  # all, if there are several, by rows, steps, rate and rank

    @property
    def relearned(self) -> Mapping[str, Relearned]:
        """All relearnings by their names; one alone needs none."""
        return self.relearnings or ({"": self.relearn} if self.relearn else {})


@dataclass(frozen=True)
class BenchmarkScores:
    """The scores of a benchmark, what they are called and where they should go, and what others report."""

    name: str | None = None
    scores: Scores = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    should: Mapping[str, str] = field(default_factory=dict)
    forgets: Sequence[str] = ()  # sets and groups of them that are to be forgotten; none said: those so named
    keeps: Sequence[str] = ()  # sets that are to be kept, beside `retain`
    published: Mapping[str, Scores] = field(default_factory=dict)
    source: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What to make of an evaluation, as `verdict.py` judges it.

    `forgotten` is yes, hidden (attacks bring it back), no, never known or not measured, and `kept` yes, no, collapsed or
    not measured.
    """

    forgotten: str
    kept: str
    against: str  # what the model is compared with
    missed: Scores = field(default_factory=dict)  # by how much aims were missed, by the names of scores
    says: Sequence[str] = ()
    tries: Sequence[str] = ()  # what to try next


@dataclass(frozen=True)
class RetainOnly:
    """Scores of a model that never saw the forget set, to compare with."""

    source: str | None = field(default=None, metadata={"key": "from"})
    sets: SetScores = field(default_factory=dict)
    model_utility: float | None = None
    untargeted_forget_efficacy: float | None = None
    targeted_forget_efficacy: float | None = None
    tofu: Scores = field(default_factory=dict)
    privacy: Scores = field(default_factory=dict)
    precision: str | None = None

    def score(self, name: str) -> float | None:
        """Look one of `metrics.AGGREGATES` up."""
        return _score(self, name)


@dataclass(frozen=True, eq=False, repr=False)
class Summary(dict[str, Any]):
    """What one evaluation measured. It is also the dictionary that `summary.json` holds: `summary["sets"]["forget"]`.

    What was not measured is empty or None; `skipped` says why.
    """

    sets: SetScores = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    model_utility: float | None = None
    untargeted_forget_efficacy: float | None = None
    targeted_forget_efficacy: float | None = None
    tofu: Scores = field(default_factory=dict)
    privacy: Scores = field(default_factory=dict)
    retain_only: RetainOnly | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    general: Mapping[str, Scores] | None = None  # lm-eval's metrics by task
    attacks: Attacks | None = None
    benchmark: BenchmarkScores | None = None
    precision: str | None = None  # of the weights that were measured; None: float32
    retain_from: str | None = None  # `model`: rows to keep that it made itself before it forgot; None: the data
    verdict: Verdict | None = None

    @classmethod
    def read(cls, path: Path) -> "Summary":
        """Read a `summary.json`, of which every part may be absent.

        Raises:
            InputError: if it cannot be read, naming the file.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise InputError(f"{path}: not a JSON object; repeat that run, or restore the file")
            return cls.from_json(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON ({error.msg}); repeat that run, or restore the file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: no summary of an evaluation ({error}); repeat that run, or restore the file") from None

    @classmethod
    def from_json(cls, value: Any) -> "Summary":
        """Build a summary of its JSON form.

        Raises:
            ValueError: if a part of it is of another type.
        """
        return from_json(cls, value, "")

    def write(self, path: Path) -> None:
        """Write a `summary.json`."""
        write_json(path, self)

    def score(self, name: str) -> float | None:
        """Look one of `metrics.AGGREGATES` up."""
        return _score(self, name)

    def forgets(self, name: str) -> bool:
        """Tell whether a set is to be forgotten."""
        return name in self.benchmark.forgets if self.benchmark and self.benchmark.forgets else name.startswith("forget")

    def __post_init__(self) -> None:
        self.update(to_json(self))


def _score(summary: Summary | RetainOnly, name: str) -> float | None:
    """Look up an aggregate, whose name may begin with a block's: `tofu.model_utility`."""
    if name.startswith("tofu."):
        return summary.tofu.get(name.removeprefix("tofu."))
    value: float | None = getattr(summary, name)
    return value
