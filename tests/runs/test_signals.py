"""A run that a signal asks to end finishes its step, writes a checkpoint, says how to go on, and does to the same bits."""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from support import FOLDER, ROOT, STRATEGIES, arguments, command, environment, launch, records, same_end, state_of

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs, run
from dualoptim.config.cli import main
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.models import checkpoint, export
from dualoptim.reporting.log import StepLog
from dualoptim.sweep import sweep


@pytest.fixture
def signal_at(monkeypatch):
    """Send this process a signal once, while the record of a step is kept: the n-th of all, from 1."""

    def send(number, signum=signal.SIGTERM):
        add, seen = StepLog.add, []

        def adding(log, record):
            add(log, record)
            seen.append(record)
            if len(seen) == number:
                signal.raise_signal(signum)

        monkeypatch.setattr(StepLog, "add", adding)

    return send


@pytest.fixture
def signal_in(monkeypatch):
    """Send it when a function of a module is called."""

    def send(module, name, signum=signal.SIGTERM):
        own, sent = getattr(module, name), []

        def called(*args, **options):
            if not sent:
                sent.append(signum)
                signal.raise_signal(signum)
            return own(*args, **options)

        monkeypatch.setattr(module, name, called)

    return send


def stopped(action, args, capsys):
    """Run a command that a signal is going to end: its exit code and the line that it says."""
    with pytest.raises(SystemExit) as end:
        # what is typed says all that a command asks for, and the action has arguments of its own
        main(type(args), lambda _: action(args), ["--model", "m", "--data", "demo", "--output-dir", "out"])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if line.startswith("stopped by")]
    return end.value.code, line


def same_models(one, other):
    one, other = state_of(one), state_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(arguments(tiny, folder, "dual-adamw", max_steps=9))
    return folder


# ------------------------------------------------------------------------------------------------------------ unlearning


@pytest.mark.parametrize(
    ("step", "signum", "save_every"),
    [(1, signal.SIGTERM, 0), (4, signal.SIGINT, 0), (6, signal.SIGHUP, 3), (7, signal.SIGUSR1, 3), (9, signal.SIGTERM, 0)],
    ids=["the first step", "without checkpoints of its own", "at one of its own", "between two of its own", "the last step"],
)
def test_a_run_ends_after_its_step_and_goes_on_to_the_same_bits(
    step, signum, save_every, whole, tiny, tmp_path, capsys, signal_at
):
    args = arguments(tiny, tmp_path, "dual-adamw", max_steps=9, save_every=save_every)
    signal_at(step, signum)
    code, line = stopped(run, args, capsys)
    kept = tmp_path / FOLDER / "checkpoint" / f"step-{step}"
    assert code == 128 + signum
    how = "to go on, give the same command with --resume"
    assert line == f"stopped by {signum.name} after step {step} of 9, kept in {kept}; {how}"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert len(records(tmp_path)) == step
    assert not (tmp_path / FOLDER / "model").exists()
    run(dataclasses.replace(args, resume="newest"))
    assert records(tmp_path) == records(whole)
    assert same_models(tmp_path / FOLDER / "model", whole / FOLDER / "model")


def test_the_line_has_the_flags_that_the_command_lacked(tiny, tmp_path, capsys, signal_at, monkeypatch):
    monkeypatch.chdir(tmp_path)
    signal_at(2)
    args = dataclasses.replace(arguments(tiny, tmp_path, "dual-adamw", overwrite=True), output_dir=None)
    _, line = stopped(run, args, capsys)
    (folder,) = (tmp_path / "runs").iterdir()
    assert line.endswith(f"give the same command with --resume --output-dir runs/{folder.name} and without --overwrite")
    log = run(dataclasses.replace(args, output_dir=f"runs/{folder.name}", resume="newest", overwrite=False)).tasks[0].log
    assert len(log) == 24


def test_a_save_is_finished_first(tiny, tmp_path, capsys, signal_in):
    signal_in(checkpoint, "write_json")  # the last file of a checkpoint
    args = arguments(tiny, tmp_path, "dual-adamw", max_steps=9, save_every=4)
    _, line = stopped(run, args, capsys)
    assert "after step 5 of 9" in line, "the next step sees it"
    assert len(run(dataclasses.replace(args, resume="newest")).tasks[0].log) == 9


