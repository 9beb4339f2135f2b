"""One run at a time in an output folder, and one line when the folder takes nothing more."""

import dataclasses
import errno
import fcntl
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import ROOT, command, environment

from dualoptim import EvalArgs, FinetuneArgs, InputError, UnlearnArgs, run
from dualoptim.atomic import LOCK
from dualoptim.config.args import SweepArgs
from dualoptim.errors import WriteError
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.models import lock
from dualoptim.models.launch import start_accelerator
from dualoptim.models.lock import holder, kept_for_one_run
from dualoptim.sweep import sweep

HOLD = """
import sys, time
from pathlib import Path
from dualoptim import UnlearnArgs
from dualoptim.models.launch import start_accelerator
from dualoptim.models.lock import kept_for_one_run
with kept_for_one_run(Path(sys.argv[1]), start_accelerator(UnlearnArgs()), ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def accelerator():
    return start_accelerator(UnlearnArgs())


def within(folder, accelerator, error=None, go_on="go on"):
    """Hold a folder, and raise something there."""
    with kept_for_one_run(folder, accelerator, go_on):
        if error:
            raise error


@pytest.fixture
def args(tiny, tmp_path):
    common = {"model": str(tiny), "data": "demo", "eval": False, "max_steps": 2, "learning_rates": (1e-3,)}
    return UnlearnArgs(**common, output_dir=str(tmp_path / "out"))


def files_of(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def hold(folder: Path) -> str:
    """Lock a folder from another thread of the system's view: another open file. Who holds it, as it says."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, b"process 7 on elsewhere")
    return file


@pytest.fixture
def held(tmp_path):
    """A folder that a process of another machine holds."""
    file = hold(tmp_path / "out")
    yield tmp_path / "out"
    os.close(file)


# ------------------------------------------------------------------------------------------------------------ who may come


def every_command(args):
    """What would write to the output folder of `args`."""
    shared = {"model": args.model, "data": "demo", "output_dir": args.output_dir}
    return {
        "unlearn": lambda: run(args),
        "overwrite": lambda: run(dataclasses.replace(args, overwrite=True)),
        "resume": lambda: run(dataclasses.replace(args, resume="newest")),
        "finetune": lambda: finetune(FinetuneArgs(**shared)),
        "eval": lambda: evaluate(EvalArgs(**shared)),
        "eval of a task": lambda: evaluate(EvalArgs(**(shared | {"output_dir": f"{args.output_dir}/ME+GD_lr0.001/task1"}))),
        "sweep": lambda: sweep(SweepArgs(**dataclasses.asdict(args))),
    }


@pytest.mark.parametrize("name", ["unlearn", "overwrite", "resume", "finetune", "eval", "eval of a task", "sweep"])
def test_a_folder_that_is_held_takes_no_second_run(args, held, name):
    before = files_of(held)
    with pytest.raises(InputError) as error:
        every_command(args)[name]()
    assert str(error.value) == (
        f"--output-dir: {held} is being written by process 7 on elsewhere; wait for its end, or give another folder"
    )
    assert files_of(held) == before


def test_a_run_in_the_folder_of_a_task_keeps_it_from_being_replaced(args, tmp_path):
    run(args)
    task = tmp_path / "out" / "ME+GD_lr0.001" / "task1"
    file = hold(task)
    with pytest.raises(InputError, match=r"task1 is being written by process 7 on elsewhere"):
        run(dataclasses.replace(args, overwrite=True))
    os.close(file)  # a run that was killed leaves its file, unlocked
    run(dataclasses.replace(args, overwrite=True))


def test_while_a_run_works_it_is_named_and_afterwards_nothing_tells_of_it(accelerator, tmp_path):
    with kept_for_one_run(tmp_path / "a" / "b", accelerator, ""):
        (tmp_path / "a" / "b" / "result").write_text("x")
        code = (
            "import sys; from pathlib import Path; from dualoptim.models.lock import holder; print(holder(Path(sys.argv[1])))"
        )
        line = [sys.executable, "-c", code, str(tmp_path / "a" / "b")]
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.stdout == f"process {os.getpid()} on {socket.gethostname()}\n", done.stderr
        assert holder(tmp_path / "a" / "b") == ""  # this process is no other
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


@pytest.mark.parametrize("error", [InputError("no"), ZeroDivisionError(), KeyboardInterrupt()])
def test_a_process_may_run_again_after_a_run_that_failed(accelerator, tmp_path, error):
    for _ in range(2):
        with pytest.raises(type(error)):
            within(tmp_path / "out", accelerator, error)
        assert not (tmp_path / "out").exists()


def test_a_sweep_and_its_runs_hold_their_folders_at_once(accelerator, tmp_path):
    with kept_for_one_run(tmp_path / "out", accelerator, ""):
        for _ in range(2):
            within(tmp_path / "out" / "run", accelerator)
        with pytest.raises(InputError, match="out is being written by process"):
            within(tmp_path / "out", accelerator)


