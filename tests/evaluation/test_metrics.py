"""Evaluation arithmetic against the published aggregation, its helpers, and hand-worked cases."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from dualoptim.evaluation import metrics
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.rouge import rouge_l_recall

FILES = {
    "retain": ("eval_log.json", "Retain"),
    "real_authors": ("eval_real_author_wo_options.json", "Real Authors"),
    "world_facts": ("eval_real_world_wo_options.json", "Real World"),
    "forget": ("eval_log_forget.json", "Forget"),
}
TITLES = {
    "rouge_l_recall": "ROUGE",
    "probability": "Probability",
    "truth_ratio": "Truth Ratio",
    "token_entropy": "Token Entropy",
    "cosine_similarity": "Cosine Similarity",
    "entailment_score": "Entailment Score",
}


def sets_from_log(log):
    """Our set scores from an evaluation log in the published form (lists, or dictionaries by row number)."""
    sets = {}
    for name, (file, _) in FILES.items():
        rows = {k: list(v.values()) if isinstance(v, dict) else v for k, v in log[file].items()}
        losses, wrong = rows["avg_gt_loss"], rows["average_perturb_loss"]
        options = name in ("real_authors", "world_facts")
        ratios = [metrics.truth_ratio(p, w) for p, w in zip(rows["avg_paraphrased_loss"], wrong, strict=True)]
        probabilities = [
            metrics.option_probability(loss, others) if options else math.exp(-loss)
            for loss, others in zip(losses, wrong, strict=True)
        ]
        mean = lambda values: math.fsum(values) / len(values)  # noqa: E731
        sets[name] = {
            "rouge_l_recall": mean(rows["rougeL_recall"]),
            "probability": mean(probabilities),
            "truth_ratio": (metrics.forget_truth_ratio if name == "forget" else metrics.retain_truth_ratio)(ratios),
        }
        if "token_entropy" in rows:
            sets[name] |= {k: mean(rows[k]) for k in ("token_entropy", "cosine_similarity")}
            sets[name]["entailment_score"] = mean([label == "entailment" for label in rows["entailment_labels"]])
        if "idk_entailment_labels" in rows:
            labels = rows["idk_entailment_labels"]
            sets[name]["refusal_entailment_score"] = mean([label == "entailment" for label in labels])
    return sets


def test_eighteen_value_utility_and_forget_efficacy_equal_the_published_code(shared_json):
    oracle = shared_json("oracles/aggregates.json")
    log, published = oracle["cases"]["ordinary"], oracle["results"]["ordinary"]
    sets = sets_from_log(log)
    for name, (_, title) in FILES.items():
        for metric, metric_title in TITLES.items():
            ours = sets[name][metric]
            ours = 1 - ours if (name, metric) == ("forget", "truth_ratio") else ours  # published as 1 - mean(min(r, 1/r))
            assert ours == pytest.approx(published[f"{title} {metric_title}"], abs=1e-9), (name, metric)
    assert metrics.model_utility(sets) == pytest.approx(published["Model Utility"], abs=1e-9)
    assert metrics.untargeted_forget_efficacy(sets["forget"]) == pytest.approx(
        published["Untargeted Forget Efficacy"], abs=1e-9
    )
    assert sets["forget"]["refusal_entailment_score"] == pytest.approx(published["Forget IDK Entailment Score"], abs=1e-9)
    assert metrics.targeted_forget_efficacy(sets["forget"]) == pytest.approx(published["Targeted Forget Efficacy"], abs=1e-9)


@pytest.mark.parametrize("which", ["full", "retain90"])
def test_tofu_model_utility_from_its_published_logs(which, shared_json):
    published = shared_json("oracles/tofu_published_metrics.json")["model_utility"]
    published = published[f"ft_epoch5_lr1e-05_llama2-7b_{which}_wd0.01"]["aggregate_eval_stat"]
    sets = sets_from_log(shared_json(f"oracles/tofu_logs/{which}/eval_log_aggregated.json"))
    assert metrics.tofu_model_utility(sets) == pytest.approx(published["Model Utility"], abs=1e-9)
    assert sets["forget"]["truth_ratio"] == pytest.approx(published["Truth Ratio Forget"], abs=1e-9)
    assert sets["real_authors"]["probability"] == pytest.approx(published["Prob. Real Authors"], abs=1e-9)


def published_ratios(which, shared_json):
    rows = shared_json(f"oracles/tofu_logs/{which}/eval_log_aggregated.json")["eval_log_forget.json"]
    right, wrong = rows["avg_paraphrased_loss"], rows["average_perturb_loss"]
    return [metrics.truth_ratio(right[row], wrong[row]) for row in right]


def test_tofu_forget_quality_from_its_published_logs(shared_json):
    published = shared_json("oracles/tofu_published_metrics.json")["forget_quality"]
    full, retain = published_ratios("full", shared_json), published_ratios("retain90", shared_json)
    expected = published["ft_epoch5_lr1e-05_llama2-7b wd0.01: full vs retain90"]["aggregate_eval_stat"]["Forget Quality"]
    assert metrics.forget_quality(full, retain) == pytest.approx(expected, rel=1e-9)
    assert metrics.forget_quality(retain, retain) == 1.0


def test_forget_quality_by_hand():
    # of the sorted ratios 1 2 3 | 4 5 6 no model's lie between the other's: the distance is 1, the exact p-value 2 / C(6, 3)
    assert metrics.forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(0.1)
    assert metrics.forget_quality([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0


def test_forget_quality_equals_scipy():
    draw = np.random.default_rng(0)
    for shift in (0.0, 0.5, 2.0):
        one, other = draw.normal(size=40), draw.normal(shift, size=30)
        other[:5] = one[:5]  # ties
        assert metrics.forget_quality(one, other) == scipy.stats.ks_2samp(one, other).pvalue


def test_targeted_efficacy_by_hand():
    assert metrics.targeted_forget_efficacy({"token_entropy": 0.5, "refusal_entailment_score": 1.0}) == pytest.approx(2 / 3)
    assert metrics.targeted_forget_efficacy({"token_entropy": 0.9, "refusal_entailment_score": 0.0}) == 0.0
    assert metrics.targeted_forget_efficacy({"token_entropy": 0.9}) is None


def test_a_tofu_evaluation_by_hand():
    """Two rows a set, every number of the way from losses to TOFU's three scores."""
    ln = math.log
    # losses per token: of the answer, of its paraphrase, of two wrong answers
    forget = [(ln(2), ln(2), [ln(4), ln(16)]), (ln(4), ln(8), [ln(2), ln(8)])]
    ratios = [metrics.truth_ratio(right, wrong) for _, right, wrong in forget]
    assert ratios == pytest.approx([1 / 4, 2])  # (1/8) / (1/2), (1/4) / (1/8)
    assert metrics.forget_truth_ratio(ratios) == pytest.approx((1 / 4 + 1 / 2) / 2)
    retained = [metrics.truth_ratio(ln(2), [ln(4), ln(4)]), metrics.truth_ratio(ln(2), [ln(2), ln(8)])]
    assert retained == pytest.approx([1 / 2, 1 / 2])
    assert metrics.retain_truth_ratio(retained) == pytest.approx(1 / 2)
    probability = [math.exp(-ln(2)), math.exp(-ln(4))]
    assert sum(probability) / 2 == pytest.approx(3 / 8)
    options = [metrics.option_probability(ln(2), [ln(4), ln(4)]), metrics.option_probability(ln(4), [ln(2), ln(4)])]
    assert options == pytest.approx([1 / 2, 1 / 4])  # (1/2) / 1, (1/4) / 1
    rouge = rouge_l_recall("the sea is cold", "cold is the sea")
    assert rouge == pytest.approx(1 / 2)  # "the sea" of four words
    sets = {
        "retain": {"rouge_l_recall": 1 / 2, "probability": 3 / 8, "truth_ratio": 1 / 2},
        "real_authors": {"rouge_l_recall": 1.0, "probability": 3 / 8, "truth_ratio": 1 / 2},
        "world_facts": {"rouge_l_recall": 1 / 2, "probability": 1 / 4, "truth_ratio": 1.0},
    }
    # 9 / (2 + 8/3 + 2 + 1 + 8/3 + 2 + 2 + 4 + 1)
    assert metrics.tofu_model_utility(sets) == pytest.approx(9 / (58 / 3))
    # the retain-only model's ratios lie all above: distance 1, exact p-value 2 / C(4, 2)
    assert metrics.forget_quality(ratios, [3.0, 4.0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        ([], 0.0),
        (["a"], 0.0),
        (["a", "b"], 1.0),
        (["The", "the", "the", "the"], (0.75 * math.log2(4 / 3) + 0.25 * 2) / 2),
        (["x"] * 50, 0.0),
    ],
)
def test_token_entropy_by_hand(tokens, value):
    assert metrics.token_entropy(tokens) == pytest.approx(value)