def test_an_export_is_finished_first(whole, tiny, tmp_path, capsys, signal_in):
    signal_in(export, "check_saved")
    args = arguments(tiny, tmp_path, "dual-adamw", max_steps=9)
    code, line = stopped(run, args, capsys)
    assert (code, f"with {tmp_path / FOLDER / 'model'} written" in line) == (143, True)
    assert same_models(tmp_path / FOLDER / "model", whole / FOLDER / "model")
    assert json.loads((tmp_path / FOLDER / "trained.json").read_text()) == {"steps": 9}


def test_the_second_task_of_three(tiny, tmp_path, capsys, signal_at):
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", max_steps=6, task_list=(1, 2, 3))
    results = run(args).tasks
    signal_at(6 + 4)
    parts = dataclasses.replace(args, output_dir=str(tmp_path / "parts"))
    _, line = stopped(run, parts, capsys)
    assert f"after step 4 of 6, kept in {(tmp_path / 'parts' / FOLDER).parent / 'task2'}" in line
    for one, other in zip(results, run(dataclasses.replace(parts, resume="newest")).tasks, strict=True):
        assert same_models(one.model, other.model)


def test_the_evaluation_says_what_it_kept(taught, tmp_path, capsys, signal_in, monkeypatch):
    """Of a run, before its first step."""
    from dualoptim.evaluation import measure

    args = arguments(taught, tmp_path, "dual-adamw", max_steps=3, eval=True, eval_rows=2, max_new_tokens=3)
    signal_in(measure, "gradient_norms")
    own = measure.set_records

    def second(scoring, name, rows):
        if name == "retain":
            signal.raise_signal(signal.SIGTERM)
        return own(scoring, name, rows)

    monkeypatch.setattr(measure, "set_records", second)
    code, line = stopped(run, args, capsys)
    folder = tmp_path / FOLDER / "eval_before"
    assert code == 143
    assert f"while {folder} was measured, where what is finished is kept (forget); to go on" in line
    before = (folder / "forget.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(measure, "set_records", own)
    assert run(dataclasses.replace(args, resume="newest")).tasks[0].after
    assert (folder / "forget.jsonl").stat().st_mtime_ns == before


def test_loading_ends_at_once_and_leaves_nothing(tiny, tmp_path, capsys, signal_in):
    from dualoptim.models import current

    signal_in(current, "load_model")
    code, line = stopped(run, arguments(tiny, tmp_path / "out", "dual-adamw"), capsys)
    assert (code, line) == (143, "stopped by SIGTERM; give the same command again")  # there is nothing to resume
    assert not (tmp_path / "out").exists()


def test_loading_ends_with_an_earlier_result_as_it_was_and_what_would_have_replaced_it_is_to_be_typed_again(
    tiny, tmp_path, capsys, signal_in
):
    from dualoptim.models import current

    run(arguments(tiny, tmp_path / "out", "dual-adamw", max_steps=1))
    earlier = tmp_path / "out" / FOLDER / "log.jsonl"
    before = earlier.read_text()
    signal_in(current, "load_model")
    _, line = stopped(run, arguments(tiny, tmp_path / "out", "dual-adamw", overwrite=True), capsys)
    assert line == "stopped by SIGTERM; give the same command again"  # and not without --overwrite, which would resume that
    assert earlier.read_text() == before


def test_a_notebook_sees_an_interrupt_and_may_go_on(tiny, tmp_path, signal_at):
    before = signal.getsignal(signal.SIGINT)
    args = arguments(tiny, tmp_path, "dual-adamw", max_steps=5)
    signal_at(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"):
        run(args)
    assert signal.getsignal(signal.SIGINT) == before
    assert len(run(dataclasses.replace(args, resume="newest")).tasks[0].log) == 5


def test_the_demos_teaching_begins_anew(tmp_path, capsys, signal_at, monkeypatch):
    monkeypatch.setenv("DUALOPTIM_CACHE", "")
    args = UnlearnArgs(max_steps=2, eval=False, output_dir=str(tmp_path))
    signal_at(3)
    code, line = stopped(run, args, capsys)
    assert code == 143
    assert " after step 3 of " in line
    assert "which nothing keeps: this training begins anew; to go on, give the same command with --resume" in line
    assert not (tmp_path / "demo_model").exists()


# ------------------------------------------------------------------------------------------------------- other commands


@pytest.fixture(scope="module")
def lesson(tiny):
    common = {"model": str(tiny), "data": "demo", "learning_rate": 3e-3, "batch_size": 100}
    return lambda folder, **changes: FinetuneArgs(**common | {"num_epochs": 3, "output_dir": str(folder)} | changes)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        pytest.param(5, {}, id="whole epochs"),
        pytest.param(4, {"save_every": 2, "use_lora": True}, id="an adapter", marks=pytest.mark.launch),
        pytest.param(9, {"target_loss": 5.0}, id="a target", marks=pytest.mark.launch),
    ],
)
def test_fine_tuning_goes_on_to_the_same_bits(step, changes, lesson, tmp_path, capsys, signal_at):
    once = finetune(lesson(tmp_path / "once", **changes))
    signal_at(step)
    args = lesson(tmp_path / "parts", **changes)
    code, line = stopped(finetune, args, capsys)
    kept = tmp_path / "parts" / "checkpoint" / f"step-{step}"
    assert (code, kept.is_dir(), f"kept in {kept}" in line) == (143, True, True)
    resumed = finetune(dataclasses.replace(args, resume="newest"))
    logs = [[{k: v for k, v in record.items() if k != "seconds"} for record in one.log] for one in (once, resumed)]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()] == list(
        range(1, len(once.log) + 1)
    )
    assert same_models(once.model, resumed.model)
    before = (resumed.model / "README.md").stat().st_mtime_ns
    assert finetune(dataclasses.replace(args, resume="newest")).log == resumed.log
    assert (resumed.model / "README.md").stat().st_mtime_ns == before, "what has finished is not taught again"