def test_a_refused_run_leaves_no_trace(accelerator, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("x")
    before = files_of(tmp_path)
    for folder in ("there", "there/new", "new/a/b"):
        with pytest.raises(InputError, match="no"), kept_for_one_run(tmp_path / folder, accelerator, ""):
            raise InputError("no")
        if folder == "there":
            assert files_of(tmp_path) == before
    assert [name for name, _ in files_of(tmp_path)] == [name for name, _ in before]


@pytest.mark.parametrize("place", ["a_file", "a_file/below", "a_link"])
def test_a_place_that_can_be_no_folder_is_one_line(accelerator, tmp_path, place):
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "a_link").symlink_to(tmp_path / "a_file")
    with pytest.raises(InputError, match=r"^--output-dir: .*(a_file|a_link) is a file; give another folder$"):
        within(tmp_path / place, accelerator)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to_is_one_line(accelerator, tmp_path, monkeypatch, number):
    def failing(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(InputError, match=rf"cannot be written \({os.strerror(number)}\); give another folder"):
        within(tmp_path / "out", accelerator)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worked_on(accelerator, tmp_path, monkeypatch, number):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", failing)
    with kept_for_one_run(tmp_path / "out", accelerator, ""):
        (tmp_path / "out" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result"]


def test_a_system_without_such_locks_is_worked_on(accelerator, tmp_path, monkeypatch):
    """As Windows is: no module fcntl, no O_NOFOLLOW."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "O_NOFOLLOW")
    monkeypatch.delattr(os, "pread")
    spec = importlib.util.spec_from_file_location("lock_elsewhere", lock.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    with elsewhere.kept_for_one_run(tmp_path / "task1", accelerator, ""):
        (tmp_path / "task1" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "task1").iterdir()] == ["result"]
    with pytest.raises(InputError, match="no"), elsewhere.kept_for_one_run(tmp_path / "refused", accelerator, ""):
        raise InputError("no")
    assert not (tmp_path / "refused").exists()


def test_of_many_that_come_at_once_one_is_let_in(accelerator, tmp_path):
    """Also where each of them finds the file of one that is just leaving."""
    inside, most, refused = [0], [0], [0]

    def come():
        for _ in range(50):
            try:
                with kept_for_one_run(tmp_path / "new" / "out", accelerator, ""):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except InputError:
                refused[0] += 1

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most[0] == 1
    assert not list(tmp_path.rglob(LOCK))


@pytest.mark.launch
def test_the_lock_ends_with_the_process_that_works_and_not_with_its_launcher(args, tmp_path):
    launcher = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", sys.executable, "-c", HOLD]
    started = subprocess.Popen(
        [*launcher, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert started.stdout.readline() == "held\n"
    who = (tmp_path / "out" / LOCK).read_text()
    worker = int(who.split()[1])
    started.kill()
    started.wait()
    with pytest.raises(InputError, match=f"is being written by {who}; wait"):
        run(args)
    os.kill(worker, 9)
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists():
            break
        threading.Event().wait(0.1)
    run(args)
    assert not (tmp_path / "out" / LOCK).exists()


@pytest.mark.launch
def test_all_processes_of_a_launch_are_refused_in_one_line(args, held):
    spec = {"runs": [dataclasses.asdict(args)]}
    before = files_of(held)
    done = subprocess.run(command("ddp", spec), capture_output=True, text=True, timeout=300, env=environment("ddp"))
    assert done.returncode != 0
    assert done.stderr.count("is being written by process 7 on elsewhere") == 1, done.stderr[-3000:]
    assert files_of(held) == before


# ----------------------------------------------------------------------------------------------- a folder that takes no more


class SafetensorError(Exception):
    """As a library in another language raises it."""


FULL = {
    "a full disk": OSError(errno.ENOSPC, "No space left on device", "x"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded", "x"),
    "a file too large": OSError(errno.EFBIG, "File too large", "x"),
    "a read-only file system": OSError(errno.EROFS, "Read-only file system", "x"),
    "a broken disk": OSError(errno.EIO, "Input/output error"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch's checkpoints": RuntimeError(
        "CheckpointException ranks:dict_keys([0]) ... OSError: [Errno 28] No space left on device"
    ),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_write_that_fails_says_where_and_why_and_how_to_go_on(accelerator, tmp_path, kind):
    with pytest.raises(WriteError, match=r"^\S+ cannot be written \(.*\); .*; go on$") as error:
        within(tmp_path / "out", accelerator, FULL[kind])
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is FULL[kind]


def test_a_write_that_failed_within_another_error_is_found(accelerator, tmp_path):
    closed = ValueError("I/O operation on closed file")
    closed.__context__ = FULL["a full disk"]
    with pytest.raises(WriteError, match="No space left on device"):
        within(tmp_path / "out", accelerator, closed)


def test_the_newest_checkpoint_is_named(accelerator, tmp_path):
    for number in (4, 8):
        state = tmp_path / "out" / "pair" / "task1" / "checkpoint" / f"step-{number}" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        os.utime(state, (number, number))
    with pytest.raises(WriteError, match=r"; the newest checkpoint is \S*task1/checkpoint/step-8; make room; go on$"):
        within(tmp_path / "out", accelerator, FULL["a full disk"])


OTHER = [
    FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/x"),
    OSError(errno.EIO, "Input/output error", "/elsewhere/x"),
    ZeroDivisionError("x"),
    OSError("no number"),
    RuntimeError("[Errno 2] x"),
]


@pytest.mark.parametrize("error", OTHER)
def test_other_errors_stay_what_they_are(accelerator, tmp_path, error):
    error.__context__ = FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "out" / "nothing"))  # not its cause
    with pytest.raises(type(error)) as raised:
        within(tmp_path / "out", accelerator, error)
    assert raised.value is error


def test_a_folder_that_is_gone_is_not_the_place_of_its_lock_any_more(accelerator, tmp_path):
    with kept_for_one_run(tmp_path / "out", accelerator, ""):
        shutil.rmtree(tmp_path / "out")
        other = hold(tmp_path / "out")
    assert (tmp_path / "out" / LOCK).exists()  # another run's
    os.close(other)
