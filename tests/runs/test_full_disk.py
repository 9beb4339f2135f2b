"""What a run says and leaves when the disk is full or its folder goes, and that it goes on from there to the same end."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, command, environment, state_of

from dualoptim import EvalArgs, UnlearnArgs, run
from dualoptim.config.args import SweepArgs
from dualoptim.errors import WriteError
from dualoptim.evaluate import evaluate
from dualoptim.models import portable, store
from dualoptim.report import ReportArgs, report
from dualoptim.reporting.log import StepLog
from dualoptim.sweep import sweep

TASK = Path("NPO+GD_lr0.001") / "task1"
UNMEASURED = {"eval": False, "eval_rows": 0, "max_new_tokens": 128}


@pytest.fixture(scope="module")
def args(tiny):
    return UnlearnArgs(
        model=str(tiny), data="demo", forget_losses=("NPO+GD",), learning_rates=(1e-3,), retain_freq=1, batch_size=2,
        max_steps=4, save_every=2, eval_rows=1, max_new_tokens=1, output_dir="out",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(args, tmp_path_factory):
    """The same run, which nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(dataclasses.replace(args, output_dir=str(folder)))
    return folder


def full(path=None):
    return OSError(errno.ENOSPC, "No space left on device", path and str(path))


class SafetensorError(Exception):
    """As the library raises it."""


