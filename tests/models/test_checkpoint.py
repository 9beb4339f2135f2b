"""Checkpoints: whole or not there, and the newest kept."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from dualoptim import InputError
from dualoptim.config.args import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.method.engine import prepare
from dualoptim.method.groups import decay_groups
from dualoptim.models import checkpoint
from dualoptim.models.checkpoint import choose_checkpoint, list_checkpoints, load_checkpoint, read_log, save_checkpoint


@pytest.fixture
def engine():
    args = UnlearnArgs()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return prepare(Accelerator(cpu=True), model, kind_of(args).build(args)(decay_groups(model, 0.01)))


def take_steps(engine, phases):
    for phase in phases:
        engine.use_phase(phase, 1e-2)
        for parameter in engine.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        engine.step(0.0, torch.zeros(0))


def test_the_newest_are_kept_in_their_order(engine, tmp_path):
    for step in (2, 9, 10):
        save_checkpoint(engine, tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]
    state = json.loads((tmp_path / "step-10" / "state.json").read_text())
    assert (state["step"], state["processes"]) == (10, 1)
    assert sorted(state["files"]) == ["part-0-1.safetensors", "random-0.safetensors"]


def test_weights_banks_and_random_states_come_back(engine, tmp_path):
    take_steps(engine, ("forget", "retain", "retain"))
    save_checkpoint(engine, tmp_path, 3, keep=1)
    take_steps(engine, ("forget", "retain"))
    expected = [parameter.detach().clone() for parameter in engine.model.parameters()]
    take_steps(engine, ("forget",))  # and somewhere else
    load_checkpoint(engine, tmp_path / "step-3")
    take_steps(engine, ("forget", "retain"))
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), expected, strict=True))


def test_a_kill_during_a_save_leaves_the_earlier_one_whole(engine, tmp_path, monkeypatch):
    save_checkpoint(engine, tmp_path, 4, keep=1)
    monkeypatch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(engine, tmp_path, 8, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4"]
    monkeypatch.undo()
    save_checkpoint(engine, tmp_path, 8, keep=1)  # what was unfinished is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]


def test_what_is_no_checkpoint_or_of_another_launch_is_refused(engine, tmp_path):
    folder = tmp_path / "checkpoint" / "step-3"
    folder.mkdir(parents=True)
    for text in (None, "{", "[]", '{"step": 3}'):
        if text:
            (folder / "state.json").write_text(text)
        said = "its state.json is not what was written" if text else "no checkpoint there"
        with pytest.raises(InputError, match=rf"--resume: .*step-3: {said}, and there is no other one"):
            choose_checkpoint(engine.accelerator, tmp_path, "newest", 9)
        with pytest.raises(InputError, match=rf"--resume .*step-3: {said}; give another folder step-N beside it"):
            choose_checkpoint(engine.accelerator, tmp_path, str(folder), 9)
    for state, said in (
        (
            {"step": 3, "processes": 2, "files": {"optimizer.bin": 1, "model.safetensors": 2}},
            "an older version of this program",
        ),
        (
            {"step": 3, "processes": 2, "files": {"part-0-1.safetensors": 1}, "bound": "2 processes of ZeRO-2"},
            "states in bytes, as 2 processes of ZeRO-2 cut them, and not one process, or DDP; start 2 processes of ZeRO-2",
        ),
    ):
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match=said):
            choose_checkpoint(engine.accelerator, tmp_path, "newest", 9)


def test_the_log_is_read_as_far_as_it_is_whole(tmp_path):
    log = tmp_path / "log.jsonl"
    assert read_log(log) == []
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    for text, whole in (
        ("\n".join(lines), 4),
        ("\n".join(lines)[:-3], 3),
        ("\n".join([*lines[:2], "", *lines[2:]]), 2),
        ("\n".join([lines[0], *lines[2:]]), 1),
        ("\n".join([*lines[:2], "[3]", lines[3]]), 2),
        ("\n".join(lines[1:]), 0),
    ):
        log.write_text(text)
        assert [record["step"] for record in read_log(log)] == [1, 2, 3, 4][:whole]


def test_a_task_without_checkpoints_has_none(tmp_path):
    assert list_checkpoints(Path(tmp_path) / "checkpoint") == []
