"""Processes wait for each other: for long where one works on the host, for torch's time in everything else."""

# ruff: noqa: PT012 (a signal is raised, and what follows is what is tested)

import re
import signal
import subprocess

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from support import ROOT, command, environment
from transformers import AutoModelForCausalLM

from dualoptim.errors import Stopped
from dualoptim.models import together
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


def test_who_has_no_more_calls_of_its_own_goes_on_until_all_are_done(monkeypatch):
    said, others = [], iter([1, 1, 0])  # two calls of other processes are left

    def largest(_, value):
        said.append(bool(value))
        return value or next(others)

    monkeypatch.setattr(together, "largest", largest)
    model, calls = torch.nn.Linear(2, 2), []
    with together.in_step(Accelerator(cpu=True), model, lambda: calls.append("joined")):
        model(torch.ones(2))
        assert calls == []
    assert said == [True, False, False, False]
    assert calls == ["joined", "joined"]
    model(torch.ones(2))
    assert len(said) == 4, "said within alone"


@pytest.mark.parametrize("through", ["the adapter", "the model within it"])
def test_a_call_through_an_adapter_is_told_once(through, tiny, monkeypatch):
    told = []
    monkeypatch.setattr(together, "largest", lambda _, value: told.append(value))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    ids = torch.ones(1, 3, dtype=torch.long)
    with together.in_step(Accelerator(cpu=True), model, lambda: None):
        if through == "the adapter":
            model(input_ids=ids)
        else:
            model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
        assert told == [True]


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
