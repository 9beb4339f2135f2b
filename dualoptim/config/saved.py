"""Write the arguments of a run to `config.yaml`, read them back, and compare two of them."""

import contextlib
import dataclasses
import importlib.metadata
import math
import subprocess
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from dualoptim.atomic import write_text
from dualoptim.config.args import CommonArgs, EvalArgs, FinetuneArgs, UnlearnArgs
from dualoptim.config.flags import default_of, flag_name, flags
from dualoptim.config.handed import handed_on
from dualoptim.config.opening import decoded, parse_yaml, read_bytes, read_yaml
from dualoptim.config.spelling import fields_of
from dualoptim.config.values import field_value
from dualoptim.errors import InputError, shown

A = TypeVar("A", bound=CommonArgs)

ACTING = {name for kind in (UnlearnArgs, FinetuneArgs, EvalArgs) for name, flag in flags(kind).items() if flag.acts}
"""Flags that do something in the call that they are given to, and are no settings of what it does."""

_LIBRARIES = ("torch", "accelerate", "transformers", "peft", "datasets", "tokenizers")
"""Those whose versions shape results; the last has always been the last line of a `config.yaml`."""

_GONE = ("retain_until", "retain_repeats")
"""Settings that runs had and none has any more; the first was None where it did nothing, the second did nothing without it."""

_BATCH = ("processes", "batch_size", "gradient_accumulation_steps")
"""What the number of rows of a step is the product of."""


def to_dict(args: CommonArgs) -> dict[str, Any]:
    """Give every field as plain YAML and JSON types."""
    return to_plain(dataclasses.asdict(args))


def to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the same values with lists for tuples, as YAML and JSON give them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def load_yaml(
    path: str | Path, kind: type[A], say: Callable[[str], object] = lambda line: None, given: Collection[str] = ()
) -> A:
    """Read arguments from a YAML file as `config.yaml` is written; what is under `inputs` and `environment` there is ignored.

    Of a run of another command those are taken that `kind` has itself, and a line says so (`handed_on`, which need not find
    what flags have `given`). A flag that acts is asked for in each call: older runs wrote such ones down, which is ignored,
    and a file of the user's that has one is refused.

    Raises:
        InputError: if the file is missing or not YAML, a key is unknown, a value has the wrong type, a flag acts, the model
            that a run of another command was to leave is not there, or a run is to be repeated by what is gone.
    """
    remedy = f"give {_configs_in(Path(path)) or 'a YAML file as written to config.yaml'}"
    file = Path(path).expanduser()
    lies_in_a_run = file.name == "config.yaml" and any(
        file.with_name(name).is_file() for name in ("log.jsonl", "finished.json")
    )
    # what was cut off such a file would count as its default
    values = read_written(file) if lies_in_a_run else read_yaml(f"--config {path}", path, remedy)
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds no `name: value` lines; {remedy}")
    of_a_run = wrote(values)
    for block in ("inputs", "environment", "processes"):
        values.pop(block, None)
    if of_a_run:
        if issubclass(kind, UnlearnArgs) and (was := gone(values)):
            raise InputError(f"--config {path} is of a run with {was}, which is gone; give a copy without that line")
        values = {name: value for name, value in values.items() if name not in _GONE}
        values, line = handed_on(kind, values, Path(path), given)
        say(line)
    values = fields_of(kind, values, f"--config {path}")
    found = {}
    for name, value in values.items():
        if name not in flags(kind):
            raise InputError(f"--config {path}: unknown key {shown(name)}; the keys are the flags of --help with _ for -")
        found[name] = field_value(kind, name, value, f"--config {path}: {name}")
        if flags(kind)[name].acts:
            if not of_a_run and found[name] != default_of(kind, name):
                raise InputError(
                    f"--config {path}: {name} is asked for in each call, not in a file; remove it, and give {flag_name(name)}"
                )
            del found[name]
    return kind(**as_today(found))


def as_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give settings as runs state them today: older ones state that single steps are not bounded also where nothing asks."""
    unbounded = values.get("max_update") == 0.0 and values.get("decouple", "both") not in ("m", "v")
    return {**values, "max_update": None} if unbounded else {**values}


def gone(values: Mapping[str, Any]) -> str:
    """Name the setting with which a run did what none does any more; mostly nothing."""
    until = values.get("retain_until")
    muon = (f"{name} muon" for name in ("forget_optimizer", "retain_optimizer") if values.get(name) == "muon")
    return next(muon, "") if until is None else f"retain_until {until}"


def _configs_in(path: Path) -> str:
    """Name the first file that was meant where a run's folder is given, or a file in it that is not there; mostly nothing."""
    with contextlib.suppress(OSError, ValueError):
        folder = path if path.is_dir() else path.parent
        if path.name and not path.is_file():
            return next(map(str, sorted([*folder.glob("config.yaml"), *folder.glob("*/task*/config.yaml")])), "")
    return ""


def wrote(values: Any) -> bool:
    """Tell whether a run wrote these values of a YAML file."""
    return isinstance(values, dict) and isinstance(values.get("environment"), dict) and "git_commit" in values["environment"]