def test_option_probability_by_hand():
    # per-token probabilities 1/2 against 1/4, 1/8, 1/8: 0.5 / 1.0
    assert metrics.option_probability(math.log(2), [math.log(4), math.log(8), math.log(8)]) == pytest.approx(0.5)


def test_truth_ratio_by_hand():
    # wrong answers at 1/4 and 1/16 have the geometric mean 1/8; the right one has 1/2: ratio 1/4
    ratio = metrics.truth_ratio(math.log(2), [math.log(4), math.log(16)])
    assert ratio == pytest.approx(0.25)
    assert metrics.forget_truth_ratio([ratio, 1 / ratio]) == pytest.approx(0.25)
    assert metrics.retain_truth_ratio([ratio, 1 / ratio]) == pytest.approx(0.375)  # (0.75 + 0) / 2


def test_truth_ratio_of_a_collapsed_model_is_a_number():
    assert metrics.truth_ratio(5000.0, [1.0, 1.0]) == math.inf
    assert metrics.forget_truth_ratio([math.inf, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("correct", "memorization", "strength"),
    [
        ([True] * 4, 1.0, 1.0),
        ([False, True, True, True], 0.75, 0.75),  # one token of prefix is enough
        ([True, True, False, True], 0.75, 0.25),  # only the last token is completed
        ([True, True, True, False], 0.75, 0.25),  # OpenUnlearning's floor of 1/n
        ([False] * 5, 0.0, 0.2),
    ],
)
def test_memorization_by_hand(correct, memorization, strength):
    assert metrics.exact_memorization(correct) == memorization
    assert metrics.extraction_strength(correct) == pytest.approx(strength)


def test_utility_uses_what_is_there_and_tofu_wants_all_nine():
    sets = {name: dict.fromkeys(metrics.metrics_in("tofu.model_utility"), 0.5) for name in metrics.RETAINED_SETS}
    assert metrics.tofu_model_utility(sets) == pytest.approx(0.5)
    sets["retain"]["token_entropy"] = 1.0
    assert metrics.model_utility(sets) == pytest.approx(10 / (9 / 0.5 + 1))
    del sets["world_facts"]
    assert metrics.tofu_model_utility(sets) is None
    assert metrics.model_utility({}) is None
    assert metrics.untargeted_forget_efficacy({}) is None


def test_the_tables_name_what_records_and_summaries_have():
    fields = {field.name for field in dataclasses.fields(Record)}
    assert set(metrics.METRICS) <= fields
    assert {attack.field for attack in metrics.MEMBERSHIP.values()} <= fields
    entered = {name for metric in metrics.METRICS.values() for name in metric.aggregates}
    assert entered == {name for name in metrics.AGGREGATES if metrics.metrics_in(name)}
    assert len(metrics.metrics_in("model_utility")) == 6
    rises = ["probability", "rouge_l_recall", "extraction_strength", "exact_memorization", "recall_beyond_question"]
    assert metrics.coming_back() == rises
    assert metrics.in_tables()[:3] == ["probability", "rouge_l_recall", "recall_beyond_question"]


def test_the_tables_load_neither_torch_nor_scipy():
    """Reports read them in seconds."""
    code = """
import sys, types
package = types.ModuleType("dualoptim")  # without its __init__
package.__path__ = [sys.argv[1]]
sys.modules["dualoptim"] = package
import dualoptim.evaluation.metrics, dualoptim.evaluation.summary, dualoptim.evaluation.records
print({"torch", "scipy", "transformers", "accelerate"} & set(sys.modules))
"""
    root = Path(metrics.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True).stdout == "set()\n"


def test_what_a_score_needs_is_told_by_the_commands_of_today():
    known = [*metrics.METRICS.values(), *metrics.AGGREGATES.values(), *metrics.MEMBERSHIP.values()]
    texts = [one.needs or "" for one in known]
    assert any("dualoptim finetune" in text for text in texts)
    assert not [text for text in texts if ".py" in text or "python -m" in text]