def fill(monkeypatch, name):
    """Have the writing of one kind of file fail in the middle, the second time for those that are written several times."""
    write, save, add = Path.write_bytes, portable.save_file, StepLog._check_place

    def part_of_a_file(path, data):
        write(path, data[: len(data) // 2] if path.name == f"{name}.tmp" else data)
        if path.name == f"{name}.tmp":
            raise full(path)

    def part_of_a_checkpoint(tensors, path):
        save(tensors, path)
        if path.parents[1].joinpath("step-2").is_dir():
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def part_of_a_line(self):
        add(self)
        if len(self.records) == 4:
            self._file.write('{"step": 4, "epo')
            self._file.flush()
            raise full()

    def part_of_a_reference(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Path, "write_bytes", part_of_a_file)
    if name == "checkpoint":
        monkeypatch.setattr(portable, "save_file", part_of_a_checkpoint)
    if name == "log.jsonl line":
        monkeypatch.setattr(StepLog, "_check_place", part_of_a_line)
    if name == "reference":
        monkeypatch.setattr(store, "save_file", part_of_a_reference)


KINDS = [
    "config.yaml", "forget.jsonl", "finished.json", "summary.json", "reference", "log.jsonl", "log.jsonl line", "checkpoint",
    "state.json", "prompt.json", "trained.json", "results.csv", "results.md",
]  # fmt: skip


def log_of(folder):
    lines = [json.loads(line) for line in (folder / TASK / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_one_line_and_the_run_goes_on_to_the_same_end(args, whole, tmp_path, kind):
    args = dataclasses.replace(args, output_dir=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        fill(patch, kind)
        with pytest.raises(WriteError) as error:
            run(args)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(str(tmp_path / "out"))
    assert "cannot be written (No space left on device); " in line
    assert line.endswith("make room; to go on, give the same command with --resume")
    assert ("; the newest checkpoint is " in line) == any((tmp_path / "out" / TASK).glob("checkpoint/step-*"))
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "unfinished"], "half-written"

    run(dataclasses.replace(args, resume="newest"))
    assert log_of(tmp_path / "out") == log_of(whole)
    one, other = (state_of(folder / TASK / "model") for folder in (tmp_path / "out", whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    for part in ("eval_before", "eval"):
        one, other = (json.loads((folder / TASK / part / "summary.json").read_text()) for folder in (tmp_path / "out", whole))
        assert one == other


def test_an_evaluation_goes_on_as_well(args, tmp_path):
    given = EvalArgs(model=args.model, data="demo", eval_rows=1, max_new_tokens=1, output_dir=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        fill(patch, "retain.jsonl")
        with pytest.raises(WriteError, match=r"make room; to go on, give the same command again$"):
            evaluate(given)
    first = (tmp_path / "out" / "eval" / "forget.jsonl").stat().st_mtime_ns
    evaluate(given)
    assert (tmp_path / "out" / "eval" / "forget.jsonl").stat().st_mtime_ns == first


def test_a_sweep_ends_at_once_and_goes_on_when_it_is_called_again(args, tmp_path, capsys):
    given = dataclasses.asdict(
        dataclasses.replace(args, **UNMEASURED, save_every=0, max_steps=1, output_dir=str(tmp_path / "out"))
    )
    given = SweepArgs(**(given | {"seeds": (1, 2)}))
    with pytest.MonkeyPatch.context() as patch:
        fill(patch, "trained.json")
        with pytest.raises(WriteError, match=r"make room; to go on, give the same command again$"):
            sweep(given)
    assert "_seed2" not in capsys.readouterr().out
    assert len(sweep(given)) == 2


@pytest.mark.parametrize("name", ["report.md", "report.html", "scores.png"])
def test_a_report_is_told_the_same(whole, tmp_path, name):
    given = ReportArgs(runs=(str(whole),), output_dir=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        names = [path.name for path in (report(given) / "report").iterdir()]
        fill(patch, names[0] if name == "scores.png" else name)
        with pytest.raises(WriteError, match=r"cannot be written \(No space left on device\); make room; repeat the command$"):
            report(given)
    assert not list(tmp_path.rglob("*.tmp"))
    report(given)


# ---------------------------------------------------------------------------------------------------- a folder that goes


def vanish(how, folder):
    """What somebody does to the output folder while a run writes to it."""
    log = folder / TASK / "log.jsonl"
    if how == "the folder is removed":
        shutil.rmtree(folder)
    elif how == "the folder is renamed":
        folder.rename(folder.with_name("elsewhere"))
    elif how == "another folder takes its place":
        folder.rename(folder.with_name("elsewhere"))
        shutil.copytree(folder.with_name("elsewhere"), folder)
    elif how == "the task is removed":
        shutil.rmtree(folder / TASK)
    elif how == "the log is removed":
        log.unlink()
    elif how == "the log is replaced":
        text = log.read_text()
        log.unlink()
        log.write_text(text)


WAYS = [
    "the folder is removed", "the folder is renamed", "another folder takes its place", "the task is removed",
    "the log is removed", "the log is replaced",
]  # fmt: skip


@pytest.mark.parametrize("moment", ["between two steps", "before a checkpoint"])
@pytest.mark.parametrize("how", WAYS)
def test_a_run_whose_folder_goes_notices_and_writes_nothing_more(args, tmp_path, how, moment):
    if moment == "before a checkpoint" and "log" in how:
        moment = "after the last step"  # of the next step, that is
    args = dataclasses.replace(args, **UNMEASURED, max_steps=6, save_every=4, output_dir=str(tmp_path / "out"))
    add, left = StepLog.add, []

    def adding(self, record):
        add(self, record)
        if record["step"] == (2 if moment == "between two steps" else 4):
            vanish(how, tmp_path / "out")
            left.extend(sorted((str(path), path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "add", adding)
        with pytest.raises(
            WriteError,
            match=r"out\S* cannot be written \(No such file or directory\); .*put it back; to go on, give",
        ):
            run(args)
    now = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "checkpoint" not in str(path)}
    assert {name: data for name, data in left if ".lock" not in name} == {n: d for n, d in now.items() if ".lock" not in n}
    if how == "the folder is removed":
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["forget.jsonl", "retain.jsonl"])
def test_an_evaluation_whose_folder_goes_notices(args, tmp_path, name):
    given = EvalArgs(model=args.model, data="demo", eval_rows=1, max_new_tokens=1, output_dir=str(tmp_path / "out"))
    write = Path.write_bytes

    def writing(path, data):
        if path.name == f"{name}.tmp":
            shutil.rmtree(tmp_path / "out")
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", writing)
        with pytest.raises(WriteError, match="No such file or directory"):
            evaluate(given)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- what the system itself refuses

LIMITED = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); "
LIMITED += "runpy.run_module('dualoptim', run_name='__main__')"


@pytest.mark.launch
@pytest.mark.parametrize("limit", [200, 3000, 100_000])
def test_a_file_that_may_not_grow_further_is_one_line_of_the_command(args, tmp_path, limit):
    flags = ["--model", args.model, "--data", "demo", "--no-eval", "--max-steps", "40", "--save-every", "20", "--forget-losses"]
    line = [sys.executable, "-c", LIMITED, str(limit), "unlearn", *flags, "NPO+GD", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1, done.stderr[-3000:]
    (said,) = [text for text in done.stderr.replace("\r", "\n").splitlines() if text.startswith("error: ")]
    assert "cannot be written (File too large)" in said
    assert "Traceback" not in done.stderr
    line = [sys.executable, "-m", "dualoptim", "unlearn", *flags, "NPO+GD", "--output-dir", str(tmp_path / "out"), "--resume"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.launch
def test_a_launch_of_two_says_it_once_and_ends(args, tmp_path):
    given = dataclasses.replace(args, **UNMEASURED, output_dir=str(tmp_path / "out"))
    line = command("ddp", {"runs": [dataclasses.asdict(given)]})
    code = "import resource as r, subprocess, sys; r.setrlimit(r.RLIMIT_FSIZE, (100_000,) * 2); "
    code += "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    done = subprocess.run(
        [sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=120, env=environment("ddp")
    )
    assert done.returncode != 0
    assert done.stderr.count("cannot be written (") == 1, done.stderr[-3000:]
