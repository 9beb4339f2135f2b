"""A signal becomes an exception: at once, or when what must not be cut in two is done; a second one ends the process."""

# ruff: noqa: PT012 (a signal is raised, and what follows is what is tested)

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from accelerate import Accelerator

from dualoptim import UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.errors import PeerError, Stopped, with_peers
from dualoptim.models.lock import kept_for_one_run
from dualoptim.signals import ASKING, asked, at_once, heard, held


@pytest.mark.parametrize("signum", ASKING, ids=lambda signum: signum.name)
def test_a_signal_stops_at_once_and_no_handler_of_failures_takes_it(signum):
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped, heard():
        try:
            signal.raise_signal(signum)
        except Exception:
            pytest.fail("it passed for a failure")
    assert stopped.value.signum == signum
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert str(stopped.value) == f"stopped by {signum.name}; give the same command again"
    assert signal.getsignal(signum) == before
    assert asked() == 0


def test_what_must_not_be_cut_in_two_is_done_first():
    done = []
    with pytest.raises(Stopped), heard():
        with held():
            signal.raise_signal(signal.SIGTERM)
            with held():
                done.append(asked())
            done.append("inner blocks do not end the outer one")
        pytest.fail("the signal was forgotten")
    assert done == [signal.SIGTERM, "inner blocks do not end the outer one"]


def test_a_failure_is_told_before_a_signal():
    with pytest.raises(ZeroDivisionError), held():
        signal.raise_signal(signal.SIGTERM)
        _ = 1 / 0
    with heard(), held():
        assert asked() == 0, "the next command has been asked nothing"


def test_a_part_of_what_waits_may_stop_at_once():
    with pytest.raises(Stopped), held():
        with at_once():
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("it waited")
    with pytest.raises(Stopped), held():
        signal.raise_signal(signal.SIGTERM)
        with at_once():
            pytest.fail("it began")


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with heard(), held():
            signal.raise_signal(signal.SIGHUP)
            assert asked() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_hears_nothing_and_changes_nothing():
    handlers = []

    def listen():
        with heard(), held():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


WAITING = """
import time
from dualoptim.signals import heard, held
with heard(), held():
    print("ready", flush=True)
    end = time.time() + 3
    while time.time() < end:
        time.sleep(0.05)
"""


@pytest.mark.parametrize(("pause", "code"), [(0.7, -signal.SIGTERM), (0.05, 1)], ids=["later", "sent twice by a launcher"])
def test_a_second_signal_ends_at_once(pause, code):
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    began = time.time()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, time.time() - began < 1.5) == (code, code != 1)
    assert (b"Stopped" in err) == (code == 1)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda signum: signum.name)
def test_a_command_says_how_to_go_on_and_exits_with_the_signals_number(signum, capsys, tmp_path):
    def action(args):
        with kept_for_one_run(tmp_path, Accelerator(cpu=True), "to go on, give the same command with --resume"):
            time.sleep(0.02)  # a file system tells times apart by some milliseconds
            (tmp_path / "log.jsonl").write_text("")
            os.kill(os.getpid(), signum)
            time.sleep(5)

    with pytest.raises(SystemExit) as end:
        main(UnlearnArgs, action, [])
    assert end.value.code == 128 + signum
    assert capsys.readouterr().err == f"stopped by {signum.name}; to go on, give the same command with --resume\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234", "has ended"),
        ("NCCL error ... ncclRemoteError: a remote process exited or there was a network error", "has ended"),
        ("[buffer.cc:72] Timed out waiting 1800000ms for recv operation to complete", "has not answered for too long"),
    ],
)
def test_a_launch_whose_peer_is_gone_ends_in_one_line(text, line, capsys):
    def action(args):
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as end:
        main(UnlearnArgs, action, [])
    assert end.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: another process of this launch {line}; what it says itself tells why.")


def test_the_launchers_own_signal_does_not_hide_that_a_peer_is_gone():
    with pytest.raises(PeerError), with_peers(), heard():
        try:
            raise RuntimeError("Connection closed by peer")
        finally:
            signal.raise_signal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="another failure"), with_peers():
        raise RuntimeError("another failure")
