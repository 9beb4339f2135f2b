"""Compute the summary of an evaluation from its records: means over sets, aggregates, and why what is missing is missing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from statistics import fmean

from dualoptim.data.rows import HOLDOUT, MEMBERS
from dualoptim.evaluation import metrics
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.membership import membership_auc, privleak
from dualoptim.evaluation.metrics import AGGREGATES, MEMBERSHIP, METRICS
from dualoptim.evaluation.records import Record, Records
from dualoptim.evaluation.retain_only import RetainLogs
from dualoptim.evaluation.summary import Scores, Summary

_NOT_FINITE = "the model's losses are not finite"


def summarize(records: Records, skipped: Mapping[str, str], judges: Judges, retain: RetainLogs | None) -> Summary:
    """Compute the summary of records by set; `skipped` says what the data could not give, and why."""
    missing = dict(skipped)
    measured = {name: rows for name, rows in records.items() if name not in (HOLDOUT, MEMBERS)}
    sets = {name: set_scores(name, rows, missing) for name, rows in measured.items()}
    groups = {name: rows for set_name, own in measured.items() for name, rows in _groups(set_name, own)}
    sets |= {name: set_scores(name, rows, {}) for name, rows in groups.items()}
    forget = sets.get("forget", {})
    utility = _known("model_utility", metrics.model_utility(sets), missing)
    untargeted = _known("untargeted_forget_efficacy", metrics.untargeted_forget_efficacy(forget), missing)
    targeted = _known("targeted_forget_efficacy", metrics.targeted_forget_efficacy(forget), missing)
    tofu = _tofu(sets, records.get("forget", ()), retain, missing)
    privacy = _privacy(records, retain, missing)
    for name, metric in METRICS.items():
        if metric.judge and metric.needs and not getattr(judges, metric.judge):
            missing[name] = metric.needs
    return Summary(
        sets=sets,
        rows={name: len(rows) for name, rows in (records | groups).items()},
        model_utility=utility,
        untargeted_forget_efficacy=untargeted,
        targeted_forget_efficacy=targeted,
        tofu=tofu,
        privacy=privacy,
        retain_only=retain.scores() if retain else None,
        skipped=missing,
    )


def set_scores(name: str, records: Sequence[Record], missing: dict[str, str]) -> dict[str, float]:
    """Compute the means over a set's rows; the reason for what cannot be computed is added to `missing`."""
    scores = {}
    for metric, known in METRICS.items():
        values = [value for value in map(known.of or attrgetter(metric), records) if value is not None]
        if metric == "truth_ratio" and not values:
            if any(record.probability is not None for record in records):
                missing[f"{name}.{metric}"] = known.needs
        elif any(map(math.isnan, values)) or (metric != "truth_ratio" and any(map(math.isinf, values))):
            missing[f"{name}.{metric}"] = _NOT_FINITE
        elif metric == "truth_ratio":
            scores[metric] = (metrics.forget_truth_ratio if name.startswith("forget") else metrics.retain_truth_ratio)(values)
        elif values:
            scores[metric] = fmean(values)
    return scores


def _groups(name: str, records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Sort the records of a set by the groups that they are of, as `<set>_<group>`."""
    groups = [(record.group or "").split() for record in records]
    for group in dict.fromkeys(one for own in groups for one in own):
        yield f"{name}_{group}", [record for record, own in zip(records, groups, strict=True) if group in own]


def _tofu(
    sets: Mapping[str, Scores], forget: Sequence[Record], retain: RetainLogs | None, missing: dict[str, str]
) -> dict[str, float]:
    """Compute TOFU's own three numbers."""
    ratios = [record.truth_ratio for record in forget if record.truth_ratio is not None]
    quality = metrics.forget_quality(ratios, retain.truth_ratios) if ratios and retain and retain.truth_ratios else None
    values = {
        "model_utility": _known("tofu.model_utility", metrics.tofu_model_utility(sets), missing),
        "forget_truth_ratio": _known("tofu.forget_truth_ratio", sets.get("forget", {}).get("truth_ratio"), missing),
        "forget_quality": _known("tofu.forget_quality", quality, missing),
    }
    if retain and quality is None:  # what is missing is not the other model
        missing["tofu.forget_quality"] = METRICS["truth_ratio"].needs
    return {name: value for name, value in values.items() if value is not None}


def _privacy(records: Records, retain: RetainLogs | None, missing: dict[str, str]) -> dict[str, float]:
    """Compute how well each attack tells the forget set's rows from rows that no model has seen."""
    if HOLDOUT not in records:
        missing["privacy"] = "needs rows that no model has seen; give --holdout-file"
        return {}
    block, learned = {}, MEMBERS if MEMBERS in records else "forget"
    for name, attack in MEMBERSHIP.items():
        members, others = (
            [value for value in map(attrgetter(attack.field), records[which]) if value is not None]
            for which in (learned, HOLDOUT)
        )
        auc = membership_auc(members, others) if members and others else None
        if (value := _finite(f"privacy.{name}", auc, attack.needs, missing)) is not None:
            block[name] = value
    auc = block.get("mia_min_k")
    leak = privleak(auc, retain.min_k_auc) if auc is not None and retain and retain.min_k_auc is not None else None
    needs = f"{retain.source} has no mia_min_k; evaluate it with the same --holdout-file" if retain else metrics.NO_RETAIN
    if (value := _finite("privacy.privleak", leak, needs, missing)) is not None:
        block["privleak"] = value
    return block


def _known(name: str, value: float | None, missing: dict[str, str]) -> float | None:
    """Return one of the `AGGREGATES`, or None and the reason into `missing`."""
    return _finite(name, value, AGGREGATES[name].needs, missing)


def _finite(name: str, value: float | None, needs: str, missing: dict[str, str]) -> float | None:
    """Return a value, or None and the reason into `missing` if there is none or it is not finite."""
    if value is None or not math.isfinite(value):
        missing[name] = needs if value is None else _NOT_FINITE
        return None
    return value
