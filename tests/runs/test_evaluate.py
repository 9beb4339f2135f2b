"""Evaluation as a whole: the files that it leaves, and what its summary says of a model that knows its rows."""

import json

import pytest
import torch
from support import rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs
from dualoptim.evaluate import evaluate


def test_the_files_and_the_summary(evaluated):
    folder, summary = evaluated
    assert sorted(path.name for path in (folder / "eval").iterdir()) == [
        "TOFU_EVAL.json",
        "TOFU_SUMMARY.json",
        "config.yaml",
        "finished.json",
        "forget.jsonl",
        "holdout.jsonl",
        "real_authors.jsonl",
        "retain.jsonl",
        "summary.json",
        "world_facts.jsonl",
    ]
    assert json.loads((folder / "eval" / "summary.json").read_text()) == summary
    assert summary["rows"] == dict.fromkeys(("forget", "retain", "real_authors", "world_facts", "holdout"), 12)
    computed = {"rouge_l_recall", "recall_beyond_question", "probability", "truth_ratio", "token_entropy"}
    computed |= {"extraction_strength", "exact_memorization"}
    assert all(set(values) == computed for values in summary["sets"].values())
    assert set(summary["skipped"]) == {
        "clean_probability",
        "cosine_similarity",
        "entailment_score",
        "targeted_forget_efficacy",
        "tofu.forget_quality",
        "privacy.mia_gradnorm",
        "privacy.mia_reference",
        "privacy.privleak",
        "retain_unseen",
    }
    assert "--retain-logs" in summary["skipped"]["tofu.forget_quality"]  # and how to get it
    assert summary["tofu"]["forget_truth_ratio"] == summary["sets"]["forget"]["truth_ratio"]
    for name, values in summary["sets"].items():
        for metric, value in values.items():
            if metric != "truth_ratio":
                rows = [row[metric] for row in rows_of(folder, name)]
                assert value == pytest.approx(sum(rows) / len(rows)), (name, metric)


def test_a_model_that_knows_its_rows_scores_high(evaluated):
    _, summary = evaluated
    for name in ("forget", "retain"):
        assert summary["sets"][name]["probability"] > 0.9
        assert summary["sets"][name]["rouge_l_recall"] > 0.9
        assert summary["sets"][name]["exact_memorization"] > 0.9
    assert summary["tofu"]["model_utility"] > 0.5
    assert summary["untargeted_forget_efficacy"] < 0.4


def test_rows_without_compared_answers_are_skipped_by_name(taught, tmp_path):
    rows = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}.", "task_id": 1} for n in range(3)]
    (tmp_path / "forget01.json").write_text("\n".join(map(json.dumps, rows)))
    args = EvalArgs(model=str(taught), data=str(tmp_path), split="forget01", output_dir=str(tmp_path / "out"), max_new_tokens=5)
    summary = evaluate(args)
    assert set(summary["sets"]) == {"forget"}
    assert "truth_ratio" not in summary["sets"]["forget"]
    assert {"forget.truth_ratio", "retain", "real_authors", "world_facts"} <= set(summary["skipped"])
    assert "model_utility" not in summary
    assert summary["tofu"] == {}
    assert {"model_utility", "tofu.model_utility"} <= set(summary["skipped"])


def test_a_broken_model_is_reported_not_averaged(taught, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught), AutoTokenizer.from_pretrained(taught)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    summary = evaluate(
        EvalArgs(model=str(tmp_path / "nan"), data="demo", eval_rows=2, max_new_tokens=2, output_dir=str(tmp_path / "out"))
    )
    assert "probability" not in summary["sets"]["forget"]
    assert summary["skipped"]["forget.probability"] == "the model's losses are not finite"


def test_a_model_of_ours_is_judged_against_the_one_before_where_the_same_rows_were_measured(demo_run, tmp_path):
    model = str(demo_run.tasks[0].model)
    whole = evaluate(EvalArgs(model=model, data="demo", output_dir=str(tmp_path / "whole")))
    assert whole["verdict"]["against"] == "the model before unlearning"
    assert whole["verdict"]["kept"] == "yes"
    part = evaluate(EvalArgs(model=model, data="demo", eval_rows=5, output_dir=str(tmp_path / "part")))
    assert part["verdict"]["against"] == "fixed levels"
