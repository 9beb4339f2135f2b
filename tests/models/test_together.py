"""Processes wait for each other: for long where one works on the host, for torch's time in everything else."""

# ruff: noqa: PT012 (a signal is raised, and what follows is what is tested)

import re
import signal
import subprocess

import pytest
from accelerate import Accelerator
from support import ROOT, command, environment

from dualoptim.errors import Stopped
from dualoptim.models.together import shared, stop_together, wait
from dualoptim.signals import held


def test_one_process_waits_for_nobody():
    accelerator = Accelerator(cpu=True)
    wait(accelerator)
    assert shared(accelerator, {"a": 1}) == {"a": 1}
    stop_together(accelerator, "here")


def test_every_wait_of_the_package_is_one_of_these():
    """The others would keep torch's patience, after which a long upload of the main process would end a run."""
    for path in (ROOT / "dualoptim").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        allowed = path.name in ("together.py", "cli.py")  # what a command ends with follows a `wait`
        assert allowed or not re.search("wait_for_everyone|broadcast_object_list|main_process_first|barrier", text), path


def test_one_process_stops_where_it_says():
    with pytest.raises(Stopped, match=r"^stopped by SIGUSR1 after step 3; give") as stopped, held():
        signal.raise_signal(signal.SIGUSR1)
        stop_together(Accelerator(cpu=True), "after step 3")
    assert stopped.value.agreed


def waited(what):
    """Two processes with a patience of three seconds, of which the main one takes eight before it `what`s."""
    return subprocess.run(
        command("ddp", {"what": what}, script="waiting_worker.py"),
        env=environment("ddp"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("what", ["wait", "shared", "decided"])
def test_long_work_of_one_process_on_the_host_is_waited_for(what):
    done = waited(what)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("went on") == 2


@pytest.mark.launch
def test_a_process_that_hangs_ends_the_others_in_one_line():
    done = waited("hang")
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert "error: another process of this launch has not answered for too long" in done.stderr


@pytest.mark.launch
def test_all_processes_stop_when_one_is_asked_to():
    done = waited("stop")
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert done.stderr.count("stopped by SIGUSR1 where it was; give the same command again") == 1
    assert "exitcode  : 138" in done.stderr
