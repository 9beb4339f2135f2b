"""Evaluations of a retain-only model in their three forms, and what they give the summary."""

import dataclasses
import json
import math

import pytest

from dualoptim import EvalArgs, InputError
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.membership import privleak
from dualoptim.evaluation.metrics import forget_quality
from dualoptim.evaluation.retain_only import read_retain_logs


@pytest.fixture(scope="module")
def evaluated(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    args = EvalArgs(model=str(taught), data="demo", eval_rows=8, max_new_tokens=4, output_dir=str(folder))
    return args, evaluate(args)


def ratios_of(folder):
    return [json.loads(line)["truth_ratio"] for line in (folder / "forget.jsonl").read_text().splitlines()]


def test_a_retain_model_is_evaluated_beside(evaluated, tiny, tmp_path):
    args, alone = evaluated
    summary = evaluate(dataclasses.replace(args, retain_model=str(tiny), output_dir=str(tmp_path)))
    assert summary["sets"] == alone["sets"]
    beside = tmp_path / "eval" / "retain_only"
    theirs = json.loads((beside / "summary.json").read_text())
    assert summary["tofu"]["forget_quality"] == forget_quality(ratios_of(tmp_path / "eval"), ratios_of(beside))
    assert summary["privacy"]["privleak"] == privleak(alone["privacy"]["mia_min_k"], theirs["privacy"]["mia_min_k"])
    assert summary["retain_only"]["sets"] == theirs["sets"]
    # the same from its folder
    again = evaluate(dataclasses.replace(args, retain_logs=str(beside), output_dir=str(tmp_path / "again")))
    assert again["tofu"] == summary["tofu"]
    assert again["privacy"] == summary["privacy"]
    assert again["retain_only"]["sets"] == theirs["sets"]


def test_the_same_model_is_like_itself(evaluated, tmp_path):
    args, _ = evaluated
    summary = evaluate(dataclasses.replace(args, retain_logs=args.output_dir, output_dir=str(tmp_path)))
    assert summary["tofu"]["forget_quality"] == 1.0
    assert summary["privacy"]["privleak"] == 0.0


def test_tofus_published_log(shared):
    logs = read_retain_logs(str(shared("oracles/tofu_logs/retain90/eval_log_aggregated.json")))
    full = read_retain_logs(str(shared("oracles/tofu_logs/full/eval_log_aggregated.json")))
    assert len(logs.truth_ratios) == 300
    assert forget_quality(full.truth_ratios, logs.truth_ratios) == pytest.approx(1.834066410994743e-21, rel=1e-9)


def test_the_other_frameworks_log(evaluated, tmp_path):
    args, _ = evaluated
    log = {
        "forget_truth_ratio": {"agg_value": 0.6, "value_by_index": {str(n): {"score": 0.5 + n / 10} for n in range(8)}},
        "mia_min_k": {"auc": 0.4, "agg_value": 0.4, "forget": {}, "holdout": {}},
    }
    for key in ("forget_truth_ratio", "forget_Truth_Ratio"):  # both spellings are about
        path = tmp_path / key / "TOFU_EVAL.json"
        path.parent.mkdir()
        path.write_text(json.dumps({key: log["forget_truth_ratio"], "mia_min_k": log["mia_min_k"]}))
        logs = read_retain_logs(str(path))
        assert logs.truth_ratios == [0.5 + n / 10 for n in range(8)]
        assert logs.min_k_auc == 0.4
    summary = evaluate(dataclasses.replace(args, retain_logs=str(path), output_dir=str(tmp_path / "out")))
    own = ratios_of(tmp_path / "out" / "eval")
    assert summary["tofu"]["forget_quality"] == forget_quality(own, logs.truth_ratios)
    assert summary["privacy"]["privleak"] == pytest.approx(privleak(summary["privacy"]["mia_min_k"], 0.4))


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "not json",
        '{"forget_truth_ratio": {"agg_value": 1}}',
        '{"eval_log_forget.json": {"avg_paraphrased_loss": [], "average_perturb_loss": []}}',
        '{"eval_log_forget.json": {"avg_paraphrased_loss": [1], "average_perturb_loss": [[]]}}',
    ],
)
def test_other_files_are_refused_before_anything_is_written(evaluated, tmp_path, content):
    args, _ = evaluated
    (tmp_path / "log.json").write_text(content)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="--retain-logs"):
        evaluate(dataclasses.replace(args, retain_logs=str(tmp_path / "log.json"), output_dir=str(out)))
    assert not out.exists()


@pytest.mark.parametrize("rows", [None, '{"truth_ratio": ', '{"question": "?"}', ""])
def test_folders_without_truth_ratios_are_refused(evaluated, tmp_path, rows):
    args, _ = evaluated
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "summary.json").write_text("{}")
    if rows is not None:
        (tmp_path / "logs" / "forget.jsonl").write_text(rows)
    with pytest.raises(InputError, match=r"forget\.jsonl has no truth ratios"):
        evaluate(dataclasses.replace(args, retain_logs=str(tmp_path / "logs"), output_dir=str(tmp_path / "out")))


