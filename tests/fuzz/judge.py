"""Plays one input of the fuzzer, and judges it: success, or one line and nothing written.

An input is a `Case`, whose `repr` is Python that makes it again; `again.py` plays what a failed test has printed.
"""

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from runs import test_every_architecture as architectures
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dualoptim import EvalArgs, FinetuneArgs, SweepArgs, UnlearnArgs, run
from dualoptim.config.cli import main
from dualoptim.errors import InputError, NonFiniteError, WriteError
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.memory_plan import dry_run
from dualoptim.report import ReportArgs, report
from dualoptim.sweep import sweep

SECONDS = 20  # that one input may take
LONGEST_LINE = 2000
MEMORY = 6 * 2**30  # bytes that one input may ask for, beyond what the process has: no mistake may end the machine


class Case(NamedTuple):
    """One input: a command, its flags as Python values by field or as typed, and changes to the files of the home."""

    command: str
    flags: Any
    edits: tuple[tuple[Any, ...], ...] = ()
    only_parse: bool = False


KINDS: dict[str, Any] = {
    "unlearn": (UnlearnArgs, run), "plan": (UnlearnArgs, dry_run), "eval": (EvalArgs, evaluate),
    "finetune": (FinetuneArgs, finetune), "sweep": (SweepArgs, sweep), "report": (ReportArgs, report),
}  # fmt: skip

NESTED = "<nested>"  # in a value: stands for as many brackets as no parser takes


# ---------------------------------------------------------------------------------------------------- changes to files


def edit(folder: Path, change: tuple[Any, ...]) -> None:
    """Change one file: ("write", path, bytes), ("cut", path, length), ("set", path, keys, value), ..."""
    what, name, *rest = change
    path = folder / name
    EDITS[what](path, *rest)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _splice(path: Path, share: float, removed: int, added: bytes) -> None:
    content = path.read_bytes()
    at = int(share * len(content))
    path.write_bytes(content[:at] + added + content[at + removed :])


def _folder(path: Path) -> None:
    _remove(path)
    path.mkdir(parents=True)


def _link(path: Path, target: str) -> None:
    _remove(path)
    path.symlink_to(target)