def write_config(path: Path, resolved: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> None:
    """Write the resolved arguments, the hashes of what they name (rows, prompts, weights), and the environment they ran in.

    A flag that acts is left out, so that repeating a run with `--config` neither deletes nor uploads anything unasked. Where
    another number of processes began the run, the file still says so: the same command goes on with it again.
    """
    kept = {name: value for name, value in resolved.items() if name not in ACTING}
    if (begun := batch_of(path)) and math.prod(begun) == math.prod(resolved.get(name, 0) for name in _BATCH):
        kept |= dict(zip(_BATCH, begun, strict=True))
    blocks = {"inputs": dict(inputs)} if inputs else {}
    blocks["environment"] = environment()
    write_text(path, yaml.safe_dump({**kept, **blocks}, sort_keys=False, allow_unicode=True))


def read_written(path: Path) -> dict[str, Any]:
    """Read a `config.yaml` that a run of ours wrote.

    Raises:
        InputError: if it is something else, or was cut anywhere.
    """
    mend = f"put back what the run wrote, or move {path.parent} away"
    content = read_bytes(str(path), path, mend)
    found: Any = None
    with contextlib.suppress(InputError):
        found = parse_yaml(str(path), decoded(str(path), content), mend)
    versions = found["environment"].get("versions") if wrote(found) else None
    if not (isinstance(versions, dict) and _LIBRARIES[-1] in versions and content.endswith(b"\n")):
        raise InputError(f"{path} is not whole: a run's ends with the versions of libraries that it ran with; {mend}")
    return cast(dict[str, Any], found)


def earlier_value(path: Path, name: str) -> Any:
    """Read the value of one flag in a `config.yaml`; None if it has none.

    Raises:
        InputError: if it is not what was written.
    """
    return read_written(path).get(name)


def batch_of(path: Path) -> tuple[int, ...] | None:
    """Read in a `config.yaml` by how many processes it was begun, their batch size and accumulation; None if it does not say.

    Raises:
        InputError: if it is not what was written.
    """
    earlier = read_written(path) if path.exists() else {}
    found = tuple(value for name in _BATCH if type(value := earlier.get(name)) is int)
    return found if len(found) == len(_BATCH) and min(found) > 0 else None


def read_inputs(path: Path) -> dict[str, str]:
    """Read the hashes in a `config.yaml`; none if it is older than they, or not there.

    Raises:
        InputError: if it is not what was written.
    """
    found = read_written(path).get("inputs", {}) if path.exists() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: inputs is {str(found)[:60]}; put back what the run wrote, or move {path.parent} away")
    return found


def changed_input(path: Path, inputs: Mapping[str, str]) -> str | None:
    """Find the first of `inputs` that a `config.yaml` has another hash of; one that it does not know counts as the same."""
    before = read_inputs(path)
    return next((name for name, now in inputs.items() if name in before and before[name] != now), None)


def environment() -> dict[str, Any]:
    """Name the commit this code stands at (None outside a checkout) and the versions of the libraries that shape results."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {}
    for package in ("dualoptim", *_LIBRARIES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"git_commit": commit, "versions": versions}


def difference(path: Path, resolved: Mapping[str, Any], kind: type, may_change: Collection[str]) -> tuple[str, Any] | None:
    """Find the first flag of `kind` that an earlier `config.yaml` says otherwise, and its value there; None if there is none.

    Flags whose `changes` is among `may_change` are not compared, nor those that share out as many rows of a step otherwise. A
    flag that is missing there, because the run is older than the flag, had its default.

    Raises:
        InputError: if the file is not what was written.
    """
    earlier = read_written(path)
    defaults = to_plain({name: default_of(kind, name) for name in flags(kind)})
    given = {name: field_value(kind, name, earlier[name], f"{path}: {name}") for name in flags(kind) if name in earlier}
    stated = defaults | to_plain(as_today(given))
    begun = batch_of(path)
    as_many = begun and math.prod(begun) == math.prod(resolved.get(name, 0) for name in _BATCH)
    for name, flag in flags(kind).items():
        if name in ("date_string", "save_dtype") and name not in earlier:
            continue  # a run older than the flag does not know the day that its prompts named, nor the type that it saved
        if as_many and name in _BATCH:
            continue  # the rows of a step are shared out otherwise
        before = stated[name]
        if flag.changes not in may_change and before != resolved[name]:
            return name, before
    return None


def check_same(path: Path, resolved: Mapping[str, Any], kind: type) -> None:
    """Make sure that a run goes on with the mathematics that its `config.yaml` says.

    Raises:
        InputError: naming the first flag that differs, or what is gone, or if the file is not what was written.
    """
    if was := gone(read_written(path)):
        raise InputError(
            f"--resume: {path} is of a run with {was}, which is gone; drop --resume, and give another --output-dir"
        )
    if found := difference(path, resolved, kind, may_change=("speed", "measures", "nothing")):
        name, before = found
        raise InputError(f"--resume: {flag_name(name)} was {before} in {path} and is {resolved[name]}; give the same value")
