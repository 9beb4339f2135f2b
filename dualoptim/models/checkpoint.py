"""Write checkpoints, from which a run that was killed goes on at the same bits, and find and read them."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from dualoptim.atomic import read_json, write_json
from dualoptim.config.args import NEWEST
from dualoptim.errors import InputError, blamed, reason
from dualoptim.method.engine import Engine
from dualoptim.models.launch import decided, say
from dualoptim.models.portable import read_parts, write_parts
from dualoptim.models.together import wait

_READ_BYTES = 2**24


@dataclass(frozen=True)
class State:
    """Holds what a checkpoint says of itself, in `state.json`."""

    step: int  # the number of steps taken
    processes: int
    files: dict[str, int]  # the CRC-32 of every other file
    bound: str = ""  # the launches that alone can read it, because of states in bytes


def save_checkpoint(engine: Engine, folder: Path, step: int, keep: int) -> None:
    """Write everything that a run needs to go on after `step` steps: weights, both banks, random states.

    Streams and rates are functions of the step and need nothing. Written beside and renamed, so that a kill at any moment
    leaves whole checkpoints only; older ones than the newest `keep` are removed.
    """
    accelerator, beside, target = engine.accelerator, folder / "unfinished", folder / f"step-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        beside.mkdir()
    wait(accelerator)
    try:
        _write_state(engine, beside, step)
    except Exception:  # of a full disk, which libraries put into kinds of their own
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    wait(accelerator)


def _write_state(engine: Engine, folder: Path, step: int) -> None:
    """Write the files of a checkpoint, and what they are."""
    accelerator = engine.accelerator
    names, portable = write_parts(engine, folder)
    files = dict(gather_object([(name, _checksum(folder / name)) for name in names]))
    bound = "" if all(gather_object([portable])) else _launch(accelerator)
    if accelerator.is_main_process:
        write_json(folder / "state.json", asdict(State(step, accelerator.num_processes, files, bound)))


def load_checkpoint(engine: Engine, path: Path) -> None:
    """Put what `save_checkpoint` wrote, in whatever launch, into weights, banks and (of as many processes) random states.

    Raises:
        InputError: if it does not fit.
    """
    with blamed("--resume", path, "give another folder step-N beside it, or begin anew with --overwrite"):
        read_parts(engine, path)


def _launch(accelerator: Accelerator) -> str:
    """Say which launches cut states in bytes as this one does."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return f"{accelerator.num_processes} processes of ZeRO-{plugin.zero_stage}" if plugin else "one process, or DDP"


def _own(accelerator: Accelerator, names: Sequence[str]) -> Sequence[str]:
    """Pick this process's share of the files of a checkpoint."""
    return names[accelerator.process_index :: accelerator.num_processes]


def _checksum(path: Path) -> int:
    """Compute the CRC-32 of a file, which finds what a disk or a copy does to it at three times the speed of SHA-256."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            value = zlib.crc32(part, value)
    return value


# ------------------------------------------------------------------------------------------------------- where a task goes on


def list_checkpoints(folder: Path) -> list[Path]:
    """List the whole checkpoints of a task, the newest last."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Read the number of steps that a checkpoint has taken, as its folder's name says."""
    return int(path.name.removeprefix("step-"))


def choose_checkpoint(accelerator: Accelerator, task: Path, resume: str, last_step: int) -> Path | None:
    """Choose where a task goes on: from the checkpoint that `resume` names if it is its own, or from its newest that is whole.

    A newer one that is damaged, or ahead of log.jsonl, is passed over and named. None if the task has no checkpoint. Of a task
    that has finished nothing but the newest one's `state.json` is looked at.

    Raises:
        InputError: if none of them will do, the run would end before it, or it has states in bytes that another launch cut.
    """
    given = None if resume == NEWEST else Path(resume).expanduser()
    named = given is not None and given.resolve().parent == (task / "checkpoint").resolve()
    own = [given] if given and named else decided(accelerator, lambda: list_checkpoints(task / "checkpoint")[::-1])
    finished = decided(accelerator, lambda: finished_log(task, last_step) is not None)
    trouble = ""
    for path in own[:1] if finished else own:
        state = decided(accelerator, partial(_read_state, accelerator, path, last_step))
        problem = state if isinstance(state, str) else "" if finished else _damage(accelerator, path, state)
        if not problem:
            if trouble:
                say(accelerator, f"--resume: {trouble}; going on from {path.name}")
            return path
        trouble = trouble or f"{path}: {problem}"
    if trouble and named:
        raise InputError(f"--resume {trouble}; give another folder step-N beside it, or --resume alone for the newest")
    if trouble:
        raise InputError(f"--resume: {trouble}, and there is no other one to go on from; begin anew with --overwrite")
    return None


