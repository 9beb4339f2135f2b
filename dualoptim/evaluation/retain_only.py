"""Read evaluations of a model that never saw the forget set, in the three forms in which they are published."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualoptim.atomic import read_json_lines
from dualoptim.config.opening import read_text
from dualoptim.data.files import JSON
from dualoptim.errors import InputError, reason, shown
from dualoptim.evaluation.metrics import MEMBERSHIP, truth_ratio
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summary import RetainOnly, Scores, Summary


@dataclass(frozen=True)
class RetainLogs:
    """What an evaluation of the retain-only model says: truth ratios of the forget rows, and more where that is there."""

    source: str
    truth_ratios: list[float]
    aucs: Scores = field(default_factory=dict)  # of membership attacks, by their names
    summary: Summary | None = None  # of our own form alone

    @property
    def min_k_auc(self) -> float | None:
        """Give the AUC that privleak compares with."""
        return self.aucs.get("mia_min_k")

    def scores(self) -> RetainOnly | None:
        """Return what the report shows beside the model's own scores."""
        known = self.summary
        if known is None:
            return None
        utility, untargeted, targeted = known.model_utility, known.untargeted_forget_efficacy, known.targeted_forget_efficacy
        scores = RetainOnly(self.source, known.sets, utility, untargeted, targeted, known.tofu, known.privacy)
        return replace(scores, precision=known.precision)


def read_retain_logs(path: str) -> RetainLogs:
    """Read a folder of ours (or the `eval/` in it), TOFU's `eval_log_aggregated.json` or OpenUnlearning's `TOFU_EVAL.json`.

    Raises:
        InputError: if it is none of them, or has no truth ratios of the forget set.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        folder = next((f for f in (place, place / "eval") if (f / "summary.json").is_file()), None)
        if folder is None:
            raise InputError(f"--retain-logs {path}: the folder has no summary.json; give one that dualoptim eval wrote")
        found = _read(path, folder / "summary.json")
        try:
            json.dumps(found, allow_nan=False)
            summary = Summary.from_json(found)
        except ValueError as error:
            raise InputError(f"--retain-logs {path}: its summary.json is none ({error}); evaluate that model again") from None
        try:
            rows = enumerate(read_json_lines(folder / "forget.jsonl"))
            ratios = _ratios(path, {number: row["truth_ratio"] for number, row in rows if "truth_ratio" in row})
            logs = RetainLogs(path, ratios, summary.privacy, summary if found else None)
            return logs if summary.benchmark else _with_ratios(logs)  # most benchmarks have no answers to compare
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"--retain-logs {path}: its forget.jsonl has no truth ratios; evaluate on data with perturbed answers"
            ) from None
    log = _read(path, place)
    if isinstance(log, dict) and "eval_log_forget.json" in log:  # TOFU
        rows = log["eval_log_forget.json"]
        with contextlib.suppress(KeyError, TypeError, ValueError):
            right, wrong = (_by_row(rows[name]) for name in ("avg_paraphrased_loss", "average_perturb_loss"))
            return _with_ratios(RetainLogs(path, _ratios(path, {row: _ratio(path, row, right, wrong) for row in right})))
        raise InputError(
            f"--retain-logs {path}: its forget rows have no losses of paraphrased and perturbed answers; give a whole log"
        )
    if isinstance(log, dict):  # OpenUnlearning; the spelling of the key differs between its versions
        by_name = {name.lower(): value for name, value in log.items()}
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
            by_row = _by_row(by_name["forget_truth_ratio"]["value_by_index"])
            ratios = _ratios(path, {number: row and row["score"] for number, row in by_row.items()})
            attacks = {name: by_name.get(name) or {} for name in MEMBERSHIP}
            known = {name: result.get("agg_value", result.get("auc")) for name, result in attacks.items()}
            aucs = {name: _number(path, f"{name} is", auc, 0, 1) for name, auc in known.items() if auc is not None}
            return _with_ratios(RetainLogs(path, ratios, aucs))
    raise InputError(
        f"--retain-logs {path}: no truth ratios of a forget set; give a folder that dualoptim eval wrote, TOFU's "
        "eval_log_aggregated.json or OpenUnlearning's TOFU_EVAL.json"
    )


def of_records(forget: Sequence[Record], summary: Summary, source: str) -> RetainLogs:
    """Collect what an evaluation of ours says, from the records of its forget set and its summary."""
    ratios = [record.truth_ratio for record in forget if record.truth_ratio is not None]
    return RetainLogs(source, ratios, summary.privacy, summary)


def _ratio(path: str, row: str, right: Mapping[str, Any], wrong: Mapping[str, Any]) -> float | None:
    """Compute the truth ratio of a row of TOFU's log; None if it has no losses."""
    losses = wrong.get(row)
    if right[row] is None or losses is None:
        return None
    what = f"row {row} has the loss"
    return truth_ratio(_number(path, what, right[row]), [_number(path, what, loss) for loss in losses])


def _ratios(path: str, scores: Mapping[Any, Any]) -> list[float]:
    """Take the truth ratios that are there: OpenUnlearning writes null for a row that it leaves out.

    Raises:
        InputError: naming the first row whose ratio is none.
    """
    return [
        _number(path, f"row {row} has the truth ratio", score, 0, math.inf)
        for row, score in scores.items()
        if score is not None
    ]


def _number(path: str, what: str, value: Any, least: float = -1e300, most: float = 1e300) -> float:
    """Take a number from `least` to `most`."""
    with contextlib.suppress(OverflowError):  # a whole number that no float is
        if not isinstance(value, bool) and isinstance(value, (int, float)) and least <= float(value) <= most:
            return float(value)
    raise InputError(
        f"--retain-logs {path}: {what} {shown(value)}, which is no number that it can be; give an evaluation of finite losses"
    )


def _with_ratios(logs: RetainLogs) -> RetainLogs:
    """Raise ValueError if there is not one truth ratio."""
    if not logs.truth_ratios:
        raise ValueError
    return logs


def _read(path: str, place: Path) -> Any:
    text = read_text(f"--retain-logs {path}", place, "give a whole evaluation")
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--retain-logs {path}: cannot be read as JSON ({reason(error)}); give a whole evaluation") from None


def _by_row(values: Any) -> Mapping[str, Any]:
    """Turn what published logs hold, dictionaries by row number or lists, into the former."""
    return values if isinstance(values, dict) else {str(number): value for number, value in enumerate(values)}
