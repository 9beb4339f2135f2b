"""Kill every process of a command at a random moment, wherever that is, and start it again: it ends at the same bits.

pytest -m launch tests/runs/test_kills.py           # each strategy killed once
pytest -m campaign -s tests/runs/test_kills.py      # each ten times; prints the table of the README
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import pytest
import torch
from support import (
    FOLDER,
    RATE,
    ROOT,
    STRATEGIES,
    Started,
    arguments,
    command,
    difference,
    environment,
    launch,
    records,
    same_end,
    state_of,
)

from dualoptim import run
from dualoptim.models.checkpoint import read_log

SAVE_EVERY = 4

# where a run is killed, and after which numbers of steps that place comes; the cycle is one forget and two retain steps
IN_STEPS = {
    "in a forget step": lambda steps: steps % 3 == 0,
    "in a retain step": lambda steps: steps % 3 != 0,
    "within an accumulation": lambda steps: True,
    "during a save": lambda steps: steps % SAVE_EVERY == 0,
}
AROUND_STEPS = {  # what shows that the place is reached, and for how many seconds it lasts at least
    "in the evaluation before": ("eval_before/*.jsonl", 0.1),
    "while it starts again": (".", 8),
    "during the export": ("model.tmp", 0.02),
    "in the evaluation after": ("eval/*.jsonl", 0.1),
}
CHAIN = [
    *("in the evaluation before", "in a forget step", "in a retain step", "during a save", "while it starts again"),
    *("within an accumulation", "during a save", "in a forget step", "during the export", "in the evaluation after"),
]


def fresh(path, since):
    """Whether something has been written there since then: not by a run before."""
    return path.exists() and path.stat().st_mtime_ns >= since


class Killed:
    """A run that is killed at places, and goes on with what it left each time."""

    def __init__(self, strategy, args, seed):
        self.config, self.processes = STRATEGIES[strategy]
        self.strategy, self.args, self.draw = strategy, args, random.Random(seed)
        self.task = Path(args.output_dir) / FOLDER
        self.table = []

    def start(self, place, at=0):
        """Start it, kill all of its processes at a random moment of the place, and note where that was."""
        since, before = time.time_ns(), read_log(self.task / "log.jsonl")
        args = dataclasses.replace(self.args, resume="newest" if self.table else None)
        line = command(self.config, {"runs": [dataclasses.asdict(args)]}, self.processes)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with Started(line, environment(self.config), **quiet) as started:
            deadline = time.monotonic() + 300
            while (wait := self.reached(place, at, since)) is None:
                assert started.process.poll() is None, f"the run ended before it could be killed {place}"
                assert time.monotonic() < deadline, f"the run did not come to be killed {place}"
                time.sleep(0.002)
            time.sleep(wait)
            assert started.process.poll() is None, f"the run ended before it could be killed {place}"
            killed = started.kill()
        assert killed > self.processes or place == "while it starts again", (
            f"{killed} processes: not even a launcher and {self.processes} workers"
        )
        now = read_log(self.task / "log.jsonl")
        self.note_where_it_went_on(before, since)
        left = [name for name in ("checkpoint/unfinished", "model.tmp") if (self.task / name).exists()]
        self.table.append([self.strategy, place, len(now), ", ".join(left) or "-", "?"])

    def reached(self, place, at, since):
        """How long to wait in a place that has been reached, None if it has not been."""
        if place in AROUND_STEPS:
            pattern, seconds = AROUND_STEPS[place]
            found = place == "while it starts again" or any(fresh(path, since) for path in self.task.glob(pattern))
            return self.draw.random() * seconds if found else None
        log, unfinished = self.task / "log.jsonl", self.task / "checkpoint" / "unfinished"
        lines = log.read_text().splitlines() if fresh(log, since) else []
        if len(lines) < at or (place == "during a save" and not fresh(unfinished, since)):
            return None
        # of a step as long as the last one: anywhere in it, or between its two micro-batches
        share = self.draw.uniform(0.4, 0.6) if place == "within an accumulation" else self.draw.random()
        return share * (0.02 if place == "during a save" else json.loads(lines[-1])["seconds"])

    def note_where_it_went_on(self, before, since):
        """Count the records that a run kept when it wrote its log anew: they say how long their steps took, others differ."""
        log = self.task / "log.jsonl"
        now = read_log(log)
        if fresh(log, since):
            same = [one == other for one, other in zip(before, now, strict=False)]
            kept = same.index(False) if False in same else len(same)
        elif len(now) == 24:
            kept = 24  # all steps had been taken
        else:
            return  # it was killed before
        for row in self.table:
            row[-1] = kept if row[-1] == "?" else row[-1]

    def end(self, whole):
        """Let it end, and compare all that it leaves with what an uninterrupted run left."""
        since, before = time.time_ns(), read_log(self.task / "log.jsonl")
        launch(self.config, {"runs": [dataclasses.asdict(dataclasses.replace(self.args, resume="newest"))]}, self.processes)
        self.note_where_it_went_on(before, since)
        for row in self.table:
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        same_end(whole, self.task.parents[1])
        for name in ("eval_before", "eval") if self.args.eval else ():
            one, other = whole / FOLDER / name, self.task / name
            assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
            for path in one.iterdir():
                assert path.read_bytes() == (other / path.name).read_bytes(), path
        print(f"{self.strategy}: {len(self.table)} kills, and the same bits as without")


def run_to_kill(strategy, tiny, folder, **changes):
    return arguments(tiny, folder, "dual-adamw", batch_size=4 // STRATEGIES[strategy][1], save_every=SAVE_EVERY, **changes)


def whole_run(strategy, tiny, folder, **changes):
    config, processes = STRATEGIES[strategy]
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    launch(config, {"runs": [dataclasses.asdict(run_to_kill(strategy, tiny, folder, **changes))]}, processes)
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_killed_once_and_resumed(strategy, tiny, tmp_path):
    whole = whole_run(strategy, tiny, tmp_path / "whole")
    killed = Killed(strategy, run_to_kill(strategy, tiny, tmp_path / "killed"), seed=len(strategy))
    place = list(IN_STEPS)[len(strategy) % len(IN_STEPS)]
    killed.start(place, killed.draw.choice([step for step in range(4, 21) if IN_STEPS[place](step)]))  # behind a checkpoint
    killed.end(whole)


@pytest.mark.campaign
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_killed_at_ten_random_moments(strategy, tiny, tmp_path):
    """One run, killed ten times on its way, ends where an uninterrupted one does."""
    evaluated = {"eval": True, "eval_rows": 6, "max_new_tokens": 24, "threads": 1}
    whole = whole_run(strategy, tiny, tmp_path / "whole", **evaluated)
    killed = Killed(strategy, run_to_kill(strategy, tiny, tmp_path / "killed", **evaluated), seed=len(strategy))
    for number, place in enumerate(CHAIN):
        earliest = 3 * (number - 1)  # further on with every kill
        steps = [step for step in range(max(1, earliest), earliest + 6) if place in IN_STEPS and IN_STEPS[place](step)]
        killed.start(place, killed.draw.choice(steps or [0]))
    killed.end(whole)


# -------------------------------------------------------------------------------------------------------- in another launch

SAMPLE = {("ZeRO-3", "one process"), ("one process", "ZeRO-2"), ("DDP", "FSDP2")}
"""Launches from one of which to the other CI goes on; all pairs are a campaign."""


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run of one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(run_to_kill("one process", tiny, folder))
    return folder


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """The folder of a run that was killed under a strategy, once for all that go on with it."""
    folders = {}

    def of(strategy):
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp("killed")
            Killed(strategy, run_to_kill(strategy, tiny, folders[strategy]), seed=1).start("in a retain step", at=10)
        return folders[strategy]

    return of


def go_on(folder, strategy, args):
    """Go on with a copy of an interrupted run under another strategy; what was said."""
    config, processes = STRATEGIES[strategy]
    spec = {"runs": [dataclasses.asdict(dataclasses.replace(args, output_dir=str(folder), resume="newest"))]}
    return launch(config, spec, processes).stdout


def same_within_rounding(whole, resumed):
    one, other = records(whole), records(resumed)
    assert [record["step"] for record in other] == list(range(1, len(one) + 1))
    for first, second in zip(one, other, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4), first["step"]
        assert (first["count"], first["tokens"]) == (second["count"], second["tokens"])
    largest, _ = difference(state_of(resumed / FOLDER / "model"), state_of(whole / FOLDER / "model"))
    assert largest <= 0.01 * RATE


@pytest.mark.launch
@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, marks=() if pair in SAMPLE else pytest.mark.campaign) for pair in permutations(STRATEGIES, 2)],
)
def test_killed_in_one_launch_and_resumed_in_another(tiny, tmp_path, whole, killed, before, after):
    pytest.importorskip("deepspeed")
    folder = shutil.copytree(killed(before), tmp_path / "run")
    said = go_on(folder, after, run_to_kill(before, tiny, folder))
    same_within_rounding(whole, folder)
    number, now = STRATEGIES[before][1], STRATEGIES[after][1]
    if number != now:
        assert f"{number} processes began this run, and {now} go on with --batch-size" in said
        assert said.count(": 8 rows a step as before") == 1


# ------------------------------------------------------------------------------------------------- the demo, an evaluation

TEACH = {"num_epochs": 4, "target_loss": 0.0}


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["one process", pytest.param("DDP", marks=pytest.mark.campaign)])
def test_killed_while_the_demo_is_taught(strategy, tmp_path, monkeypatch):
    """Twice in its steps and once in the export of what it learned: the demo begins anew, and unlearns the same weights."""
    monkeypatch.setenv("DUALOPTIM_CACHE", "")
    config, processes = STRATEGIES[strategy]
    args = arguments("demo", tmp_path / "killed", "dual-adamw", max_steps=4, save_every=2, threads=1)
    draw, taught = random.Random(len(strategy)), tmp_path / "killed" / "demo_model.tmp"
    whole = dataclasses.replace(args, output_dir=str(tmp_path / "whole"))
    launch(config, {"runs": [dataclasses.asdict(whole)], "demo_recipe": TEACH}, processes)
    for number, place in enumerate(("in a step", "in a step", "during the export")):
        spec = {
            "runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest" if number else None))],
            "demo_recipe": TEACH,
        }
        said, since = tmp_path / f"said{number}.txt", time.time_ns()
        variables = environment(config) | {"PYTHONUNBUFFERED": "1"}
        with said.open("w") as out, Started(command(config, spec, processes), variables, stdout=out, stderr=out) as started:
            wait_until(started, lambda out=said: "learn: |" in out.read_text())
            if place == "in a step":
                time.sleep(draw.uniform(0, 2))
            else:
                wait_until(started, lambda begun=since: fresh(taught, begun))
                time.sleep(draw.uniform(0, 0.02))
            assert started.process.poll() is None
            assert started.kill() > processes
        assert not (tmp_path / "killed" / FOLDER).exists()
    launch(config, {"runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest"))], "demo_recipe": TEACH}, processes)
    for name in ("demo_model", str(FOLDER / "model")):
        one, other = state_of(tmp_path / "whole" / name), state_of(tmp_path / "killed" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def wait_until(started, true):
    deadline = time.monotonic() + 300
    while not true():
        assert started.process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it did not come to where it is killed"
        time.sleep(0.002)


def evaluation(tiny, folder, strategy):
    """The line that evaluates the model, and its variables."""
    config, processes = STRATEGIES[strategy]
    flags = f"--model {tiny} --data demo --output-dir {folder} --eval-rows 8 --max-new-tokens 24 --threads 1"
    line = [*command(config, {}, processes)[:-2], "-m", "dualoptim", "eval", *flags.split()]
    return line, environment(config) | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def kill_an_evaluation(tiny, folder, strategy, sets, draw):
    """Evaluate until so many sets are finished; the times at which they were written."""
    line, variables = evaluation(tiny, folder, strategy)
    with Started(line, variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        wait_until(started, lambda: len(list((folder / "eval").glob("*.jsonl"))) >= sets)
        time.sleep(draw.uniform(0, 0.05))
        assert started.process.poll() is None
        assert started.kill() > STRATEGIES[strategy][1]
    assert not (folder / "eval" / "summary.json").exists()
    return {path.name: path.stat().st_mtime_ns for path in (folder / "eval").glob("*.jsonl")}


def evaluate_to_its_end(tiny, folder, strategy):
    line, variables = evaluation(tiny, folder, strategy)
    subprocess.run(line, check=True, env=variables, capture_output=True, timeout=300)
    return folder / "eval"


def kept(folder, before):
    """Whether the sets that had been finished, all but the last, were not written again."""
    finished = {name: time for name, time in before.items() if name != max(before, key=before.get)}
    return all((folder / name).stat().st_mtime_ns == time for name, time in finished.items())


@pytest.mark.launch
@pytest.mark.parametrize("strategy", ["one process", pytest.param("DDP", marks=pytest.mark.campaign)])
def test_an_evaluation_is_killed_and_goes_on(strategy, tiny, tmp_path):
    """Killed in three sets, it keeps those that it had finished, and ends with the same files."""
    draw = random.Random(3)
    whole = evaluate_to_its_end(tiny, tmp_path / "whole", strategy)
    for count in (1, 2, 4):
        before = kill_an_evaluation(tiny, tmp_path / "killed", strategy, count, draw)
    killed = evaluate_to_its_end(tiny, tmp_path / "killed", strategy)
    assert kept(killed, before)
    assert {path.name for path in whole.iterdir()} == {path.name for path in killed.iterdir()}
    for path in whole.iterdir():
        if path.name != "config.yaml":  # which names the folder
            assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


@pytest.mark.launch
def test_an_evaluation_goes_on_with_other_processes(tiny, tmp_path):
    """From one process to two and back, it keeps the sets that are finished, and what it adds are the same scores."""
    whole = evaluate_to_its_end(tiny, tmp_path / "whole", "one process")
    for strategy, lost in (("DDP", ("retain", "world_facts")), ("one process", ("real_authors",))):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / strategy.replace(" ", "-"))
        killed = folder / "eval"
        (killed / "summary.json").unlink()
        for name in lost:
            (killed / f"{name}.jsonl").unlink()
        times = {path: path.stat().st_mtime_ns for path in killed.glob("*.jsonl")}
        evaluate_to_its_end(tiny, folder, strategy)
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())
        for path in whole.glob("*.jsonl"):
            rows = zip(*(map(json.loads, one.read_text().splitlines()) for one in (path, killed / path.name)), strict=True)
            for first, second in rows:
                assert first.keys() == second.keys()
                for name, value in first.items():
                    assert second[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), path.name
        shutil.rmtree(tmp_path / "whole")  # what two have finished goes on with one
        shutil.copytree(folder, tmp_path / "whole")


@pytest.mark.launch
def test_workers_with_sessions_of_their_own_are_killed(tiny, tmp_path):
    """What the tests above rest on: a group of processes is not all that a launch starts."""
    args = arguments(tiny, tmp_path, "dual-adamw", max_steps=0, num_epochs=100)
    line = command("ddp", {"runs": [dataclasses.asdict(args)]}, 2)
    with Started(line, environment("ddp"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        wait_until(started, lambda: (tmp_path / FOLDER / "log.jsonl").exists())
        every = started.alive()
        assert len(every) == 3  # the launcher and two workers
        assert len({os.getsid(one) for one in every}) > 1
    assert started.alive() == []