@pytest.mark.launch
def test_fine_tuning_goes_on_with_the_same_alone(lesson, tiny, tmp_path, capsys, signal_at):
    args = lesson(tmp_path / "parts")
    signal_at(3)
    stopped(finetune, args, capsys)
    again = dataclasses.replace(args, resume="newest")
    other = tmp_path / "other"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(other)
    for changes, line in (
        ({"seed": 5}, "--resume: --seed was 1001 in .*config.yaml and is 5; give the same value"),
        ({"learning_rate": 1e-3}, "--resume: --learning-rate was 0.003 in .* and is 0.001"),
        ({"splits": ("retain50",)}, "--resume: --splits was .* give the same value"),
        ({"model": str(other)}, "--resume: (--model was|the weights of) "),
        ({"resume": str(tmp_path)}, "no checkpoint of this run; give a folder step-N in "),
        ({"resume": None}, "is an earlier result; give another folder, or --overwrite"),
    ):
        with pytest.raises(InputError, match=line):
            finetune(dataclasses.replace(again, **changes))
    assert len(finetune(dataclasses.replace(again, max_steps=4)).log) == 4
    assert len(finetune(dataclasses.replace(again, max_steps=6)).log) == 6


def test_a_sweep_ends_and_the_same_command_goes_on(taught, tmp_path, capsys, signal_at):
    args = SweepArgs(
        model=str(taught), data="demo", learning_rates=(1e-4, 2e-4, 3e-4), max_steps=4, eval=False, output_dir=str(tmp_path)
    )
    signal_at(4 + 3)
    code, line = stopped(sweep, args, capsys)
    assert code == 143
    assert line.endswith("; to go on, give the same command again")
    assert len(list(tmp_path.glob("*/finished.json"))) == 1
    assert len(list(tmp_path.glob("ME+GD_*/"))) == 2, "the third run did not begin"
    assert [path.name for path in tmp_path.glob("*/*/task1/checkpoint/*")] == ["step-3"]
    lines = sweep(args)
    assert [line.get("failed") for line in lines] == [None] * 3
    assert capsys.readouterr().out.count("finished before") == 1


