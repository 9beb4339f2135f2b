"""Records of rows on disk: which are believed, how lines end, and that a record comes back as it was."""

import dataclasses
import json

import pytest

from dualoptim import EvalArgs, InputError
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import measure
from dualoptim.evaluation.records import Finished, Record, hand_on, read_records
from dualoptim.report import ReportArgs, report


def test_what_was_not_measured_is_absent_but_a_question_is_null():
    record = Record(None, "A passage.", loss=0.5, tokens=3)
    assert list(record.to_json().items()) == [("question", None), ("answer", "A passage."), ("loss", 0.5), ("tokens", 3)]
    assert Record.from_json(record.to_json(), "line 1") == record


def test_a_line_that_is_no_record_is_named():
    with pytest.raises(ValueError, match=r"line 7\.loss is not a number"):
        Record.from_json({"question": "Who?", "answer": "I.", "loss": "0.5"}, "line 7")
    with pytest.raises(ValueError, match="line 7 has no answer"):
        Record.from_json({"question": "Who?"}, "line 7")


def test_a_set_is_finished_for_its_fingerprint_alone(tmp_path):
    marks = {"forget": {"weights": "a", "inputs": "b"}}
    records = [Record("Who?", "I.", loss=0.5)]
    Finished(tmp_path, marks).add("forget", records)
    assert Finished(tmp_path, marks).records == {"forget": records}
    assert Finished(tmp_path, {"forget": {"weights": "c", "inputs": "b"}}).records == {}
    assert read_records(tmp_path / "forget.jsonl") == records


def test_a_finished_set_is_kept_and_never_for_other_weights(taught, tiny, tmp_path, monkeypatch):
    args = EvalArgs(model=str(taught), data="demo", eval_rows=3, output_dir=str(tmp_path))
    whole = evaluate(args)
    folder, computed = tmp_path / "eval", []
    compute = measure.set_records

    def counted(scoring, name, rows):
        computed.append(name)
        return compute(scoring, name, rows)

    monkeypatch.setattr(measure, "set_records", counted)
    with pytest.raises(InputError, match="is an earlier result"):
        evaluate(args)  # it had ended
    (folder / "summary.json").unlink()  # as if it had been interrupted after three sets
    marks = json.loads((folder / "finished.json").read_text())
    (folder / "finished.json").write_text(json.dumps({name: mark for name, mark in marks.items() if name != "world_facts"}))
    assert evaluate(args) == whole
    assert computed == ["world_facts"]
    (folder / "summary.json").unlink()
    for changed in ({"model": str(tiny)}, {"eval_rows": 2}, {"max_new_tokens": 5}):
        with pytest.raises(InputError, match="is an earlier result"):
            evaluate(dataclasses.replace(args, **changed))
    rows = (folder / "retain.jsonl").read_text()
    (folder / "retain.jsonl").write_text(rows.replace("0.", "1.", 1))
    computed.clear()
    assert evaluate(args) == whole  # the changed file is not believed
    assert computed == ["retain"]
    assert evaluate(dataclasses.replace(args, overwrite=True)) == whole


def test_lines_end_at_line_feeds_alone(taught, tmp_path, monkeypatch):
    """A broken model writes anything, such as Unicode's own line separators, and its rows are read again."""
    monkeypatch.setattr(measure, "generate", lambda scoring, label, asked: ["a\u2028b\x85c\x1ed"] * len(asked))
    args = EvalArgs(model=str(taught), data="demo", eval_rows=2, output_dir=str(tmp_path))
    whole = evaluate(args)
    (tmp_path / "eval" / "summary.json").unlink()
    assert evaluate(args) == whole
    again = evaluate(dataclasses.replace(args, retain_logs=str(tmp_path), output_dir=str(tmp_path / "again")))
    assert again["tofu"]["forget_quality"] == 1.0
    report(ReportArgs(runs=(str(tmp_path),)))
    assert "report.html" in {path.name for path in tmp_path.iterdir()}


def test_what_one_evaluation_has_finished_another_takes_if_it_is_the_same(tmp_path):
    marks = {name: {"weights": "a", "inputs": name} for name in ("forget", "retain")}
    earlier, rows = Finished(tmp_path / "one", marks), [Record("Who?", "I.", loss=0.5)]
    for name in marks:
        earlier.add(name, rows)
    hand_on(tmp_path / "one", tmp_path / "two", ["retain", "holdout"])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["finished.json", "retain.jsonl"]
    assert Finished(tmp_path / "two", marks).records == {"retain": rows}
    assert Finished(tmp_path / "two", {"retain": {"weights": "b", "inputs": "retain"}}).records == {}
    hand_on(tmp_path / "one", tmp_path / "two", ["forget"])  # begun before: what is there is its own
    assert not (tmp_path / "two" / "forget.jsonl").exists()
    hand_on(tmp_path / "none", tmp_path / "three", ["forget"])
    assert not (tmp_path / "three").exists()
