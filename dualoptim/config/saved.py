"""Write the arguments of a run to `config.yaml`, read them back, and compare two of them."""

import dataclasses
import importlib.metadata
import subprocess
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from dualoptim.atomic import write_text
from dualoptim.config.args import CommonArgs
from dualoptim.config.flags import default_of, flag_name, flags
from dualoptim.errors import InputError

A = TypeVar("A", bound=CommonArgs)


def to_dict(args: CommonArgs) -> dict[str, Any]:
    """Give every field as plain YAML and JSON types."""
    return to_plain(dataclasses.asdict(args))


def to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the same values with lists for tuples, as YAML and JSON give them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def load_yaml(path: str | Path, kind: type[A]) -> A:
    """Read arguments from a YAML file as `config.yaml` is written; keys under `environment` there are ignored.

    Raises:
        InputError: if the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; give a YAML file as written to config.yaml") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds no `name: value` lines; give a YAML file as written to config.yaml")
    values.pop("environment", None)
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(f"--config {path}: unknown key {name!r}; the keys are the flags of --help with _ for -")
    return kind(**{name: _convert(f"--config {path}: {name}", value, hints[name]) for name, value in values.items()})


def _convert(place: str, value: Any, hint: Any) -> Any:
    """A YAML value as the field's type: YAML reads 1e-5 as a string and a tuple as a list."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    origin, inner = typing.get_origin(target), typing.get_args(target)
    try:
        if origin is tuple and isinstance(value, list):
            if inner[-1] is not Ellipsis and len(inner) != len(value):
                raise ValueError
            return tuple(_convert(place, item, inner[0]) for item in value)
        if origin is Literal and value in inner:
            return value
        if target is float and not isinstance(value, bool):
            return float(value)
        if origin is None and type(value) is target:
            return value
        raise ValueError
    except (TypeError, ValueError):
        wanted = f"one of {', '.join(map(str, inner))}" if origin is Literal else getattr(target, "__name__", str(target))
        raise InputError(f"{place}: {value!r} has the wrong type; give {wanted}") from None


def write_config(path: Path, resolved: Mapping[str, Any]) -> None:
    """Write the resolved arguments and the environment that they ran in."""
    write_text(path, yaml.safe_dump({**resolved, "environment": environment()}, sort_keys=False, allow_unicode=True))


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
    packages = ("dualoptim", "torch", "accelerate", "transformers", "peft", "datasets", "tokenizers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"git_commit": commit, "versions": versions}


def difference(path: Path, resolved: Mapping[str, Any], kind: type, may_change: Collection[str]) -> tuple[str, Any] | None:
    """Find the first flag of `kind` that an earlier `config.yaml` says otherwise, and its value there; None if there is none.

    Flags whose `changes` is among `may_change` are not compared. A flag that is missing there, because the run is older than
    the flag, had its default.
    """
    earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    defaults = to_plain({name: default_of(kind, name) for name in flags(kind)})
    for name, flag in flags(kind).items():
        before = earlier.get(name, defaults[name])
        if flag.changes not in may_change and before != resolved[name]:
            return name, before
    return None


def check_same(path: Path, resolved: Mapping[str, Any], kind: type) -> None:
    """Make sure that a run goes on with the mathematics that its `config.yaml` says.

    Raises:
        InputError: naming the first flag that differs.
    """
    if found := difference(path, resolved, kind, may_change=("speed", "measures", "nothing")):
        name, before = found
        raise InputError(f"--resume: {flag_name(name)} was {before} in {path} and is {resolved[name]}; give the same value")