def test_an_evaluation_goes_on_with_the_same_command(taught, tmp_path, capsys, signal_at):
    args = EvalArgs(
        model=str(taught), data="demo", eval_rows=2, max_new_tokens=3, relearn=4, relearn_every=2, output_dir=str(tmp_path)
    )
    signal_at(3, signal.SIGUSR1)  # in the relearning
    code, line = stopped(evaluate, args, capsys)
    assert code == 128 + signal.SIGUSR1
    assert "after step 3 of 4, which nothing keeps: this training begins anew; to go on, give the same command again" in line
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl") if path.name != "log.jsonl"}
    assert len(kept) >= 5
    assert [point.step for point in evaluate(args).attacks.relearn.curve] == [0, 2, 4]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# ---------------------------------------------------------------------------------------------- from outside, and launches


def does_the_work(process):
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile, as what the launcher asks for versions does
        return False
    return "distributed_worker.py" in line and "accelerate_configs" not in line


def workers_of(launcher, count):
    """The processes of a launch that do its work; they have sessions of their own."""
    deadline = time.time() + 120
    while time.time() < deadline:
        found = [one for one in psutil.Process(launcher.pid).children(recursive=True) if does_the_work(one)]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


def signal_while_running(config, args, processes, draw):
    """Start the run, send SIGTERM at a random moment to one worker or to all, and say where that was."""
    log = Path(args.output_dir) / FOLDER / "log.jsonl"
    at = draw.randrange(0, 24)
    launcher = subprocess.Popen(
        command(config, {"runs": [dataclasses.asdict(args)]}, processes),
        env=environment(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 300
    while time.time() < deadline and launcher.poll() is None:
        lines = log.read_text().splitlines() if log.is_file() else []
        if log.is_file() and len(lines) >= at:
            time.sleep(draw.random() * (json.loads(lines[-1])["seconds"] if lines else 0.1))
            break
        time.sleep(0.002)
    workers = workers_of(launcher, processes)
    chosen = workers if draw.random() < 0.5 else [draw.choice(workers)]
    for worker in chosen:
        worker.send_signal(signal.SIGTERM)
    sent = time.time()
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    (line,) = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("stopped by SIGTERM")]
    step = log.read_text().count("\n")
    task = log.parent
    (newest,) = (task / "checkpoint").glob("step-*")
    assert newest.name == f"step-{step}"
    assert f"after step {step} of 24, kept in {newest}; " in line or (step == 24 and "model written" in line)
    return f"| {len(lines)} | {len(chosen)} of {processes} | {step} | {time.time() - sent:.1f} |"


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    """The folder of a run by one strategy that nothing interrupts, once for all its signals."""
    folders = {}

    def of(strategy):
        config, processes = STRATEGIES[strategy]
        if config.startswith("zero"):
            pytest.importorskip("deepspeed")
        if strategy not in folders:
            folders[strategy] = tmp_path_factory.mktemp("whole")
            launch(config, {"runs": [dataclasses.asdict(run_of(strategy, tiny, folders[strategy]))]}, processes)
        return folders[strategy]

    return of


def run_of(strategy, model, folder):
    return arguments(model, folder, "dual-adamw", batch_size=4 // STRATEGIES[strategy][1], save_every=4)


def signal_and_resume(strategy, whole, model, folder, seed):
    (config, processes), args = STRATEGIES[strategy], run_of(strategy, model, folder)
    print(f"| {strategy} {signal_while_running(config, args, processes, random.Random(seed))}")
    launch(config, {"runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest"))]}, processes)
    same_end(whole, folder)


@pytest.mark.launch
@pytest.mark.parametrize(("strategy", "seed"), [("one process", 1), ("DDP", 3), ("ZeRO-3", 4), ("FSDP2", 5)])
def test_stopped_from_outside_and_resumed(strategy, seed, uninterrupted, tiny, tmp_path):
    signal_and_resume(strategy, uninterrupted(strategy), tiny, tmp_path, seed)


