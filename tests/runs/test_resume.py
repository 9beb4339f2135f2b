"""A run that is killed and resumed ends where an uninterrupted one does, bit for bit."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support import FOLDER, arguments, command, environment, launch, same_end, state_of, stop_and_resume

from dualoptim import InputError, run

SAVE_EVERY = 4


def kill_while_running(config, args, processes, place, draw):
    """Start the run, kill every process of it at a random moment of one `place`, and say where that was."""
    task = Path(args.output_dir) / FOLDER
    log, unfinished = task / "log.jsonl", task / "checkpoint" / "unfinished"
    at = draw.choice([step for step in range(4, 21) if PLACES[place](step)])  # after the first checkpoint
    process = subprocess.Popen(
        command(config, {"runs": [dataclasses.asdict(args)]}, processes),
        env=environment(config),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.time() + 300
        while time.time() < deadline and process.poll() is None:
            lines = log.read_text().splitlines() if log.is_file() else []
            if len(lines) >= at and (place != "during a save" or unfinished.is_dir()):
                # of a step as long as the last one: anywhere in it, or between its two micro-batches
                share = draw.uniform(0.4, 0.6) if place == "within an accumulation" else draw.random()
                time.sleep(draw.random() * 0.02 if place == "during a save" else share * json.loads(lines[-1])["seconds"])
                break
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"{place}: {log.read_text().count(chr(10))} steps in the log, " + (
        "a save unfinished" if unfinished.is_dir() else "no save unfinished"
    )


STRATEGIES = {"single": ("cpu", 1), "DDP": ("ddp", 2), "ZeRO-2": ("zero2", 2), "ZeRO-3": ("zero3", 2), "FSDP2": ("fsdp2", 2)}


# where a run is killed, and after which numbers of steps that place comes; the cycle is one forget and two retain steps
PLACES = {
    "in a forget step": lambda steps: steps % 3 == 0,
    "in a retain step": lambda steps: steps % 3 != 0,
    "within an accumulation": lambda steps: True,
    "during a save": lambda steps: steps % SAVE_EVERY == 0,
}


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """The folder of a run by one strategy that nothing interrupts, once for all its kills."""
    folders = {}

    def of(strategy):
        config, processes = STRATEGIES[strategy]
        if config.startswith("zero"):
            pytest.importorskip("deepspeed")
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp("whole")
            whole = arguments(tiny, folders[strategy], "dual-adamw", batch_size=4 // processes, save_every=SAVE_EVERY)
            launch(config, {"runs": [dataclasses.asdict(whole)]}, processes)
        return folders[strategy]

    return of


def kill_and_resume(strategy, whole, tiny, folder, place, seed):
    config, processes = STRATEGIES[strategy]
    args = arguments(tiny, folder, "dual-adamw", batch_size=4 // processes, save_every=SAVE_EVERY)
    print(f"{strategy}, {kill_while_running(config, args, processes, place, random.Random(seed))}")
    launch(config, {"runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest"))]}, processes)
    same_end(whole, folder)


@pytest.mark.launch
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_killed_once_and_resumed(strategy, uninterrupted, tiny, tmp_path):
    place = list(PLACES)[len(strategy) % len(PLACES)]
    kill_and_resume(strategy, uninterrupted(strategy), tiny, tmp_path, place, seed=len(strategy))


@pytest.mark.campaign
@pytest.mark.parametrize("kill", range(10))
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_killed_at_ten_random_moments(strategy, kill, uninterrupted, tiny, tmp_path):
    place = list(PLACES)[kill % len(PLACES)]
    kill_and_resume(strategy, uninterrupted(strategy), tiny, tmp_path, place, seed=100 + kill)


# ------------------------------------------------------------------------------------------- in one process, without kills


@pytest.fixture(scope="module")
def whole_runs(tiny, tmp_path_factory):
    """The folder of a run with one optimizer in one call, once for all its stops."""
    folders = {}

    def of(optim):
        if optim not in folders:
            folders[optim] = tmp_path_factory.mktemp("whole")
            run(arguments(tiny, folders[optim], optim, save_every=3, max_steps=15))
        return folders[optim]

    return of


OPTIMIZERS = ("dual-adamw", "dual-adamw-plus", "adamw-alternate", "adamw")
STOPS = [(optim, 5) for optim in OPTIMIZERS] + [("dual-adamw", stop) for stop in (6, 11)]  # between checkpoints, and at them
STOPS += [
    pytest.param(optim, stop, marks=pytest.mark.launch, id=f"{optim}-{stop}") for optim in OPTIMIZERS[1:] for stop in (6, 11)
]


@pytest.mark.parametrize(("optim", "stop"), STOPS)
def test_resume_is_exact(tiny, tmp_path, optim, stop, whole_runs):
    stop_and_resume(arguments(tiny, tmp_path, optim, save_every=3, max_steps=15), tmp_path, stop)
    same_end(whole_runs(optim), tmp_path / "parts")


def test_checkpoints_are_pruned_and_unfinished_ones_ignored(tiny, tmp_path):
    args = arguments(tiny, tmp_path, "dual-adamw", save_every=2, keep_checkpoints=2, max_steps=9)
    run(args)
    folder = tmp_path / FOLDER / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["step-6", "step-8"]
    (folder / "unfinished").mkdir()
    trained = run(dataclasses.replace(args, resume="newest")).tasks[0]
    assert len(trained.log) == 9  # finished: nothing is trained again
    further = run(dataclasses.replace(args, resume="newest", max_steps=13)).tasks[0]
    assert further.log[:8] == trained.log[:8]
    whole = run(dataclasses.replace(args, output_dir=str(tmp_path / "whole"), max_steps=13)).tasks[0]
    one, other = state_of(whole.model), state_of(further.model)
    assert all(torch.equal(one[name], other[name]) for name in one)  # more steps of the same run, from its newest checkpoint
    with pytest.raises(InputError, match=r"has taken 12 steps, more than this run would; raise --max-steps"):
        run(dataclasses.replace(args, resume="newest", max_steps=5))


def test_a_given_checkpoint_is_taken(tiny, tmp_path):
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", save_every=3, keep_checkpoints=9, max_steps=12)
    whole = run(args)
    before = state_of(whole.tasks[0].model)
    (tmp_path / "whole" / FOLDER / "trained.json").unlink()
    again = run(dataclasses.replace(args, resume=str(tmp_path / "whole" / FOLDER / "checkpoint" / "step-3")))
    after = state_of(again.tasks[0].model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_mathematics_is_refused_and_another_place_is_not(tiny, tmp_path):
    args = arguments(tiny, tmp_path, "dual-adamw", save_every=2, max_steps=4)
    run(args)
    resumed = dataclasses.replace(args, resume="newest")
    for field, value in {"seed": 7, "batch_size": 2, "retain_freq": 3, "forget_coeff": 0.5, "adam_betas": (0.9, 0.99)}.items():
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')} was .* and is .*; give the same value"):
            run(dataclasses.replace(resumed, **{field: value}))
    state = tmp_path / FOLDER / "checkpoint" / "step-4" / "state.json"
    run(dataclasses.replace(resumed, save_every=5, threads=1, eval_batch_size=9))
    state.write_text(json.dumps({"step": 4, "processes": 3}))
    with pytest.raises(InputError, match="was written by 3 processes and this run has 1; start 3"):
        run(resumed)
    state.unlink()
    with pytest.raises(InputError, match="no checkpoint there"):
        run(resumed)