def test_an_older_summary_has_no_privacy(evaluated, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "forget.jsonl").write_text('{"truth_ratio": 0.5}\n')
    assert read_retain_logs(str(tmp_path)).min_k_auc is None
    log = {"forget_truth_ratio": {"value_by_index": {"0": {"score": 0.5}}}, "mia_min_k": None}
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(log))
    assert read_retain_logs(str(tmp_path / "TOFU_EVAL.json")).min_k_auc is None


def test_rows_without_losses_are_left_out_and_rows_that_stand_twice_refused(tmp_path):
    losses = {"avg_paraphrased_loss": {"0": 1.0, "1": None, "2": 3.0}, "average_perturb_loss": {"0": [1.0], "1": [2.0]}}
    (tmp_path / "log.json").write_text(json.dumps({"eval_log_forget.json": losses}))
    assert read_retain_logs(str(tmp_path / "log.json")).truth_ratios == [1.0]
    (tmp_path / "log.json").write_text('{"forget_truth_ratio": {"value_by_index": {"0": {"score": 1}, "0": {"score": 2}}}}')
    with pytest.raises(InputError, match="'0' stands twice in one object"):
        read_retain_logs(str(tmp_path / "log.json"))
    (tmp_path / "summary.json").write_text('{"privacy": {"mia_min_k": NaN}}')
    (tmp_path / "forget.jsonl").write_text('{"truth_ratio": 0.5}')
    with pytest.raises(InputError, match=r"its summary\.json is none .*; evaluate that model again"):
        read_retain_logs(str(tmp_path))


def test_a_folder_without_a_summary_is_refused(evaluated, tmp_path):
    args, _ = evaluated
    with pytest.raises(InputError, match=r"has no summary\.json"):
        evaluate(dataclasses.replace(args, retain_logs=str(tmp_path), output_dir=str(tmp_path / "out")))


def ratio_log(*scores):
    return {"forget_truth_ratio": {"value_by_index": {str(row): {"score": score} for row, score in enumerate(scores)}}}


def test_rows_without_a_score_are_left_out(tmp_path):
    (tmp_path / "log.json").write_text("\ufeff" + json.dumps(ratio_log(0.5, None, 0.75)), encoding="utf-8")
    assert read_retain_logs(str(tmp_path / "log.json")).truth_ratios == [0.5, 0.75]
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "forget.jsonl").write_text('{"truth_ratio": null}\n{"truth_ratio": 0.25}\n{"question": "?"}\n')
    assert read_retain_logs(str(tmp_path)).truth_ratios == [0.25]
    (tmp_path / "log.json").write_text(json.dumps(ratio_log(0.5) | {"mia_min_k": {"agg_value": None}}))
    assert read_retain_logs(str(tmp_path / "log.json")).min_k_auc is None


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (ratio_log(0.5, math.nan), "row 1 has the truth ratio nan, which is no number"),
        (ratio_log(0.5, 0.5, "0.6"), "row 2 has the truth ratio '0.6', which is no number"),
        (ratio_log(0.5, -1), "row 1 has the truth ratio -1"),
        (ratio_log(10**4000), "row 0 has the truth ratio 1000"),
        (ratio_log(0.5) | {"mia_min_k": {"auc": 7.0}}, "mia_min_k is 7.0"),
        (
            {"eval_log_forget.json": {"avg_paraphrased_loss": [1.0], "average_perturb_loss": [[True]]}},
            "row 0 has the loss True",
        ),
        (ratio_log(True), "row 0 has the truth ratio True"),
        (ratio_log([0.5]), r"row 0 has the truth ratio \[0.5\]"),
        (ratio_log(None, None), "no truth ratios of a forget set"),
        (ratio_log(0.5) | {"mia_min_k": {"agg_value": "0.5"}}, "mia_min_k is '0.5', which is no number"),
        (ratio_log(0.5) | {"mia_min_k": {"auc": math.nan}}, "mia_min_k is nan, which is no number"),
        (
            {"eval_log_forget.json": {"avg_paraphrased_loss": {"a": math.nan}, "average_perturb_loss": {"a": [1.0]}}},
            "row a has the loss nan",
        ),
        (
            {"eval_log_forget.json": {"avg_paraphrased_loss": [1.0], "average_perturb_loss": [[1.0, math.nan]]}},
            "row 0 has the loss nan",
        ),
        (
            {"eval_log_forget.json": {"avg_paraphrased_loss": [None], "average_perturb_loss": [[1.0]]}},
            "its forget rows have no losses of paraphrased and perturbed answers",
        ),
    ],
)
def test_a_score_that_is_no_number_is_named_with_its_row(log, message, tmp_path):
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(InputError, match=message) as error:
        read_retain_logs(str(tmp_path / "log.json"))
    assert str(error.value).startswith(f"--retain-logs {tmp_path / 'log.json'}: ")
    assert "\n" not in str(error.value)
