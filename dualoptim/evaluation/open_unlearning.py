"""Write an evaluation in the form of OpenUnlearning's, by its names: `TOFU_EVAL.json` and `TOFU_SUMMARY.json` beside ours.

Its definitions (github.com/locuslab/open-unlearning, src/evals/metrics) differ from ours by the 1e-10 in its denominators.
What was not measured is absent.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from dualoptim.atomic import write_json
from dualoptim.data.declaration import Declaration
from dualoptim.data.rows import HOLDOUT, MEMBERS
from dualoptim.evaluation.membership import membership_auc
from dualoptim.evaluation.metrics import MEMBERSHIP
from dualoptim.evaluation.records import Record, Records
from dualoptim.evaluation.summary import Scores, Summary

Results = dict[str, dict[str, Any]]
"""By the names of metrics `agg_value` and, where rows have values, `value_by_index`."""

_SETS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
_ROUGE = {"rouge_1_recall": "rouge1_recall", "rouge_l_f1": "rougeL_f1", "rouge_l_recall": "rougeL_recall"}
_NINE = [
    *("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    *(f"{name}_{metric}" for name in ("ra", "wf") for metric in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")),
]
_MEMORIZED = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob")
_COMPARED = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
_TINY = 1e-10


def write_suites(folder: Path, suites: Mapping[str, Results], summary: Summary) -> None:
    """Write `<suite>_EVAL.json` and `<suite>_SUMMARY.json` of each suite, and `LMEval_SUMMARY.json` of lm-eval's tasks."""
    for suite, results in suites.items():
        results = {name: results[name] for name in sorted(results)}
        write_json(folder / f"{suite}_EVAL.json", results, small=True)
        write_json(folder / f"{suite}_SUMMARY.json", {name: result["agg_value"] for name, result in results.items()})
    if summary.general:
        tasks = summary.general.items()
        scores = {f"{task}/{metric}": value for task, own in tasks for metric, value in own.items()}
        write_json(folder / "LMEval_SUMMARY.json", scores)


def suites_of(summary: Summary, records: Records, declared: Declaration | None) -> dict[str, Results]:
    """Give the results by the names of suites: TOFU's, or that which a benchmark declares; none where it declares none."""
    shared = _membership(records)
    if (leak := summary.privacy.get("privleak")) is not None:
        shared["privleak"] = {"agg_value": leak}
    if declared is None:
        return {"TOFU": _tofu(summary, records) | shared}
    suite, named = declared.open_unlearning.suite, declared.open_unlearning.metrics
    own = {name: _of_rows(records.get(of.split(".")[0], ()), of.split(".")[1]) for name, of in named.items()}
    return {suite: _measured(own) | shared} if suite else {}


def with_aggregates(results: Results, records: Records, retain: Scores, before: Summary | None) -> Results:
    """Add its aggregates, harmonic means each: memorization, privacy, utility, overall (arXiv 2506.12618).

    Privacy compares four attacks' AUCs with the retain-only model's, `retain`; overall takes utility as a share of that of the
    model `before` unlearning, 1 at most.
    """
    known = {name: result["agg_value"] for name, result in results.items()}
    truth = [_right(one) / (_right(one) + _wrong(one) + _TINY) for one in records.get("forget", ()) if one.perturbed_losses]
    found = {}
    memory = [known[name] for name in _MEMORIZED if name in known]
    if truth and len(memory) == len(_MEMORIZED):
        found["memorization"] = harmonic(*(1 - value for value in [*memory, fmean(truth)]))
    if set(_COMPARED) <= known.keys() & retain.keys():
        found["privacy"] = harmonic(*(likeness(known[name], retain[name]) for name in _COMPARED))
    whole = utility(known.get("model_utility"), known.get("forget_Q_A_gibberish"))
    if whole is not None:
        found["utility"] = whole
        full = before and utility(before.score("tofu.model_utility"), before.sets.get("forget", {}).get("clean_probability"))
        if full:
            found["utility_rel"] = min(1.0, whole / full)
    if {"memorization", "privacy", "utility_rel"} <= found.keys():
        found["overall"] = harmonic(found["memorization"], found["privacy"], found["utility_rel"])
    return results | {name: {"agg_value": value} for name, value in found.items() if math.isfinite(value)}


def harmonic(*values: float) -> float:
    """Compute the harmonic mean as its tables have it: with 1e-12 under each value, so that a zero takes it to zero."""
    return len(values) / sum(1 / (value + 1e-12) for value in values)


def likeness(auc: float, retain_auc: float) -> float:
    """Say from 0 to 1 how close an attack's AUC is to that of the retain-only model: 1 - |difference| / the latter."""
    return min(1.0, max(0.0, 1 - abs(auc - retain_auc) / retain_auc)) if retain_auc else float(auc == retain_auc)


def utility(model_utility: float | None, clean: float | None) -> float | None:
    """Compute the harmonic mean of TOFU's model utility and of how clean forget answers are; None if one is missing."""
    return None if model_utility is None or clean is None else harmonic(model_utility, clean)