def start(args, processes, place):
    """Fork the processes of a run, which have imported everything already, and give their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        if pid := os.fork():
            started.append(pid)
            continue
        code = 70
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(f"{place}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            AcceleratorState._reset_state(reset_partial_state=True)
            main(UnlearnArgs, lambda _: run(args), [])
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            code = end.code
        finally:
            os._exit(code)
    return started


def ended(started):
    """Wait for forked processes, two minutes at most, and give their exit codes."""
    codes, deadline = {}, time.time() + 120
    while len(codes) < len(started):
        for pid in set(started) - set(codes):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            elif time.time() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in started]


@pytest.fixture(scope="module")
def forked(tiny, tmp_path_factory):
    """The folder of an uninterrupted run on so many forked processes."""
    folders = {}

    def of(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp("forked")
            args = arguments(tiny, folders[processes], "dual-adamw", batch_size=4 // processes, save_every=4, threads=1)
            assert ended(start(args, processes, folders[processes] / "whole")) == [0] * processes
        return folders[processes]

    return of


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_at_twenty_random_moments(processes, seed, forked, tiny, tmp_path):
    """Steps, saves and the waits between processes; the last step too."""
    draw = random.Random(seed)
    whole = forked(processes)
    args = arguments(tiny, tmp_path, "dual-adamw", batch_size=4 // processes, save_every=4, threads=1)
    log, at = tmp_path / FOLDER / "log.jsonl", draw.randrange(0, 24)
    started = start(args, processes, tmp_path / "stopped")
    lines = []
    while not log.is_file() or len(lines) < at:
        time.sleep(0.001)
        lines = log.read_text().splitlines() if log.is_file() else []
    time.sleep(draw.random() * (json.loads(lines[-1])["seconds"] if lines else 0.1))
    chosen = started if draw.random() < 0.5 else [draw.choice(started)]
    for pid in chosen:
        os.kill(pid, signal.SIGTERM)
    sent = time.time()
    assert ended(started) == [128 + signal.SIGTERM] * processes
    step = log.read_text().count("\n")
    (newest,) = (tmp_path / FOLDER / "checkpoint").glob("step-*")
    assert newest.name == f"step-{step}"
    said = "".join((tmp_path / f"stopped.{rank}.stderr").read_text() for rank in range(processes)).replace("\r", "\n")
    (line,) = [line for line in said.splitlines() if line.startswith("stopped by")]
    assert f"stopped by SIGTERM after step {step} of 24, kept in {newest}; " in line or (step == 24 and "written; " in line)
    print(f"\n| {processes} | {len(chosen)} | {len(lines)} | {step} | {time.time() - sent:.1f} |")
    again = dataclasses.replace(args, resume="newest")
    assert ended(start(again, processes, tmp_path / "resumed")) == [0] * processes
    same_end(whole, tmp_path)


@pytest.mark.launch
@pytest.mark.parametrize("strategy", list(STRATEGIES)[1:])
def test_a_peer_that_is_killed_ends_the_others_within_a_minute(strategy, tiny, tmp_path):
    (config, processes), args = STRATEGIES[strategy], run_of(strategy, tiny, tmp_path)
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    log = tmp_path / FOLDER / "log.jsonl"
    launcher = subprocess.Popen(
        command(config, {"runs": [dataclasses.asdict(args)]}, processes),
        env=environment(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    workers = workers_of(launcher, processes)
    while not (log.is_file() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    killed = workers.pop(len(strategy) % 2)
    killed.kill()
    began = time.time()
    _, left = psutil.wait_procs(workers, timeout=60)
    seconds = time.time() - began
    _, err = launcher.communicate(timeout=60)
    assert not left
    print(f"| {strategy} | {seconds:.1f} | {time.time() - began:.1f} |")
    said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(("error:", "stopped by"))]
    assert len(said) <= 1
    assert all(line.startswith("error: another process of this launch has ended; ") for line in said)
    assert err.count("Traceback") <= 1, "the launcher's own"
    if strategy == "DDP":  # once: what is left then is what `test_kills.py` goes on from
        launch(config, {"runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest"))]}, processes)


def test_a_command_from_outside_exits_with_the_signals_number(tiny, tmp_path):
    flags = f"--model {tiny} --data demo --no-eval --learning-rates 1e-3 --num-epochs 400 --output-dir {tmp_path}".split()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_unlearn.py"), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    log = tmp_path / FOLDER / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 129
    assert "Traceback" not in err
    assert f"stopped by SIGHUP after step {log.read_text().count(chr(10))} of " in err
