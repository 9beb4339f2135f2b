"""Processes that train in turns, so that their speeds can be compared on a machine that is not always equally fast.

Each contestant is a process of its own (peak memory only grows, and belongs to a process), takes one optimizer step when it is
told to, and says then what it has done.

    python contest.py '{"kind": "run" | "limit" | "trainer", "args": {fields of UnlearnArgs}, ...}'
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Contestant:
    """A training process. It starts at once, and takes its first step on its own."""

    def __init__(self, kind: str, args: dict[str, Any], **options: Any) -> None:
        self.times: list[tuple[str, float, int]] = []  # phase, seconds and tokens of each step that was asked for
        self.worked: list[float] = []  # CPU seconds of each of them, which what else runs on the machine does not move
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        spec = {"kind": kind, "args": args, "launched": time.time(), **options}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.first = self.last = self._reply() or {}

    def step(self) -> bool:
        """Take one step; False if there is none left."""
        started = time.perf_counter()
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        reply = self._reply()
        if reply is None:
            return False
        self.times.append((reply["phase"], time.perf_counter() - started, reply["tokens"]))
        self.worked.append(reply["cpu"] - self.last["cpu"])
        self.last = reply
        return True

    def end(self) -> None:
        """Stop it; what it said remains."""
        self._process.stdin.close()
        self._process.wait()

    def cycle_seconds(self) -> list[float]:
        """Seconds of each forget step together with the retain step after it."""
        seconds = [time for _, time, _ in self.times]
        return [sum(pair) for pair in zip(seconds[::2], seconds[1::2], strict=False)]

    def tokens(self) -> int:
        """Tokens of one cycle, the mean over all."""
        return sum(tokens for _, _, tokens in self.times) * 2 // len(self.times)

    def _reply(self) -> dict[str, Any] | None:
        line = self._process.stdout.readline()
        if not line and self._process.wait():
            self._errors.seek(0)
            raise SystemExit(self._errors.read()[-3000:])
        return json.loads(line) if line else None


def in_turns(contestants: dict[str, Contestant], rounds: int) -> None:
    """Let each take a forget and a retain step a round, after the retain step that follows its first forget step."""
    for contestant in contestants.values():
        contestant.step()
        contestant.times.clear()
        contestant.worked.clear()
    for _ in range(rounds):
        for contestant in contestants.values():
            contestant.step()
            contestant.step()


def spread(ratios: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.{digits}f} ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"


# ------------------------------------------------------------------------------------------------- in the processes


class Turn:
    """A contestant's own side."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes elsewhere

    def over(self, phase: str, tokens: int, **more: Any) -> None:
        """Say what was done, and wait."""
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        said = {"phase": phase, "tokens": tokens, "peak": int(peak.split()[1]) * 1024, "cpu": time.process_time(), **more}
        print(json.dumps(said), file=self._answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)


def windows(args: Any, loaded: Any) -> Iterator[tuple[str, Any, list[list[Any]]]]:
    """Phase, objective and micro-batches of every step that `run(args)` would take."""
    from dualoptim.config.product import single_runs
    from dualoptim.data.own import load_refusals, open_source
    from dualoptim.method.schedule import phase_at, phase_step
    from dualoptim.models.work import TaskRows, work_of

    (one,), source, task = list(single_runs(args)), open_source(args), args.task_list[0]
    rows = TaskRows(source.task_rows(args.split[0], task), source.retain_rows(args.split[0], [task]), load_refusals(None))
    work = work_of(one, rows, loaded)
    for step in range(work.plan.last_step):
        name = phase_at(step, work.plan.cycle)
        (term,) = work.phases[name].terms.values()
        yield name, term.objective, list(term.micro_batches.stream.window(phase_step(step, work.plan.cycle)))


def limit(args: Any, turn: Turn) -> None:
    """A bare loop: forward and backward over the batches of `run(args)`, cross-entropy of the scored tokens, one fused AdamW.

    Attention and the tokens that texts share are those of `run`; logits are computed where a token is scored and nowhere else;
    batches are ready before the first step.
    """
    import torch

    from dualoptim.models.launch import start_accelerator
    from dualoptim.models.load import load_model

    loaded = load_model(args, start_accelerator(args))
    batches = [(name, loaded.batch(texts)) for name, _, (texts,) in windows(args, loaded)]
    loaded.model.train()
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-6, fused=True)
    for name, batch in batches:
        given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
        logits = loaded.model(**given, logits_to_keep=batch.keep, use_cache=False, **batch.places).logits[0]
        each = logits if len(logits) == len(batch.labels) else logits[batch.column]
        torch.nn.functional.cross_entropy(each, batch.labels).backward()
        del logits, each
        optimizer.step()
        optimizer.zero_grad()
        turn.over(name, batch.num_tokens)


def ours(args: Any, turn: Turn, launched: float) -> None:
    """`run(args)`, held after each step. The first step also says what the seconds before it went into."""
    from dualoptim import unlearn
    from dualoptim.data.prompts import Formatter
    from dualoptim.models import current
    from dualoptim.models.reference import Frozen
    from dualoptim.reporting.log import StepLog

    spent = {"imports": time.time() - launched}

    def timed(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def measured(*arguments: Any, **options: Any) -> Any:
            started = time.time()
            try:
                return original(*arguments, **options)
            finally:
                spent[label] = spent.get(label, 0.0) + time.time() - started

        setattr(owner, name, measured)

    timed(current, "load_model", "model")
    timed(Formatter, "check", "tokens")
    timed(Frozen, "__init__", "reference")
    timed(Frozen, "score", "reference")
    add = StepLog.add

    def add_and_wait(log: Any, record: dict[str, Any]) -> None:
        add(log, record)
        first = {"start": time.time() - launched, "spent": spent, "step": record["seconds"]} if len(log.records) == 1 else {}
        turn.over(record["phase"], record["tokens"], **first)
        if record["phase"] not in ("forget", "retain"):  # one step of both
            turn.over(record["phase"], 0)

    StepLog.add = add_and_wait
    unlearn.run(args)


def main() -> None:
    """Take part."""
    turn, spec = Turn(), json.loads(sys.argv[1])
    os.environ["ACCELERATE_MIXED_PRECISION"] = spec.get("precision", "no")  # as `accelerate launch` sets it
    from dualoptim import UnlearnArgs

    args = UnlearnArgs(**{key: tuple(value) if isinstance(value, list) else value for key, value in spec["args"].items()})
    if spec["kind"] == "run":
        ours(args, turn, spec["launched"])
    elif spec["kind"] == "limit":
        limit(args, turn)
    else:
        from trainer import train_plainly

        train_plainly(args, turn, spec.get("pad_to"), spec.get("joint", False))


if __name__ == "__main__":
    main()
