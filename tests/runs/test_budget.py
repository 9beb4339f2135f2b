"""A run ends where what is forgotten or kept has reached the limit that a user gave, and what it leaves is whole."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from support import FOLDER, arguments, launch, records, state_of

from dualoptim import InputError, UnlearnArgs, run


def watched(task):
    return [json.loads(line) for line in (task / "watched.jsonl").read_text().splitlines()]


def same_model(one, other):
    first, second = state_of(one / "model"), state_of(other / "model")
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def quick(taught, tmp_path_factory):
    """Arguments that make the taught model forget within a few cycles of three steps."""
    return arguments(taught, tmp_path_factory.mktemp("quick") / "out", "dual-adamw", learning_rates=(1e-3,))


def test_a_run_ends_once_enough_is_forgotten(quick, tmp_path, capsys):
    task = run(replace(quick, forget_until=0.5)).tasks[0].folder
    known = watched(task)
    assert [one["step"] for one in known] == list(range(0, known[-1]["step"] + 1, 3))  # cycles of three steps
    assert known[0]["forget"] > 0.9
    assert [one["forget"] <= 0.5 for one in known] == [False] * (len(known) - 1) + [True]
    assert 3 < len(records(task.parents[1])) == known[-1]["step"] < 24
    assert f"stopped after step {known[-1]['step']} of 24, as enough is forgotten" in capsys.readouterr().out
    saved = {"output_dir": str(tmp_path / "plain"), "save_model_every": known[-1]["step"]}
    assert same_model(task, run(replace(quick, **saved)).tasks[0].folder / "steps" / f"step-{known[-1]['step']}")
    again = run(replace(quick, forget_until=0.5, resume="newest")).tasks[0]
    assert len(again.log) == known[-1]["step"], "it has ended"
    assert "trained before" in capsys.readouterr().out


def test_a_run_that_loses_too_much_leaves_the_last_good_model(quick, tmp_path, capsys):
    hard = replace(quick, learning_rates=(3e-3,), keep_budget=0.05, output_dir=str(tmp_path / "out"))
    result = run(replace(hard, eval=True, eval_rows=2, max_new_tokens=4)).tasks[0]
    task = result.folder
    assert "a higher --forget-lr" not in " ".join(result.after.verdict.tries), "more is lost then"
    known = watched(task)
    assert known[0]["kept"] - known[-1]["kept"] > 0.05 >= known[0]["kept"] - known[-2]["kept"]
    good, printed = known[-2]["step"], capsys.readouterr()
    assert f"the model of step {good} is the result" in printed.out
    assert "watch kept" in printed.err
    assert "Loading weights" not in printed.err.partition("watch kept")[2].rpartition("watch kept")[0]  # no weight is loaded
    assert not (task / "good").exists()
    assert "stopped after" in json.loads((task / "trained.json").read_text())["ended"]
    assert good > 0
    plain = replace(hard, keep_budget=None, output_dir=str(tmp_path / "plain"), save_model_every=good, max_steps=good + 1)
    steps = run(replace(plain, num_epochs=5)).tasks[0].folder / "steps"
    assert same_model(task, steps / f"step-{good}")


def test_a_kill_before_the_last_good_model_lies_in_its_place_costs_nothing(quick, tmp_path):
    args = replace(quick, learning_rates=(3e-3,), keep_budget=0.05, save_every=3, output_dir=str(tmp_path / "out"))
    task = run(args).tasks[0].folder
    whole = state_of(task / "model")
    (task / "model").rename(task / "good")  # written down as the result, and not moved yet
    assert len(run(replace(args, resume="newest")).tasks[0].log) == json.loads((task / "trained.json").read_text())["steps"]
    assert all(torch.equal(weights, state_of(task / "model")[name]) for name, weights in whole.items())
    assert not (task / "good").exists()
    (task / "trained.json").unlink()
    run(replace(args, resume="newest"))
    assert all(torch.equal(weights, state_of(task / "model")[name]) for name, weights in whole.items())
    (task / "trained.json").unlink()
    (task / "model").rename(task / "elsewhere")
    with pytest.raises(InputError, match=r"good is gone, which --keep-budget needs; give --overwrite instead"):
        run(replace(args, resume="newest"))


def test_what_lost_too_much_is_never_the_best(quick, tmp_path):
    more = {"keep_budget": 0.05, "eval": True, "eval_rows": 4, "max_new_tokens": 3, "eval_every": 3, "keep_best": 0.99}
    task = run(replace(quick, learning_rates=(3e-3,), output_dir=str(tmp_path / "out"), **more)).tasks[0].folder
    good, stopped = (one["step"] for one in watched(task)[-2:])
    assert not (task / "steps" / f"step-{stopped}").exists()
    best = json.loads((task / "best.json").read_text())
    assert best["step"] <= good
    assert (best["folder"] == "model") == (best["step"] == good)


def test_a_later_task_is_not_judged_by_what_was_measured_on_other_weights(quick, tmp_path):
    """A longer first task changes what the second one starts from."""
    one = replace(quick, task_list=(1, 2), keep_budget=0.9, max_steps=3, output_dir=str(tmp_path / "parts"))
    run(one)
    resumed = run(replace(one, max_steps=6, resume="newest")).tasks[1].folder
    whole = run(replace(one, max_steps=6, output_dir=str(tmp_path / "whole"))).tasks[1].folder
    assert watched(resumed) == watched(whole)
    assert same_model(resumed, whole)


def test_a_limit_that_was_not_reached_is_told(quick, tmp_path, capsys):
    short = replace(quick, forget_until=0.01, max_steps=3, output_dir=str(tmp_path))
    task = run(short).tasks[0].folder
    said = f"--forget-until 0.01 was not reached: {watched(task)[-1]['forget']:.3f} after 3 steps"
    assert said in capsys.readouterr().out
    assert json.loads((task / "trained.json").read_text()) == {"steps": 3, "not_reached": said}
    assert len(run(replace(short, max_steps=4, resume="newest")).tasks[0].log) == 4, "it goes on"


def test_an_interrupted_run_ends_where_it_would_have(quick, tmp_path):
    limits = {"learning_rates": (1e-3,), "forget_until": 0.3, "keep_budget": 0.9, "save_every": 4}
    whole = run(replace(quick, **limits, output_dir=str(tmp_path / "whole"))).tasks[0].folder
    parts = replace(quick, **limits, output_dir=str(tmp_path / "parts"))
    run(replace(parts, max_steps=4))
    (tmp_path / "parts" / FOLDER / "trained.json").unlink()  # as if it had been interrupted there
    resumed = run(replace(parts, resume="newest")).tasks[0].folder
    assert watched(whole) == [one for one in watched(resumed) if one["step"] != 4]
    assert same_model(whole, resumed)


@pytest.mark.launch
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero3"])
def test_two_processes_end_where_one_does(quick, tmp_path, config):
    if config == "zero3":
        pytest.importorskip("deepspeed")
    limits = {"forget_until": 0.3, "keep_budget": 0.5}
    one = run(replace(quick, **limits, output_dir=str(tmp_path / "one"))).tasks[0].folder
    two = replace(quick, **limits, batch_size=2, output_dir=str(tmp_path / "two"))
    done = launch(config, {"runs": [asdict(two)]})
    assert done.stdout.count("as enough is forgotten") == 1
    task = tmp_path / "two" / FOLDER
    assert len(watched(task)) == len(watched(one)) > 2
    for ours, alone in zip(watched(task), watched(one), strict=True):
        assert ours == pytest.approx(alone, abs=1e-3)
    assert not (task / "good").exists()
    assert state_of(task / "model").keys() == state_of(one / "model").keys()


def test_a_budget_without_rows_to_keep_is_refused(tiny, tmp_path):
    (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    own = UnlearnArgs(
        model=str(tiny),
        forget_file=(str(tmp_path / "forget.jsonl"),),
        forget_losses=("NPO+none",),
        keep_budget=0.02,
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(InputError, match=r"--keep-budget 0\.02: there are no rows to keep; give --retain-file, or drop it"):
        run(own)
    assert not (tmp_path / "out").exists()
