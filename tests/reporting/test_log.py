"""The log of a run: a line per step as it comes, and trackers that cannot start."""

import json

import pytest
from accelerate import Accelerator

from dualoptim import InputError
from dualoptim.reporting.log import StepLog, trackers


def test_a_step_is_on_disk_before_the_next_one(log, tmp_path):
    path, records = tmp_path / "log.jsonl", log()
    with StepLog(path, 12, "unlearn", Accelerator(cpu=True)) as steps:
        for number, record in enumerate(records, 1):
            steps.add(record)
            assert [json.loads(line) for line in path.read_text().splitlines()] == records[:number]
    assert steps.records == records


def test_a_log_that_goes_on_keeps_its_first_steps_alone(log, tmp_path):
    path, records = tmp_path / "log.jsonl", log()
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:9]) + '{"st')  # killed while it wrote
    with StepLog(path, 12, "unlearn", Accelerator(cpu=True), records[:6]) as steps:
        steps.add(records[6])
    assert [json.loads(line) for line in path.read_text().splitlines()] == steps.records == records[:7]


def test_the_bar_shows_the_newest_loss_of_each_objective(log, capsys):
    def shown(records):
        with StepLog(None, 12, "unlearn", Accelerator(cpu=True)) as steps:
            steps._bar.ncols = 80  # else a file gets the whole line
            for record in records:
                steps.add(record)
        return capsys.readouterr().err

    assert "retain loss=0.182, forget loss=0.167" in shown(log())
    assert "forget loss=1.8, retain loss=1.2" in shown(log(joint=True))


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)

    def refuse(*_):
        raise RuntimeError("nobody is logged in")

    monkeypatch.setattr(accelerator, "init_trackers", refuse)
    with (
        pytest.raises(InputError, match=r"--log-with wandb: cannot start \(nobody is logged in\); log in, or drop it"),
        trackers(accelerator, tmp_path, "one", {"log_with": ["wandb"]}),
    ):
        pytest.fail("the run began")
