"""Records of the scoring pass: kept on disk set by set, and made into the summary of an evaluation."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from dualoptim.evaluation import metrics
from dualoptim.models.checkpoint import read_json_lines, write_json, write_json_lines
from dualoptim.data.tofu import HOLDOUT, Row
from dualoptim.evaluation.scoring import ScoringPass, aggregate
from dualoptim.evaluation.retain_only import RetainLogs

FINISHED = "finished.json"

MIA_SCORES = {
    "mia_loss": "loss",
    "mia_zlib": "zlib",
    "mia_min_k": "min_k",
    "mia_min_k_plus_plus": "min_k_plus_plus",
    "mia_gradnorm": "gradnorm",
    "mia_reference": "reference",
}
"""Membership attacks by OpenUnlearning's names, and what each reads in a row."""

_MISSING = {
    "cosine_similarity": "needs a sentence encoder; give --sentence-encoder",
    "entailment_score": "needs a model of entailment; give --entailment-model",
    "mia_gradnorm": "needs a backward pass per row; give --mia-gradnorm",
    "mia_reference": "needs another model's losses; give --reference-model to eval_tofu.py",
}
_NO_RETAIN = (
    "needs a model that never saw the forget set (python -m dualoptim.finetune on the retain split); evaluate it and give its "
    "folder as --retain-logs, or give it to eval_tofu.py as --retain-model"
)


class Finished:
    """The sets that an evaluation of these weights and texts has finished in `folder`; the main process reads and writes."""

    def __init__(self, scoring: ScoringPass, sets: dict[str, list[Row]], folder: Path) -> None:
        """Read what is there."""
        self._folder = folder
        self._marks: dict[str, dict[str, str]] = {}
        self._recorded: dict[str, dict[str, str]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        if not scoring.accelerator.is_main_process:
            return
        self._marks = scoring.marks(sets)
        with contextlib.suppress(OSError, json.JSONDecodeError):
            self._recorded = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        for name in self._marks:
            # the file's own hash tells when a kill or an edit has left other rows than those recorded
            if self._path(name).is_file() and self._recorded.get(name) == self._mark(name):
                self.rows[name] = read_json_lines(self._path(name))

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a set, and then that it is finished."""
        write_json_lines(self._path(name), rows)
        self._recorded[name] = self._mark(name)
        write_json(self._folder / FINISHED, self._recorded)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _mark(self, name: str) -> dict[str, str]:
        return {**self._marks[name], "file": hashlib.sha256(self._path(name).read_bytes()).hexdigest()}


def measure(scoring: ScoringPass, sets: dict[str, list[Row]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every set, the same on all processes, written to `folder`.

    A set that an interrupted evaluation of the same weights and texts has finished there is read.
    """
    finished = Finished(scoring, sets, folder)
    records = broadcast_object_list([finished.rows])[0]
    model = scoring.policy.model
    was_training = model.training
    model.eval()
    try:
        for name, rows in sets.items():
            if name not in records:
                records[name] = scoring.records(name, rows)
                if scoring.accelerator.is_main_process:
                    finished.add(name, records[name])
    finally:
        model.train(was_training)
    return {name: records[name] for name in sets}


def summarize(
    scoring: ScoringPass, records: Mapping[str, Sequence[dict[str, Any]]], skipped: Mapping[str, str], retain: RetainLogs | None
) -> dict[str, Any]:
    """The summary of records by set: set scores, aggregates, privacy, and why what is missing is missing."""
    missing = dict(skipped)
    scores = {name: aggregate(name, rows, missing) for name, rows in records.items() if name != HOLDOUT}
    summary: dict[str, Any] = {"sets": scores, "rows": {name: len(rows) for name, rows in records.items()}}
    forget = scores.get("forget", {})
    for name, value, needs in (
        ("model_utility", metrics.model_utility(scores), "needs scores of sets that are missing"),
        (
            "untargeted_forget_efficacy",
            metrics.untargeted_forget_efficacy(forget),
            "needs scores of the forget set",
        ),
        (
            "targeted_forget_efficacy",
            metrics.targeted_forget_efficacy(forget),
            "needs entailment_score of refusals; give --entailment-model",
        ),
    ):
        _put(summary, name, value, missing, name, needs)
    summary["tofu"] = _tofu(scores, records.get("forget", ()), retain, missing)
    summary["privacy"] = _privacy(records, retain, missing)
    if retain and retain.summary:
        summary["retain_only"] = retain.scores()
    if not scoring.judges.encoder:
        missing["cosine_similarity"] = _MISSING["cosine_similarity"]
    if not scoring.judges.entailment:
        missing["entailment_score"] = _MISSING["entailment_score"]
    summary["skipped"] = missing
    return summary


def _tofu(
    scores: Mapping[str, Mapping[str, float]],
    forget: Sequence[Mapping[str, Any]],
    retain: RetainLogs | None,
    missing: dict[str, str],
) -> dict[str, float]:
    """TOFU's own three numbers."""
    block: dict[str, float] = {}
    ratios = [row["truth_ratio"] for row in forget if "truth_ratio" in row]
    needs = "needs scores of sets that are missing"
    _put(block, "model_utility", metrics.tofu_model_utility(scores), missing, "tofu.model_utility", needs)
    needs = "the rows have no paraphrased and perturbed answers"
    _put(block, "forget_truth_ratio", scores.get("forget", {}).get("truth_ratio"), missing, "tofu.forget_truth_ratio", needs)
    quality = metrics.forget_quality(ratios, retain.truth_ratios) if ratios and retain and retain.truth_ratios else None
    _put(block, "forget_quality", quality, missing, "tofu.forget_quality", needs if retain else _NO_RETAIN)
    return block


def _privacy(
    records: Mapping[str, Sequence[Mapping[str, Any]]], retain: RetainLogs | None, missing: dict[str, str]
) -> dict[str, float]:
    """How well each attack tells the forget set's rows from rows that no model has seen."""
    if HOLDOUT not in records:
        missing["privacy"] = "needs rows that no model has seen; give --holdout-file"
        return {}
    block: dict[str, float] = {}
    for name, field in MIA_SCORES.items():
        members, others = ([row[field] for row in records[which] if field in row] for which in ("forget", HOLDOUT))
        auc = metrics.membership_auc(members, others) if members and others else None
        _put(block, name, auc, missing, f"privacy.{name}", _MISSING.get(name, ""))
    auc = block.get("mia_min_k")
    leak = metrics.privleak(auc, retain.min_k_auc) if auc is not None and retain and retain.min_k_auc is not None else None
    needs = f"{retain.source} has no mia_min_k; evaluate it with the same --holdout-file" if retain else _NO_RETAIN
    _put(block, "privleak", leak, missing, "privacy.privleak", needs)
    return block


def _put(block: dict[str, Any], key: str, value: Any, missing: dict[str, str], name: str, why: str) -> None:
    """A value into its block, or the reason why there is none into `missing`."""
    if value is None or not math.isfinite(value):
        missing[name] = why if value is None else "the model's losses are not finite"
    else:
        block[key] = value