def _tofu(summary: Summary, records: Records) -> Results:
    found: Results = {}
    for name, own in _SETS.items():
        rows = records.get(own, [])
        found[f"{name}_Q_A_Prob"] = _result([_prob(one.loss) for one in rows], "prob")
        found[f"{name}_Q_A_PERT_Prob"] = _result(_each(rows, _wrong_answers), "prob")
        found[f"{name}_Q_A_ROUGE"] = _of_rows(rows, "rouge_l_recall")
        ratios = _result(_each(rows, _truth_ratio), "score", name)
        found["forget_truth_ratio" if name == "forget" else f"{name}_Truth_Ratio"] = ratios
        if name in ("ra", "wf"):
            found[f"{name}_Q_A_Prob_normalised"] = _result(_each(rows, _among_options), "prob")
        else:
            found[f"{name}_Q_A_PARA_Prob"] = _result([_prob(one.paraphrased_loss) for one in rows], "prob")
    forget = records.get("forget", [])
    for name in ("extraction_strength", "exact_memorization"):
        found[name] = _of_rows(forget, name)
    found["forget_Q_A_gibberish"] = _of_rows(forget, "clean_probability")
    if (quality := summary.tofu.get("forget_quality")) is not None:
        found["forget_quality"] = {"agg_value": quality}
    found = _measured(found)
    if set(_NINE) <= found.keys():
        values = [found[name]["agg_value"] for name in _NINE]
        found["model_utility"] = {"agg_value": len(values) / sum(1 / value for value in values) if all(values) else 0.0}
    return found


def _membership(records: Records) -> Results:
    """Give each attack's AUC, and what it has read of each row."""
    found: Results = {}
    learned = MEMBERS if MEMBERS in records else "forget"
    for name, attack in MEMBERSHIP.items():
        read = attrgetter(attack.field)
        both = [_result([{"score": read(one)} for one in records.get(which, ())], "score") for which in (learned, HOLDOUT)]
        members, others = ([row["score"] for row in one.get("value_by_index", {}).values()] for one in both)
        if members and others:
            auc = membership_auc(members, others)
            found[name] = {"forget": both[0], "holdout": both[1], "auc": auc, "agg_value": auc}
    return found


def _of_rows(rows: Iterable[Record], metric: str) -> dict[str, Any]:
    """Give a metric of rows under its name for it, ROUGE with all of its scores that were measured."""
    if metric not in _ROUGE:
        return _result([{"score": getattr(row, metric)} for row in rows], "score")
    scores = [{key: getattr(row, name) for name, key in _ROUGE.items() if getattr(row, name) is not None} for row in rows]
    return _result(scores, _ROUGE[metric])


def _result(rows: Sequence[dict[str, Any] | None], key: str, ratios_of: str = "") -> dict[str, Any]:
    """Make a result of the values of rows, whose mean is taken of `key`; empty if there are none, or one is not finite.

    Truth ratios count by how near to 1 they are on the forget set, and on others by how far below.
    """
    found = {str(number): row for number, row in enumerate(rows) if row and row.get(key) is not None}
    if not found or not all(_finite(value) for row in found.values() for value in row.values()):
        return {}
    values = [fmean(row[key]) if isinstance(row[key], list) else row[key] for row in found.values()]
    if ratios_of == "forget":
        values = [min(ratio, 1 / (ratio + _TINY)) for ratio in values]
    elif ratios_of:
        values = [max(0.0, 1 - ratio) for ratio in values]
    return {"agg_value": fmean(values), "value_by_index": found}


def _finite(value: Any) -> bool:
    return all(map(math.isfinite, value)) if isinstance(value, list) else math.isfinite(value)


def _measured(results: Results) -> Results:
    return {name: result for name, result in results.items() if result}


def _prob(loss: float | None) -> dict[str, Any]:
    return {} if loss is None else {"prob": math.exp(-loss), "avg_loss": loss}


def _each(rows: Iterable[Record], of: Callable[[Record], dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the values of the rows that have a right and wrong answers to compare, and nothing for the others."""
    return [of(row) if row.perturbed_losses and row.paraphrased_loss is not None else {} for row in rows]


def _wrong_answers(record: Record) -> dict[str, Any]:
    losses = list(record.perturbed_losses or ())
    return {"prob": [math.exp(-loss) for loss in losses], "avg_loss": losses}


def _truth_ratio(record: Record) -> dict[str, Any]:
    return {"score": _wrong(record) / (_right(record) + _TINY)}


def _among_options(record: Record) -> dict[str, Any]:
    right, wrong = _right(record), sum(math.exp(-loss) for loss in record.perturbed_losses or ())
    return {"prob": right / (right + wrong + _TINY)}


def _right(record: Record) -> float:
    return math.exp(-(record.paraphrased_loss or 0.0))


def _wrong(record: Record) -> float:
    return math.exp(-fmean(record.perturbed_losses or ()))
