"""Independent tasks: each from the first model, to the bit as a run of its own, and their mean and deviation."""

import csv
import json
from dataclasses import asdict, replace
from statistics import mean, stdev

import pytest
from support import STRATEGIES, arguments, check_same, launch

from dualoptim import InputError, UnlearnArgs, memory_plan, run, unlearn
from dualoptim.on_the_way import OnTheWay
from dualoptim.report import ReportArgs, report

PAIR = "NPO+KL_lr0.001"


def independent(taught, folder, **changes):
    measured = {"eval": True, "eval_rows": 2, "max_new_tokens": 4}
    steps = {"max_steps": 4, "threads": 1, "forget_losses": ("NPO+KL",)}
    return arguments(
        taught, folder, "dual-adamw", **{"task_list": (3, 1, 2), "tasks_independent": True} | measured | steps | changes
    )


@pytest.fixture(scope="module")
def whole(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(independent(taught, folder))
    return folder


def test_a_task_is_to_the_bit_a_run_of_its_own(whole, taught, tmp_path):
    run(independent(taught, tmp_path, task_list=(2,), tasks_independent=False))
    check_same(whole / PAIR / "task2", tmp_path / PAIR / "task2")


def test_every_task_has_a_fresh_adapter(taught, tmp_path):
    lora = {"use_lora": True, "eval": False, "eval_rows": 0, "max_new_tokens": 128, "task_list": (1, 2)}
    run(independent(taught, tmp_path / "both", **lora))
    run(independent(taught, tmp_path / "one", **lora | {"task_list": (2,), "tasks_independent": False}))
    check_same(tmp_path / "both" / PAIR / "task2", tmp_path / "one" / PAIR / "task2")
    assert not (tmp_path / "both" / PAIR / "tasks.csv").exists()  # nothing was measured


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["DDP", "ZeRO-3"])
def test_several_processes_start_each_task_from_the_first_model(strategy, taught, tmp_path):
    config, processes = STRATEGIES[strategy]
    quiet = {"eval": False, "eval_rows": 0, "max_new_tokens": 128, "max_steps": 2}
    both = independent(taught, tmp_path / "both", task_list=(1, 2), **quiet)
    one = independent(taught, tmp_path / "one", task_list=(2,), tasks_independent=False, **quiet)
    launch(config, {"runs": [asdict(both), asdict(one)]}, processes)
    check_same(tmp_path / "both" / PAIR / "task2", tmp_path / "one" / PAIR / "task2")


def test_the_mean_and_the_deviation_over_tasks_are_shown(whole):
    lines = list(csv.DictReader((whole / PAIR / "tasks.csv").open()))
    assert [line["task"] for line in lines] == ["before", "3", "1", "2", "mean", "deviation"]
    known = [
        json.loads((whole / PAIR / f"task{task}" / "eval" / "summary.json").read_text())["sets"]["forget"]["probability"]
        for task in (3, 1, 2)
    ]
    assert [float(line["forget_probability"]) for line in lines[1:]] == pytest.approx([*known, mean(known), stdev(known)])
    table = (whole / PAIR / "tasks.md").read_text().splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:3]] == ["task", "forget probability"]
    assert [cell.strip() for cell in table[-1].split("|")[1:3]] == ["deviation", f"{stdev(known):.3f}"]
    report(ReportArgs(runs=(str(whole),)))
    page = (whole / "report.md").read_text().splitlines()
    assert any(line.startswith("## NPO+KL") and line.endswith(", tasks side by side") for line in page)
    assert all(line in page for line in table)


def test_a_run_that_stops_in_the_second_task_goes_on_there(whole, taught, tmp_path, monkeypatch):
    args, original = independent(taught, tmp_path, save_every=1), OnTheWay.after

    def stops(way, step, loaded):
        if way.folder.name == "task1" and step == 3:
            raise KeyboardInterrupt
        original(way, step, loaded)

    monkeypatch.setattr(OnTheWay, "after", stops)
    with pytest.raises(KeyboardInterrupt):
        run(args)
    monkeypatch.setattr(OnTheWay, "after", original)
    trained = []
    train = unlearn._train
    monkeypatch.setattr(unlearn, "_train", lambda job, *rest: trained.append(job.args.task_list) or train(job, *rest))
    run(replace(args, resume="newest"))
    assert trained == [(1,), (2,)]
    for task in (1, 2, 3):
        check_same(whole / PAIR / f"task{task}", tmp_path / PAIR / f"task{task}")
    for name in ("tasks.csv", "tasks.md"):
        assert (tmp_path / PAIR / name).read_bytes() == (whole / PAIR / name).read_bytes()


def test_what_does_not_go_together_is_one_line(whole, taught):
    with pytest.raises(InputError, match="--fix-ref-model has no effect with --tasks-independent"):
        UnlearnArgs(tasks_independent=True, fix_ref_model=True)
    with pytest.raises(InputError, match=r"--resume: --tasks-independent was True in .* and is False"):
        run(independent(taught, whole, task_list=(3,), tasks_independent=False, resume="newest"))


def test_a_dry_run_plans_every_task(taught, tmp_path, capsys):
    whole = memory_plan.dry_run(independent(taught, tmp_path, dry_run=True))
    assert "tasks 3, 1, 2: each from the first model\n" in capsys.readouterr().out
    alone = [memory_plan.dry_run(independent(taught, tmp_path, dry_run=True, task_list=(task,))) for task in (1, 2, 3)]
    assert whole.lengths.micro_batch == max(one.lengths.micro_batch for one in alone)
    assert not list(tmp_path.iterdir())
