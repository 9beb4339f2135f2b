"""Tasks one after another: what is measured after each, and a sequence that is killed in the middle."""

import csv
import dataclasses
import json
import subprocess
import time

import pytest
import torch
from support import Started, arguments, command, environment, launch, state_of

from dualoptim import run
from dualoptim.data.tofu import tofu_source

TABLES = ("tasks.csv", "tasks.md")


def sequence(taught, folder):
    return arguments(
        taught, folder, "dual-adamw", forget_losses=("NPO+KL",), task_list=(1, 2, 3), max_steps=8, learning_rates=(1e-3,),
        eval=True, eval_rows=2, max_new_tokens=4, save_every=2, threads=1,
    )  # fmt: skip


def table_of(folder):
    with (folder / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "folder"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(sequence(taught, folder))
    return folder


def test_every_task_so_far_is_measured_after_each(whole):
    pair = whole / "NPO+KL_lr0.001"
    lines = list(csv.DictReader((pair / "tasks.csv").open()))
    before, *lines = lines
    assert [before["after_task"], *(line["after_task"] for line in lines)] == ["before", "1", "2", "3"]
    known = json.loads((pair / "task1" / "eval_before" / "summary.json").read_text())["sets"]["forget"]["probability"]
    assert (float(before["task1_probability"]), before["task2_probability"], before["all_tasks_probability"]) == (known, "", "")
    for position, line in enumerate(lines):
        summary = json.loads((pair / f"task{position + 1}" / "eval" / "summary.json").read_text())
        for task in (1, 2, 3):
            name = "forget" if task == position + 1 else f"forget_task{task}"
            cell = line[f"task{task}_probability"]
            assert (cell == "") == (task > position + 2)
            if cell and task == position + 2:  # just before its turn
                own = json.loads((pair / f"task{task}" / "eval_before" / "summary.json").read_text())
                assert float(cell) == own["sets"]["forget"]["probability"]
            elif cell:
                assert float(cell) == summary["sets"][name]["probability"]
                assert summary["rows"][name] == 2
    # what the last model says of task 1 is measured on its own rows
    first = (pair / "task1" / "eval" / "forget.jsonl").read_text().splitlines()
    again = (pair / "task3" / "eval" / "forget_task1.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in first] == [json.loads(line)["question"] for line in again]
    assert [json.loads(line)["loss"] for line in first] != [json.loads(line)["loss"] for line in again]
    assert (pair / "tasks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.launch
def test_killed_in_the_second_task_and_resumed(whole, taught, tmp_path):
    args = sequence(taught, tmp_path)
    log = tmp_path / "NPO+KL_lr0.001" / "task2" / "log.jsonl"
    line = command("cpu", {"runs": [dataclasses.asdict(args)]}, 1)
    with Started(line, environment("cpu"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") >= 3):
            assert started.process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
    assert not (log.parent / "model").exists()
    launch("cpu", {"runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest"))]}, 1)
    for name in TABLES:
        assert (tmp_path / "NPO+KL_lr0.001" / name).read_bytes() == (whole / "NPO+KL_lr0.001" / name).read_bytes()
    assert table_of(tmp_path) == table_of(whole)
    one, other = (state_of(folder / "NPO+KL_lr0.001" / "task3" / "model") for folder in (whole, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_retain_pool_shrinks_by_each_task(taught, tmp_path):
    """KL keeps nothing of a task that has been forgotten: its rows leave the pool."""
    source = tofu_source("demo")
    pools = [{row.question for row in source.retain_rows("forget05", list(range(1, n + 1)))} for n in (1, 2, 3)]
    assert pools[0] > pools[1] > pools[2]
    for n in (1, 2, 3):
        assert not pools[n - 1] & {row.question for task in range(1, n + 1) for row in source.task_rows("forget05", task)}
    quiet = dataclasses.replace(
        sequence(taught, tmp_path), eval=False, eval_rows=0, max_new_tokens=128, max_steps=2, save_every=0
    )
    assert len(run(quiet).tasks) == 3
    assert not (tmp_path / "NPO+KL_lr0.001" / "tasks.csv").exists()  # nothing was measured