def _read_state(accelerator: Accelerator, path: Path, last_step: int) -> State | str:
    """Read what a checkpoint says of itself, or tell why it cannot be taken and an earlier one may.

    Raises:
        InputError: if no other one would do either.
    """
    try:
        found = read_json(path / "state.json", {"step": int, "processes": int, "files": dict}, "")
        if "optimizer.bin" in found["files"] or not any(name.startswith("part-") for name in found["files"]):
            return "an older version of this program wrote it"
        state = State(**found)
    except (InputError, TypeError):
        return "its state.json is not what was written" if (path / "state.json").exists() else "no checkpoint there"
    if state.bound and state.bound != _launch(accelerator):
        raise InputError(
            f"--resume: {path} has optimizer states in bytes, as {state.bound} cut them, and not {_launch(accelerator)}; "
            f"start {state.bound}"
        )
    if state.step != step_of(path):
        return f"it says that it is of step {state.step}"
    if state.step > last_step:
        raise InputError(f"--resume: {path} has taken {state.step} steps, more than this run would; raise --max-steps")
    logged = len(read_log(path.parent.parent / "log.jsonl"))
    if state.step > logged:
        return f"it is ahead of log.jsonl, which has {logged} steps"
    return state


def _damage(accelerator: Accelerator, path: Path, state: State) -> str:
    """Tell what is wrong with the files of a checkpoint, nothing if they are whole; processes share them and agree."""
    own = _own(accelerator, sorted(state.files))
    return min(gather_object([problem for name in own for problem in _wrong(path / name, state.files[name])]), default="")


def _wrong(file: Path, checksum: int) -> Iterator[str]:
    try:
        if _checksum(file) != checksum:
            yield f"{file.name} is not what was written"
    except FileNotFoundError:
        yield f"{file.name} is missing"
    except OSError as error:
        yield f"{file.name} cannot be read ({reason(error)})"


def finished_log(task: Path, last_step: int) -> list[dict[str, Any]] | None:
    """Read the records of a task that an earlier run has finished, None if `last_step` steps of it have not been taken yet.

    Raises:
        InputError: if its log.jsonl does not hold them.
    """
    trained, log = task / "trained.json", task / "log.jsonl"
    remedy = "remove it, and --resume goes on from the newest checkpoint"
    found = read_json(trained, {"steps": int}, remedy) if trained.exists() else {}
    last_step = found["steps"] if found.get("ended") else last_step  # where a limit has ended it, and not the plan
    if found.get("steps") != last_step:
        return None
    records = read_log(log)
    if len(records) != last_step:
        raise InputError(
            f"--resume: {log} has {len(records)} of the {last_step} steps that {trained.name} beside it counts; put it back, "
            "or begin anew with --overwrite"
        )
    return records


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of log.jsonl up to the first line that is missing, or that a kill or a full disk has cut."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            record = json.loads(line)
            if record["step"] != len(records) + 1:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        records.append(record)
    return records


def discard_after(task: Path, step: int) -> None:
    """Remove what a task holds of later steps than `step`: another history is going to be written there."""
    (task / "trained.json").unlink(missing_ok=True)
    for path in [*list_checkpoints(task / "checkpoint")[::-1], *list_checkpoints(task / "steps")]:
        if step_of(path) > step:
            shutil.rmtree(path)
