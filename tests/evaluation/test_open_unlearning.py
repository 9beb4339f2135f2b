"""Evaluations in OpenUnlearning's form: its names, and what its own code computes of given inputs."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from support import Bigram, rows_of

from dualoptim import EvalArgs, InputError
from dualoptim.data.batches import pack
from dualoptim.data.declaration import read_declaration
from dualoptim.data.prompts import Example
from dualoptim.data.rows import HOLDOUT
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import metrics, open_unlearning
from dualoptim.evaluation.benchmark_scores import check_scores
from dualoptim.evaluation.membership import MIN_K_SHARE, gradient_norms, membership_auc, min_k, privleak, zlib_score
from dualoptim.evaluation.open_unlearning import harmonic, likeness, suites_of, with_aggregates, write_suites
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.retain_only import read_retain_logs
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.evaluation.summary import Summary


@pytest.fixture(scope="module")
def oracle(shared_json):
    return shared_json("oracles/ou_metrics.json")


def examples_of(rows):
    """Its rows of token ids and labels (-100: not scored) as texts."""
    return [Example(row["ids"], next(n for n, label in enumerate(row["labels"]) if label >= 0)) for row in rows]


def scored(weight, rows):
    """What the pass says of each text under a bigram in float64."""
    accelerator = SimpleNamespace(is_main_process=False)
    loaded = SimpleNamespace(model=Bigram(torch.tensor(weight, dtype=torch.float64)), batch=pack, accelerator=accelerator)
    found = ScoringPass(loaded, EvalArgs(model="m")).score_texts("", [[text] for text in examples_of(rows)], MIN_K_SHARE)
    return loaded, [scores for (scores,) in found]


def test_memorization_of_rows_is_its_own(oracle):
    rows = oracle["memorization"]["rows"]
    for row, found in zip(rows, scored(oracle["W"], rows)[1], strict=True):
        assert found.loss == pytest.approx(row["avg_loss"], abs=1e-9)
        assert math.exp(-found.loss) == pytest.approx(row["prob"], abs=1e-9)
        answer = found.correct[:-1]  # it takes the last token for the end token
        assert metrics.exact_memorization(answer) == pytest.approx(row["exact_memorization"], abs=1e-6)
        assert metrics.extraction_strength(answer) == pytest.approx(row["extraction_strength"], abs=1e-9)


def test_its_attacks_read_of_rows_what_ours_do(oracle):
    attacks, rows = oracle["mia"]["attacks"], oracle["mia"]
    records = {}
    for name in ("forget", "holdout"):
        (loaded, found), (_, reference) = (scored(oracle[weight], rows[name]) for weight in ("W", "W_ref"))
        norms = [norm.item() for norm in gradient_norms(loaded, examples_of(rows[name]))]
        texts = [" ".join(f"w{token}" for token in row["labels"] if token >= 0) for row in rows[name]]
        read = {
            "loss": [one.loss for one in found],
            "zlib": [zlib_score(one.loss, text) for one, text in zip(found, texts, strict=True)],
            "min_k_0.4": [one.min_k for one in found],
            "min_k_plus_plus_0.4": [one.min_k_plus_plus for one in found],
            "gradnorm_p2": norms,
            "reference": [one.loss - other.loss for one, other in zip(found, reference, strict=True)],
        }
        for attack, values in read.items():
            close = 1e-6 if attack.startswith(("min_k", "gradnorm")) else 1e-9  # float32 there, and here
            assert values == pytest.approx(attacks[attack][name], abs=close), attack
        fields = {attack: attack.removesuffix("_0.4").removesuffix("_p2") for attack in read}
        made = [dict(zip(map(fields.get, read), values, strict=True)) for values in zip(*read.values(), strict=True)]
        records[name] = [Record("q", "a", **values) for values in made]
    ours = suites_of(Summary(), {"forget": records["forget"], HOLDOUT: records["holdout"]}, None)["TOFU"]
    for attack in read:
        result = ours[f"mia_{attack.removesuffix('_0.4').removesuffix('_p2')}"]
        assert result["agg_value"] == result["auc"] == pytest.approx(attacks[attack]["auc"], abs=1e-9)
        assert result["forget"]["value_by_index"]["0"]["score"] == pytest.approx(attacks[attack]["forget"][0], abs=1e-6)
    assert min_k([-1.0, -2.0, -3.0, -4.0, -5.0], 0.2) == 5.0


def test_truth_ratios_and_options_are_its_own(oracle):
    given = oracle["truth_ratio"]
    pairs = zip(given["correct_avg_loss"], given["wrong_avg_loss"], strict=True)
    rows = [Record("q", "a", loss=right, paraphrased_loss=right, perturbed_losses=wrong) for right, wrong in pairs]
    sets = dict.fromkeys(("forget", "retain", "real_authors", "world_facts"), rows)
    found = suites_of(Summary(), sets, None)["TOFU"]
    for name, aggregated in (("forget_truth_ratio", "closer_to_1_better"), ("wf_Truth_Ratio", "true_better")):
        assert found[name]["agg_value"] == pytest.approx(given[aggregated]["value"], abs=1e-9)
        scores = [row["score"] for row in found[name]["value_by_index"].values()]
        assert scores == pytest.approx(given[aggregated]["per_row"], abs=1e-9)
    normalised = found["ra_Q_A_Prob_normalised"]
    assert normalised["agg_value"] == pytest.approx(given["probability_w_options"]["value"], abs=1e-9)
    assert [row["prob"] for row in normalised["value_by_index"].values()] == pytest.approx(
        given["probability_w_options"]["per_row"], abs=1e-9
    )
    right, wrong = ([make(row) for row in rows] for make in (open_unlearning._right, open_unlearning._wrong))
    knows = [one / (one + other + 1e-10) for one, other in zip(right, wrong, strict=True)]
    assert knows == pytest.approx(given["prob_mean"]["per_row"], abs=1e-9)
    quality = metrics.forget_quality(given["closer_to_1_better"]["per_row"], given["forget_quality"]["retain_model_per_row"])
    assert quality == pytest.approx(given["forget_quality"]["p_value"], abs=1e-9)
    for case in oracle["privleak_rel_diff"]:
        assert privleak(case["auc"], case["retain_auc"]) == pytest.approx(case["privleak"], rel=1e-9)


def results(**values):
    return {name: {"agg_value": value} for name, value in values.items()}


def test_model_utility_is_the_harmonic_mean_of_nine_and_zero_with_a_zero(oracle, monkeypatch):
    names = open_unlearning._NINE
    for case in oracle["model_utility"]:
        given = iter(case["values"])
        made = {name: {"agg_value": next(given)} for name in names}
        monkeypatch.setattr(open_unlearning, "_measured", lambda _, made=made: dict(made))
        assert open_unlearning._tofu(Summary(), {})["model_utility"]["agg_value"] == pytest.approx(
            case["model_utility"], abs=1e-9
        )
    monkeypatch.setattr(open_unlearning, "_measured", lambda _: {names[0]: {"agg_value": 0.5}})
    assert "model_utility" not in open_unlearning._tofu(Summary(), {}), "one that is missing is not made up"


def test_the_aggregates_of_the_published_table(oracle):
    for case in oracle["uds"]["mem"]:
        made = results(
            extraction_strength=case["es"], exact_memorization=case["em"], forget_Q_A_PARA_Prob=case["paraphrase_prob"]
        )
        wrong = math.log(case["truth_ratio"] / (1 - case["truth_ratio"]))  # losses that give this share of the right answer
        rows = [Record("q", "a", paraphrased_loss=0.0, perturbed_losses=[wrong])]
        found = with_aggregates(made, {"forget": rows}, {}, None)["memorization"]["agg_value"]
        if case["mem"] == "None":  # there the function has no value, and the table one near zero
            assert found == pytest.approx(0, abs=1e-11)
        else:
            assert found == pytest.approx(case["mem"], abs=1e-9)
    for case in oracle["uds"]["s_mia"]:
        assert [likeness(*pair) for pair in zip(case["auc"], case["retain_auc"], strict=True)] == pytest.approx(case["s_mia"])
        names = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
        made, retain = (dict(zip(names, case[key], strict=True)) for key in ("auc", "retain_auc"))
        found = with_aggregates(results(**made), {}, retain, None)["privacy"]["agg_value"]
        assert found == pytest.approx(case["privacy_mia (harmonic mean, +1e-12)"], abs=1e-9)
    for row in oracle["uds"]["overall"]:
        assert harmonic(*(row[f"one_minus_{name}"] for name in ("es", "em", "paraprob", "truth"))) == pytest.approx(
            row["mem"], abs=1e-9
        )
        assert harmonic(row["privacy_mia"], row["uds"]) == pytest.approx(row["privacy"], abs=1e-9)
        clean = {"forget": {"clean_probability": row["fluency"]}}
        whole = harmonic(row["model_utility"], row["fluency"])
        before = Summary(sets=clean, tofu={"model_utility": 1 / (2 / row["full_utility"] - 1 / row["fluency"])})
        made = results(model_utility=row["model_utility"], forget_Q_A_gibberish=row["fluency"])
        found = with_aggregates(made, {}, {}, before)
        assert found["utility"]["agg_value"] == pytest.approx(whole) == pytest.approx(row["utility"], abs=1e-9)
        assert found["utility_rel"]["agg_value"] == pytest.approx(row["utility_rel"], abs=1e-9)
        assert harmonic(row["mem"], row["privacy"], row["utility_rel"]) == pytest.approx(row["overall"], abs=1e-9)
        assert "overall" not in found, "memorization and privacy were not measured"


def test_overall_is_the_harmonic_mean_of_the_three():
    names = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
    made = results(extraction_strength=0.5, exact_memorization=0.5, forget_Q_A_PARA_Prob=0.5, **dict.fromkeys(names, 0.6))
    made |= results(model_utility=0.3, forget_Q_A_gibberish=0.3)
    rows = [Record("q", "a", paraphrased_loss=1.0, perturbed_losses=[1.0])]
    before = Summary(sets={"forget": {"clean_probability": 0.6}}, tofu={"model_utility": 0.6})
    found = with_aggregates(made, {"forget": rows}, dict.fromkeys(names, 0.5), before)
    # 1/2 of the answers are remembered; |0.6 - 0.5| / 0.5 from the retain-only model; half of the utility is left
    assert found["overall"]["agg_value"] == pytest.approx(3 / (1 / 0.5 + 1 / 0.8 + 1 / 0.5), abs=1e-9)


def test_every_evaluation_writes_its_form_beside_ours(evaluated, tmp_path):
    folder, summary = evaluated
    log, short = (json.loads((folder / "eval" / f"TOFU_{name}.json").read_text()) for name in ("EVAL", "SUMMARY"))
    assert short == {name: result["agg_value"] for name, result in log.items()}
    assert list(log) == sorted(log)
    sets = summary.sets
    for name, ours in (("forget", "forget"), ("retain", "retain"), ("ra", "real_authors"), ("wf", "world_facts")):
        rows = rows_of(folder, ours)
        assert short[f"{name}_Q_A_ROUGE"] == pytest.approx(sets[ours]["rouge_l_recall"], abs=1e-12)
        values = log[f"{name}_Q_A_Prob"]["value_by_index"]
        assert [values[str(n)]["avg_loss"] for n in range(len(rows))] == [row["loss"] for row in rows]
    assert short["forget_Q_A_Prob"] == pytest.approx(sets["forget"]["probability"], abs=1e-12)
    assert short["wf_Q_A_Prob_normalised"] == pytest.approx(sets["world_facts"]["probability"], rel=1e-6)
    assert short["forget_truth_ratio"] == pytest.approx(sets["forget"]["truth_ratio"], rel=1e-6)  # 1e-10 below
    assert short["model_utility"] == pytest.approx(summary.tofu["model_utility"], rel=1e-6)
    assert short["extraction_strength"] == sets["forget"]["extraction_strength"]
    assert {name: value for name, value in short.items() if name.startswith("mia_")} == {
        name: value for name, value in summary.privacy.items() if name.startswith("mia_")
    }
    assert "memorization" in short
    not_measured = {"forget_quality", "privleak", "privacy", "forget_Q_A_gibberish", "utility", "overall", "mia_reference"}
    assert not not_measured & short.keys()
    assert "question" not in (folder / "eval" / "TOFU_EVAL.json").read_text()
    logs = read_retain_logs(str(folder / "eval" / "TOFU_EVAL.json"))  # as it reads that of its retain-only models
    assert logs.truth_ratios == pytest.approx(read_retain_logs(str(folder)).truth_ratios, rel=1e-6)
    assert logs.aucs == {name: auc for name, auc in summary.privacy.items() if name in metrics.MEMBERSHIP}


def test_with_a_retain_only_model_privacy_is_measured_too(evaluated, taught, tiny, tmp_path):
    folder, _ = evaluated
    args = EvalArgs(model=str(tiny), data="demo", eval_rows=3, max_new_tokens=2, output_dir=str(tmp_path))
    once = evaluate(dataclasses.replace(args, retain_logs=str(folder / "eval" / "TOFU_EVAL.json")))
    short = json.loads((tmp_path / "eval" / "TOFU_SUMMARY.json").read_text())
    assert {"forget_quality", "privleak", "privacy", "memorization"} <= short.keys()
    assert short["forget_quality"] == once.tofu["forget_quality"]
    again = evaluate(dataclasses.replace(args, overwrite=True, texts=False))
    assert "privacy" not in json.loads((tmp_path / "eval" / "TOFU_SUMMARY.json").read_text())
    assert again.sets["forget"] == once.sets["forget"]


def test_losses_that_are_not_finite_are_not_written(tmp_path):
    rows = [Record("q", "a", loss=math.inf, rouge_l_recall=0.5, paraphrased_loss=math.nan, perturbed_losses=[1.0])]
    found = suites_of(Summary(), {"forget": rows}, None)
    assert set(found["TOFU"]) == {"forget_Q_A_ROUGE", "forget_Q_A_PERT_Prob"}
    rows = [dataclasses.replace(rows[0], loss=1.0, paraphrased_loss=1.0, perturbed_losses=[math.nan])]
    made = results(extraction_strength=0.5, exact_memorization=0.5, forget_Q_A_PARA_Prob=0.5)
    assert with_aggregates(made, {"forget": rows}, {}, None) == made
    write_suites(tmp_path, found, Summary(general={"mmlu": {"acc": 0.25}}))
    assert json.loads((tmp_path / "LMEval_SUMMARY.json").read_text()) == {"mmlu/acc": 0.25}


def test_a_benchmark_says_what_it_is_called_there():
    muse = read_declaration("muse-books")
    check_scores(muse)
    knows = [Record("q", "a", rouge_l_recall=0.5, rouge_l_f1=0.25), Record("q", "a", rouge_l_recall=1.0, rouge_l_f1=0.75)]
    says = [dataclasses.replace(one, extraction_strength=0.1, exact_memorization=0.2) for one in knows]
    passages = {"members": [Record(None, "p", loss=1.0, min_k=1.0)], HOLDOUT: [Record(None, "p", loss=2.0, min_k=0.5)]}
    records = {"forget": says, "forget_knowmem": knows, "retain": knows, **passages}
    ((suite, found),) = suites_of(Summary(privacy={"privleak": -3.0}), records, muse).items()
    assert suite == "MUSE"
    assert found["retain_knowmem_ROUGE"] == {
        "agg_value": 0.5,
        "value_by_index": {
            "0": {"rougeL_f1": 0.25, "rougeL_recall": 0.5},
            "1": {"rougeL_f1": 0.75, "rougeL_recall": 1.0},
        },
    }
    values = {name: result["agg_value"] for name, result in found.items()}
    named = {"forget_verbmem_ROUGE": 0.5, "forget_knowmem_ROUGE": 0.5, "retain_knowmem_ROUGE": 0.5, "privleak": -3.0}
    assert values == named | {"extraction_strength": 0.1, "exact_memorization": 0.2, "mia_loss": 1.0, "mia_min_k": 0.0}
    assert suites_of(Summary(), records, read_declaration("lume")) == {}
    wrong = dataclasses.replace(muse.open_unlearning, metrics={"privleak": "privacy.privleak"})
    with pytest.raises(InputError, match=r"open_unlearning.metrics.privleak is 'privacy.privleak'; give SET.METRIC of forget,"):
        check_scores(dataclasses.replace(muse, open_unlearning=wrong))
    assert membership_auc([1.0], [2.0]) == 1.0