def _set(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    document = value
    if keys:
        document = read(path)
        place = document
        for key in keys[:-1]:
            place = place[key]
        if isinstance(place, list) and keys[-1] == len(place):
            place.append(value)
        else:
            place[keys[-1]] = value
    _store(path, document)


def _drop(path: Path, keys: tuple[Any, ...]) -> None:
    document = read(path)
    place = document
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    _store(path, document)


def read(path: Path) -> Any:
    """Read a file of ours as what it holds: JSON, JSON Lines or YAML."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def _store(path: Path, document: Any) -> None:
    if path.suffix == ".yaml":
        text = yaml.safe_dump(document, sort_keys=False)
    elif path.suffix == ".jsonl" or path.parent.name == "data":
        text = "".join(json.dumps(one) + "\n" for one in document) if isinstance(document, list) else json.dumps(document)
    else:
        text = json.dumps(document)
    brackets = "[" * 100_000 + "]" * 100_000
    path.write_text(text.replace(f'"{NESTED}"', brackets).replace(NESTED, brackets), encoding="utf-8")


def _tensor(path: Path, name: str, what: str) -> None:
    tensors = load_file(path)
    tensor = tensors.pop(name)
    changed = {
        "drop": {},
        "rename": {f"{name}.other": tensor},
        "nan": {name: tensor * math.nan},
        "huge": {name: tensor * 1e38},
        "transpose": {name: tensor.T.contiguous()},
        "shorten": {name: tensor[:-1].clone()},
        "integers": {name: tensor.int()},
        "half": {name: tensor.half()},
        "flat": {name: tensor.flatten()},
        "empty": {name: tensor[:0].clone()},
    }[what]
    save_file(tensors | changed, path, {"format": "pt"})


def _make(folder: Path, model_type: str, settings: dict[str, Any]) -> None:
    """Put a small model of another type in place of the one that is there, beside the tokenizer that stays."""
    kind = architectures.TYPES[model_type]
    small = architectures.smaller(kind().to_dict()) | architectures.MORE.get(model_type, {})
    config = kind(**{name: value for name, value in small.items() if value is not ...})
    for name, value in ({"is_decoder": True} | settings).items():
        with contextlib.suppress(Exception):  # some types check what they are given, and it stays
            if hasattr(config, name):
                setattr(config, name, value)
    for old in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / old).unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        except Exception:  # no such model can be made: its configuration alone is there
            (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))


EDITS = {
    "write": _write, "remove": _remove, "cut": _cut, "splice": _splice, "folder": _folder, "link": _link, "set": _set,
    "drop": _drop, "tensor": _tensor, "make": _make,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- playing


class Hang(BaseException):
    """An input took longer than it may."""


class Failure(AssertionError):
    """An input ended in something else than success or one line; `place` tells kinds apart."""

    def __init__(self, case: Case, what: str, place: str = "") -> None:
        super().__init__(f"{what}\nplay it again:\n    python tests/fuzz/again.py <<'END'\n{case!r}\nEND")
        self.what, self.place, self.case = what, place, case


def play(case: Case, home: Path, place: Path) -> str:
    """Play one input in a copy of the home in `place`, and say how it ended: "done", or the one line.

    Raises:
        Failure: if it ended otherwise, took too long, or wrote although it refused.
    """
    shutil.rmtree(place, ignore_errors=True)
    (place / "temporary").mkdir(parents=True)
    folder = place / "home"
    folder.mkdir()
    for part in home.iterdir():  # what the input names
        if part.name in repr(case):
            (shutil.copytree if part.is_dir() else shutil.copy2)(part, folder / part.name)
    for change in case.edits:
        edit(folder, change)
    (place / "case.txt").write_text(repr(case), encoding="utf-8", errors="backslashreplace")
    before = snapshot(place)
    said = io.StringIO()
    try:
        with _bounded(place), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            outcome = _act(case)
    except KeyboardInterrupt:
        raise
    except Hang:
        raise Failure(case, f"took more than {SECONDS} seconds", "hang") from None
    except BaseException as error:
        raise Failure(case, _told(error), _place(error)) from None
    if outcome == "done" or outcome.startswith(("NonFiniteError", "WriteError")):
        return outcome
    if isinstance(case.flags, list):
        _check_said(case, said.getvalue())
    if len(outcome.splitlines()) != 1 or len(outcome) > LONGEST_LINE:
        raise Failure(case, f"not one line: {outcome[:500]!r} ({len(outcome)} characters)", f"line {outcome[:20]}")
    after = snapshot(place)
    if after != before:
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise Failure(case, f"refused ({outcome}) and yet changed {changed[:8]}", f"wrote {outcome[:20]}")
    return outcome


def _act(case: Case) -> str:
    """Run the command of a case as Python or as it is typed: "done", or the line that it ends with."""
    kind, action = KINDS[case.command]
    raised: list[BaseException] = []  # before anything can make another error of it

    def act(args: Any) -> None:
        try:
            outcome = None if case.only_parse else action(bounded_work(args))
        except BaseException as error:
            raised.append(error)
            raise
        for line in outcome if case.command == "sweep" and outcome else ():
            assert line.get("failed", "InputError").startswith(("InputError", "NonFiniteError")), line["failed"]

    try:
        if isinstance(case.flags, list):
            main(kind, act, case.flags)
        else:
            act(kind(**case.flags))
    except InputError as error:
        return str(error)
    except NonFiniteError as error:
        return f"NonFiniteError: {error}"
    except WriteError as error:
        if "(Is a directory)" not in str(error):  # what a user has put in the place of a file that is written anew
            raise
        return f"WriteError: {error}"
    except SystemExit as end:
        if raised and not isinstance(raised[0], (InputError, NonFiniteError)):
            raise raised[0] from None
        if end.code == 1 and raised:
            return f"NonFiniteError: {raised[0]}"
        if end.code not in (0, 2, None):
            raise AssertionError(f"exit code {end.code}") from end
        return f"exit 2: {raised[0] if raised else 'as parsed'}" if end.code else "done"
    return "done"


def bounded_work(args: Any) -> Any:
    """The same arguments with as much work as an input of the fuzzer may have: a few steps, rows and threads."""
    bounds = {
        "max_steps": 3, "eval_rows": 2, "max_new_tokens": 3, "few_shot": 1, "sample": 2, "threads": 1,
        "gradient_accumulation_steps": 3, "batch_size": 8, "examples": 3,
    }  # fmt: skip
    change: dict[str, Any] = {}
    for name, bound in bounds.items():
        value = getattr(args, name, None)
        if value is not None and (value > bound or (value == 0 and name in ("max_steps", "threads"))):
            change[name] = bound
    if any(steps > 2 for steps in getattr(args, "relearn", ())):
        change["relearn"] = (2,)
    change |= {name: getattr(args, name)[:1] for name in ("relearn_lr", "relearn_lora") if hasattr(args, name)}
    if getattr(args, "eval", True) is False:
        change = {name: value for name, value in change.items() if name not in ("eval_rows", "max_new_tokens")}
    return dataclasses.replace(args, **change)


def _check_said(case: Case, said: str) -> None:
    """Make sure that the last thing said is one line, or the box that tyro draws around flags that do not parse."""
    lines = said.rstrip("\n").split("\n")
    errors = [line for line in lines if line.startswith("error:")]
    one_line = len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) <= LONGEST_LINE
    box = not errors and "--help" in said
    if "Traceback" in said or not (one_line or box):
        raise Failure(case, f"exit 2 without one line: {said[-1500:]}", "no line")


@contextlib.contextmanager
def _bounded(place: Path) -> Iterator[None]:
    """Work within a folder for a while, with a temporary folder of its own, an alarm, and a bound on memory."""

    def ring(*_: Any) -> None:
        raise Hang

    where, temporary, limits = Path.cwd(), tempfile.tempdir, resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    os.chdir(place / "home")
    tempfile.tempdir = str(place / "temporary")
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(where)
        tempfile.tempdir = temporary
        resource.setrlimit(resource.RLIMIT_AS, limits)


def snapshot(folder: Path) -> dict[str, str]:
    """Hash every file below a folder, and name every other thing there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsdecode(os.fsencode(path.relative_to(folder)))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-6)).strip()[-3000:]


def _place(error: BaseException) -> str:
    """The kind of an error: its type, and the last line of ours that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "/dualoptim/" in frame.filename]
    return f"{type(error).__name__} {ours[-1] if ours else ''}"


# ------------------------------------------------------------------------------------------------------------- repeating

NAMES: dict[str, Any] = {
    "Case": Case, "nan": math.nan, "inf": math.inf, "PosixPath": PosixPath, "np": np, "array": np.array,
}  # fmt: skip


def from_text(text: str) -> Case:
    """Make a case again of what a failed test has printed."""
    return eval(text, dict(NAMES))


def settle() -> None:
    """Keep what is loaded out of every later garbage collection, of which a run makes several."""
    gc.collect()
    gc.freeze()
