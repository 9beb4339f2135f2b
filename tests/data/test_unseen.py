"""Kept rows that no step sees, of every kind of data."""

import json

import pytest

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.data.own import open_source
from dualoptim.data.rows import Row
from dualoptim.data.unseen import held_out, kept_rows, known_to_train, said, trained_on

DEMO = EvalArgs(model="org/model", data="demo")


def test_rows_are_told_apart_by_their_questions_and_passages_by_their_whole_text():
    assert said(Row("Who is  it?\n", "Ann.")) == said(Row("Who is it?", "Bob."))
    assert said(Row(None, "It rains.")) != said(Row(None, "It rains. It pours."))


def test_half_of_the_measured_rows_of_the_demo_are_trained_on_and_those_that_are_held_out_are_not():
    source = open_source(DEMO)
    measured = {said(row) for row in source.evaluation_sets("forget05", 1)[0]["retain"]}
    unseen = {said(row) for row in source.rows("retain_unseen")}
    assert len(measured & unseen) == 50
    assert measured - trained_on(DEMO, source, [1], 1) == measured & unseen
    args = EvalArgs(model="org/model", data="demo", retain_held_out=0.25)
    out = held_out(args, source, [1])
    assert len(out) == 25
    assert measured - trained_on(args, source, [1], 1) == out | measured & unseen
    kept = kept_rows(args, source, [1], 1)
    assert len(kept) == len(source.retain_rows("forget05", [1])) - len(out - unseen)
    # the same rows for every task, and a larger number holds a smaller one's
    assert held_out(args, source, [1, 2, 3]) == out
    assert held_out(EvalArgs(model="org/model", data="demo", retain_held_out=3), source, [1]) < out


def test_what_an_earlier_task_kept_and_what_is_forgotten_counts_as_trained_on():
    source = open_source(DEMO)
    trained = trained_on(DEMO, source, [1, 2], 2)
    assert {said(row) for row in source.task_rows("forget05", 2)} < trained
    assert trained_on(DEMO, source, [1, 2], 1) == trained  # task 2 was kept while task 1 was forgotten


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (6, "--retain-held-out 6: 6 rows of the retain set are measured; hold out at least one of them, and fewer than all"),
        (0.01, "--retain-held-out 0.01: 6 rows of the retain set are measured; hold out at least one"),
    ],
)
def test_what_cannot_be_held_out_is_refused_with_the_numbers_that_can(tmp_path, number, why):
    for name, count in (("forget", 2), ("retain", 6)):
        rows = (json.dumps({"question": f"Which {name} is {n}?", "answer": "It."}) for n in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    own = {"model": "org/model", "forget_file": str(tmp_path / "forget.jsonl"), "retain_file": str(tmp_path / "retain.jsonl")}
    args = UnlearnArgs(**own, retain_held_out=number)
    with pytest.raises(InputError, match=why):
        kept_rows(args, open_source(args), [1], 1)
    nothing = {"forget_losses": ("NPO+none",), "retain_held_out": 0.5}
    alone = UnlearnArgs(model="org/model", forget_file=own["forget_file"], **nothing)
    with pytest.raises(InputError, match=r"0.5: no set retain is measured \(no --retain-file\); give one, or drop it"):
        kept_rows(alone, open_source(alone), [1], 1)


def test_a_benchmark_that_measures_no_set_retain_is_told_how_to_come_by_one(tmp_path):
    """What is kept may be measured by another name."""
    (tmp_path / "rows.csv").write_text("question,answer\nWho?,Ann.\nWhat?,It.\nWhere?,Here.\n")
    rows = "rows:\n  forget: {file: rows.csv}\n  kept_quiz: {like: forget}\n"
    (tmp_path / "mine.yaml").write_text(f"{rows}forget: forget\nretain: kept_quiz\nmeasure: [forget, kept_quiz]\n")
    args = UnlearnArgs(model="m", benchmark=str(tmp_path / "mine.yaml"), data=str(tmp_path), retain_held_out=1)
    why = "measure has no set called retain; rename kept_quiz wherever it stands"
    with pytest.raises(InputError, match=rf"--retain-held-out 1: no set retain is measured \({why}\); give one, or drop it"):
        kept_rows(args, open_source(args), [1], 1)
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("kept_quiz", "retain"))
    assert len(kept_rows(args, open_source(args), [1], 1)) == 2


@pytest.mark.parametrize(("pair", "keeps"), [("ME+none", False), ("ME+GD", True), ("LLMU+none", True), ("CBQ+EMBEDQ", True)])
def test_rows_to_keep_are_trained_on_by_a_pair_that_reads_them_alone(pair, keeps):
    args = UnlearnArgs(data="demo", forget_losses=(pair,), retain_held_out=0.2)
    source = open_source(args)
    forgotten = {said(row) for row in source.task_rows("forget05", 1)}
    kept = {said(row) for row in kept_rows(args, source, [1], 1)} if keeps else set()
    assert trained_on(args, source, [1], 1) == forgotten | kept


def test_the_measured_sets_of_each_task_are_asked_for_once(monkeypatch):
    args, asked = UnlearnArgs(data="demo", retain_held_out=0.2), []
    source = open_source(args)
    sets = source.evaluation_sets
    monkeypatch.setattr(source, "evaluation_sets", lambda split, task: asked.append(task) or sets(split, task))
    trained_on(args, source, [1, 2, 3], 3)
    assert asked == [1, 2, 3]


def test_an_evaluation_needs_no_rows_to_keep_but_as_many_as_it_is_told_to_hold_out(tmp_path):
    """Data to measure a model by may have no pool: then nobody says which rows were trained on."""
    assert known_to_train(DEMO, open_source(DEMO)) == trained_on(DEMO, open_source(DEMO), [1], 1)
    for name in ("forget01", "retain_perturbed"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"question": "Who?", "answer": "Ann.", "task_id": 1}))
    args = {"model": "org/model", "data": str(tmp_path), "split": ("forget01",)}
    assert known_to_train(EvalArgs(**args), open_source(EvalArgs(**args))) is None
    too_many = EvalArgs(**args, retain_held_out=1)
    with pytest.raises(InputError, match="--retain-held-out 1: 1 rows of the retain set are measured; give at least two"):
        known_to_train(too_many, open_source(too_many))
