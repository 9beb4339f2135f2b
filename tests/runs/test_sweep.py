"""Sweeps: every combination once, failures beside results, nothing done twice."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest

from dualoptim import InputError, unlearn
from dualoptim import sweep as sweep_module
from dualoptim.config.args import SweepArgs, UnlearnArgs
from dualoptim.config.cli import parse
from dualoptim.config.presets import over, published
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.results import TaskResult
from dualoptim.sweep import command, runs_of, sweep


@pytest.fixture
def args(taught, tmp_path):
    return SweepArgs(
        model=str(taught), data="demo", forget_losses=("NPO+GD", "ME+GD"), learning_rates=(1e-4,), forget_lrs=(1e-4, 3e-4),
        seeds=(1, 2), max_steps=2, eval_rows=2, max_new_tokens=3, output_dir=str(tmp_path / "sweep"),
    )  # fmt: skip


def test_every_combination_runs_once_and_pays_for_its_reference_once(args, tmp_path, monkeypatch):
    rows = sweep(args)
    assert len(rows) == 8
    assert {(row["losses"], row["forget_lr"], row["seed"]) for row in rows} == {
        (losses, rate, seed) for losses in ("NPO+GD", "ME+GD") for rate in ("0.0001", "0.0003") for seed in (1, 2)
    }
    folder = tmp_path / "sweep"
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert len(table) == 8
    assert all(float(row["model_utility"]) >= 0 for row in table)
    assert (folder / "methods.md").read_text().count("±") == 4 * 4
    assert "at 0.1" in (folder / "frontier.md").read_text()
    points = list(csv.DictReader((folder / "frontier.csv").open()))
    assert [(row["forget"], row["seen"]) for row in points if row["method"] == "ME+GD dual-adamw"] == [
        (row["forget_probability"], row["retain_probability"]) for row in table if row["losses"] == "ME+GD"
    ]
    assert len(list((folder / "reference").rglob("*.safetensors"))) <= 2  # one per seed's order at most, not per rate
    assert [cell.strip() for cell in (folder / "results.md").read_text().splitlines()[0].split("|")[1:6]] == [
        "losses", "optim", "learning rate", "forget lr", "seed",
    ]  # fmt: skip

    # a second call does nothing but read; a changed setting runs again
    monkeypatch.setattr(sweep_module, "run", lambda _: pytest.fail("a finished run was started again"))
    again = sweep(dataclasses.replace(args, threads=1, eval_batch_size=3))  # these change no number
    assert json.loads(json.dumps(again, default=str)) == json.loads(json.dumps(rows, default=str))
    # other settings are refused and everything stays, or replaced if that is asked for
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"was finished with other settings; --overwrite replaces it"):
        sweep(dataclasses.replace(args, max_steps=3))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    started = []
    monkeypatch.setattr(sweep_module, "run", unlearn.run)
    monkeypatch.setattr(unlearn, "unlearn_tasks", lambda job, *_: started.append(job.args) or pytest.fail("stop"))
    with pytest.raises(BaseException, match="stop"):
        sweep(dataclasses.replace(args, max_steps=3, overwrite=True))
    assert started[0].overwrite
    # killed there, it is no finished run of either settings
    started.clear()
    with pytest.raises(BaseException, match="stop"):
        sweep(args)
    assert [one.output_dir for one in started] == [str(folder / next(iter(runs_of(args))))]


def test_a_run_by_what_is_gone_has_not_finished_the_one_without():
    now = sweep_module._settings(UnlearnArgs())
    assert sweep_module._same({**now, "retain_until": None, "retain_repeats": 4}, now)
    assert not sweep_module._same({**now, "retain_until": 0.02, "retain_repeats": 4}, now)


def test_one_failing_run_stops_no_other_and_is_reported(args, tmp_path, monkeypatch, capsys):
    original = sweep_module.run

    def spoiled(one: UnlearnArgs):
        if one.seed == 2:
            raise RuntimeError("out of luck")
        return original(one)

    monkeypatch.setattr(sweep_module, "run", spoiled)
    one_pair = dataclasses.replace(args, forget_losses=("ME+GD",))
    assert command(one_pair) == 1
    rows = json.loads(json.dumps(sweep(one_pair)))
    assert [("failed" in row, row["seed"]) for row in rows] == [(False, 1), (True, 2)] * 2
    out = capsys.readouterr().out
    assert "FAILED, RuntimeError: out of luck" in out
    assert re.search(r"run 1 of 4: \S+_seed1\n", out)
    assert re.search(r"run 2 of 4: \S+_seed2 \(about \d+ minutes left\)\n", out)
    assert "RuntimeError: out of luck" in (tmp_path / "sweep" / "results.md").read_text()
    monkeypatch.setattr(sweep_module, "run", original)
    assert command(one_pair) == 0  # only what failed runs again
    assert "failed" not in (tmp_path / "sweep" / "results.md").read_text()


def test_pairs_that_read_other_columns_of_the_same_files_are_each_found_finished(tiny, tmp_path, capsys):
    for name in ("forget", "keep"):
        row = {"question": f"Who is {name}?", "answer": "Ann.", "no": "I never met her."}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    args = SweepArgs(
        model=str(tiny), forget_file=str(tmp_path / "forget.jsonl"), retain_file=str(tmp_path / "keep.jsonl"),
        refusal_column="no", forget_losses=("IDK+AP", "GA+GD"), max_steps=1, eval=False, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    lines = sweep(args)
    assert json.loads(json.dumps(sweep(args))) == json.loads(json.dumps(lines))
    assert capsys.readouterr().out.count("finished before") == 2


@pytest.mark.parametrize("independent", [True, False])
def test_a_method_has_the_mean_over_independent_tasks_and_the_last_of_others(tmp_path, monkeypatch, independent):
    """So too where what is read of a finished run was written before its lines said so."""

    def of_two_tasks(one: UnlearnArgs):
        place = Path(one.output_dir) / "ME+GD_lr0.0001"
        utilities = {1: 0.25 * one.seed, 2: 0.5 * one.seed}
        scored = {task: Summary(model_utility=utility) for task, utility in utilities.items()}
        found = [
            TaskResult("ME+GD", 1e-4, n, place / f"task{n}", place / f"task{n}/model", [], None, scored[n]) for n in scored
        ]
        return unlearn.RunResult(place, found)

    monkeypatch.setattr(sweep_module, "run", of_two_tasks)
    tasks = {"task_list": (1, 2), "tasks_independent": independent, "learning_rates": (1e-4,), "seeds": (1, 2)}
    own = SweepArgs(**tasks, output_dir=str(tmp_path / "sweep"))
    sweep(own)
    expected = ("4", "0.562 ± 0.315") if independent else ("2", "0.750 ± 0.354")
    assert methods_of(tmp_path / "sweep") == [("ME+GD dual-adamw lr 0.0001 forget 0.0003", *expected)]
    for path in (tmp_path / "sweep").glob("*/finished.json"):
        finished = json.loads(path.read_text())
        for row in finished["rows"]:
            row.pop("tasks_independent", None)
        path.write_text(json.dumps(finished))
    monkeypatch.setattr(sweep_module._Now, "changed", lambda *_: None)
    sweep(own)
    assert methods_of(tmp_path / "sweep") == [("ME+GD dual-adamw lr 0.0001 forget 0.0003", *expected)]


def methods_of(folder):
    """The first three columns of methods.md."""
    lines = (folder / "methods.md").read_text().splitlines()[2:]
    return [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines]


def test_a_mistake_that_every_run_shares_is_one_line(args):
    with pytest.raises(InputError, match="has no such task"):
        sweep(dataclasses.replace(args, task_list=(99,)))
    assert not Path(args.output_dir).exists()


def test_sweep_flags(tmp_path):
    with pytest.raises(InputError, match="give --output-dir"):
        sweep(parse(SweepArgs, []))
    assert parse(SweepArgs, ["--output-dir", "x", "--seeds", "1", "2", "--preset", "npo-gd"]) == SweepArgs(
        **over(published(["npo-gd"]), {"output_dir": "x", "seeds": (1, 2)})
    )
    for changes, message in (
        ({"output_dir": "x", "forget_lr": 1e-5, "forget_lrs": (1e-5,)}, "--forget-lr 1e-05 and --forget-lrs both set"),
        ({"output_dir": "x", "forget_lrs": (1e-5,), "optim": "adamw"}, "--forget-lrs has no effect with --optim adamw"),
        ({"output_dir": "x", "resume": "newest"}, "a sweep skips what is finished by itself"),
        ({"output_dir": "x", "seeds": (1, 1)}, "--seeds names 1 twice"),
    ):
        with pytest.raises(InputError, match=message):
            SweepArgs(**changes)
    names = list(runs_of(SweepArgs(output_dir=str(tmp_path), seeds=(1, 2), learning_rates=(1e-5, 2e-5))))
    assert names == [f"ME+GD_lr{rates}_seed{seed}" for rates in ("1e-05_flr3e-05", "2e-05_flr6e-05") for seed in (1, 2)]


def test_an_edited_formula_of_a_benchmark_is_another_evaluation(tiny, tmp_path, monkeypatch):
    rows = [{"question": f"Who is {n}?", "answer": "Ann."} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    declared = tmp_path / "own.yaml"
    text = (
        "rows: {forget: {file: rows.jsonl, tokens: 2}}\nforget: [forget]\nmeasure: [forget]\nscores: {s: {title: T, of: %s}}\n"
    )
    declared.write_text(text % "forget.rouge_l_recall")
    args = SweepArgs(
        model=str(tiny), benchmark=str(declared), data=str(tmp_path), forget_losses=("GA+none",), max_steps=1, max_new_tokens=2,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    sweep(args)
    monkeypatch.setattr(sweep_module, "run", lambda _: pytest.fail("a finished run was started again"))
    declared.write_text((text % "forget.rouge_l_recall").replace("title: T", "title: Another"))
    sweep(args)
    declared.write_text(text % "1 - forget.rouge_l_recall")
    with pytest.raises(InputError, match="was finished with other evaluation; --overwrite replaces it"):
        sweep(args)
