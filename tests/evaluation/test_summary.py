"""The summary of an evaluation: as a mapping, from and to its file, and how it is computed."""

import json
import math

import pytest

from dualoptim import InputError
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.metrics import METRICS, Metric
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summarize import set_scores, summarize
from dualoptim.evaluation.summary import Attacks, Point, Quantized, Relearned, RetainOnly, Summary

WHOLE = Summary(
    sets={"forget": {"probability": 0.25}},
    rows={"forget": 2},
    model_utility=0.5,
    tofu={"forget_quality": 0.75},
    retain_only=RetainOnly("runs/retain", {"forget": {"probability": 0.125}}),
    skipped={"retain": "no --retain-file"},
    attacks=Attacks(
        quantize={"8": Quantized("rounded", {"forget": {"probability": 0.5}}, {"probability": 0.25})},
        relearn=Relearned("2 rows", 2, [Point(0, {"forget": {}}), Point(4, {"forget": {}}, stopped="not finite")]),
    ),
)


def test_a_summary_is_the_mapping_that_its_file_holds(tmp_path):
    WHOLE.write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == WHOLE
    assert WHOLE["sets"]["forget"]["probability"] == 0.25
    assert "general" not in WHOLE
    assert WHOLE["attacks"]["quantize"]["8"]["how"] == "rounded"
    assert WHOLE["retain_only"]["from"] == "runs/retain"
    assert list(WHOLE["attacks"]["relearn"]["curve"][1]) == ["step", "sets", "stopped"]
    again = Summary.read(tmp_path / "summary.json")
    assert again == WHOLE
    assert again.attacks == WHOLE.attacks
    assert again.score("tofu.forget_quality") == 0.75
    assert again.score("targeted_forget_efficacy") is None


def test_the_peak_of_relearning_is_where_most_came_back_of_what_was_not_taught():
    known = [(0, 0.9, 0.6), (1, 0.1, 0.2), (2, 0.8, 0.4), (3, 0.2, 0.4), (4, 0.9, 0.3)]
    curve = [Point(n, {"forget": {"probability": p}, "forget_unseen": {"probability": q}}) for n, p, q in known]
    relearned = Relearned(curve=curve, retain_only=curve[:2])
    assert (relearned.counts, relearned.peak, relearned.peak_retain_only) == ("forget_unseen", curve[3], curve[1])
    whole = Relearned(curve=[Point(n, {"forget": {"probability": p}}) for n, p, _ in known])
    assert (whole.counts, whole.peak.step) == ("forget", 4)
    assert Relearned(curve=curve[:1]).peak == curve[0]  # no step could be taken
    assert Relearned().peak is None


def test_every_part_of_a_summary_may_be_absent(tmp_path):
    (tmp_path / "summary.json").write_text('{"attacks": {"quantize": {"4": {}}}, "of a later version": 1}')
    summary = Summary.read(tmp_path / "summary.json")
    assert summary.sets == summary.privacy == {}
    assert summary.attacks == Attacks(quantize={"4": Quantized()})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"sets": []}', "sets is not an object"),
        ('{"sets": {"forget": {"probability": "high"}}}', r"sets\.forget\.probability is not a number"),
        ('{"attacks": {"relearn": {"curve": [{"step": 0.5, "sets": {}}]}}}', r"curve\[0\]\.step is not a whole number"),
        ('{"attacks": {"relearn": {"curve": [{"sets": {}}]}}}', r"curve\[0\] has no step"),
    ],
)
def test_a_malformed_summary_is_named(tmp_path, text, why):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(InputError, match=why) as refused:
        Summary.read(path)
    assert str(path) in str(refused.value)


def test_a_truth_ratio_without_bound_is_a_number():
    record = Record("Who?", "I.", truth_ratio=math.inf, probability=0.5)
    missing = {}
    assert set_scores("forget", [record], missing)["truth_ratio"] == 0.0
    assert set_scores("retain", [record], missing)["truth_ratio"] == 0.0
    assert missing == {}


def test_what_is_missing_says_why():
    records = {"forget": [Record("Who?", "I.", probability=0.5), Record("What?", "It.", probability=math.nan)]}
    summary = summarize(records, {"retain": "no --retain-file"}, Judges(), None)
    assert summary.sets == {"forget": {}}
    assert summary.skipped["forget.probability"] == "the model's losses are not finite"
    assert summary.skipped["forget.truth_ratio"] == METRICS["truth_ratio"].needs
    assert "--sentence-encoder" in summary.skipped["cosine_similarity"]
    assert "--holdout-file" in summary.skipped["privacy"]
    assert "--retain-model" in summary.skipped["tofu.forget_quality"]


def test_a_metric_of_rows_is_one_entry(monkeypatch):
    monkeypatch.setitem(METRICS, "length", Metric("length of the answer", "fall", of=lambda record: len(record.answer)))
    assert set_scores("forget", [Record("Who?", "I."), Record("Who?", "You.")], {})["length"] == 3
