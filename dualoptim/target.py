"""Hold what attacks on one model have in common: arguments, rows, and what the model knew before any of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator

from dualoptim.config.args import EvalArgs
from dualoptim.data.hints import Hinted
from dualoptim.data.rows import Row
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.measure import measure
from dualoptim.evaluation.metrics import coming_back
from dualoptim.evaluation.records import Record, Records
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.evaluation.summarize import set_scores
from dualoptim.evaluation.summary import Attacks, Scores, SetScores
from dualoptim.models.loaded import LoadedModel

ATTACKED_SETS = ("forget", "retain")


@dataclass(frozen=True)
class Target:
    """Everything that attacks on one model have in common. No model is held: each attack has the memory for itself."""

    args: EvalArgs
    accelerator: Accelerator
    judges: Judges
    sets: Mapping[str, list[Row]]  # those of ATTACKED_SETS that there are
    folder: Path
    hinted: Mapping[str, Hinted]  # forget rows that are asked with a hint, by the names of attacks
    records: Records = field(default_factory=dict)  # of the model as it stands
    retain_records: Records | None = None  # of the retain-only model, if that is attacked as well
    alone: Attacks = field(default_factory=Attacks)  # those on the retain-only model as it stands

    def beside(self, records: Records) -> "Target":
        """Give the target that the retain-only model is, whose records these are."""
        return replace(self, records=records, retain_records=None, alone=Attacks(), folder=self.folder / "retain_only")

    def place(self, part: str) -> Path:
        """Name a file or a folder of an attack, and make the folders above it."""
        path = self.folder / part
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def measure(self, loaded: LoadedModel, part: str, sets: Mapping[str, list[Row]] | None = None) -> Records:
        """Score a model, by default on all attacked sets; its rows go to the folder `part`."""
        return measure(ScoringPass(loaded, self.args, self.judges), self.sets if sets is None else sets, self.place(part))


def scores_of(records: Records) -> dict[str, dict[str, float]]:
    """Compute the scores of every set."""
    return {name: set_scores(name, rows, {}) for name, rows in records.items()}


def came_back(sets: SetScores, before: Sequence[Record]) -> Scores:
    """Compute how far the forget set's scores rose, whose records `before` are of the same rows."""
    return rise(sets.get("forget", {}), set_scores("forget", before, {}))


def rise(after: Scores, before: Scores) -> Scores:
    """Compute how far each score rose that rises when knowledge comes back."""
    return {metric: after[metric] - before[metric] for metric in coming_back() if metric in after and metric in before}
