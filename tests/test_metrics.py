"""Evaluation arithmetic against the published aggregation, its helpers, and hand-worked cases."""

import math

import pytest
from conftest import shared_json

from dualoptim import metrics

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
    return sets


def test_eighteen_value_utility_and_forget_efficacy_equal_the_published_code():
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


@pytest.mark.parametrize("which", ["full", "retain90"])
def test_tofu_model_utility_from_its_published_logs(which):
    published = shared_json("oracles/tofu_published_metrics.json")["model_utility"]
    published = published[f"ft_epoch5_lr1e-05_llama2-7b_{which}_wd0.01"]["aggregate_eval_stat"]
    sets = sets_from_log(shared_json(f"oracles/tofu_logs/{which}/eval_log_aggregated.json"))
    assert metrics.tofu_model_utility(sets) == pytest.approx(published["Model Utility"], abs=1e-9)
    assert sets["forget"]["truth_ratio"] == pytest.approx(published["Truth Ratio Forget"], abs=1e-9)
    assert sets["real_authors"]["probability"] == pytest.approx(published["Prob. Real Authors"], abs=1e-9)


def test_rouge_recall_equals_the_published_helper():
    for case in shared_json("oracles/aggregates.json")["helpers"]["rouge"]:
        assert metrics.rouge_l_recall(case["gt"], case["gen"]) == pytest.approx(case["rougeL_recall"], abs=1e-12)


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
    sets = {name: dict.fromkeys(metrics.TOFU_METRICS, 0.5) for name in metrics.RETAINED_SETS}
    assert metrics.tofu_model_utility(sets) == pytest.approx(0.5)
    sets["retain"]["token_entropy"] = 1.0
    assert metrics.model_utility(sets) == pytest.approx(10 / (9 / 0.5 + 1))
    del sets["world_facts"]
    assert metrics.tofu_model_utility(sets) is None
    assert metrics.model_utility({}) is None
    assert metrics.untargeted_forget_efficacy({}) is None
