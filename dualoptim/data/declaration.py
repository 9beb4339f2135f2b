"""Read what a benchmark declares in YAML: its rows, what is forgotten, kept and measured, its scores, what was published.

The package has some by name in `benchmarks/`; `--benchmark` takes the path of one's own as well.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from dualoptim.config.args import MeasureArgs
from dualoptim.config.opening import read_yaml
from dualoptim.errors import InputError, shown

Filter = Mapping[str, str]
"""Patterns as of a shell (`*sc1`, `*qa[0-4]`) by the columns whose texts have to match them."""

_FOLDER = resources.files("dualoptim.data").joinpath("benchmarks")


@dataclass(frozen=True)
class RowsOf:
    """Says where some rows of a benchmark stand, how they are put to a model, and how they are measured."""

    file: str = ""  # of --data; or configuration:split of a data set in the hub's layout
    like: str = ""  # an entry whose settings hold here as well
    optional: bool = False  # whether the file may be missing
    where: Filter = field(default_factory=dict)  # all others are left out
    groups: Mapping[str, Filter] = field(default_factory=dict)  # with means of their own
    question: str = "question"  # the columns
    answer: str = "answer"
    text: str = ""  # the column of passages
    join: str | None = None  # what passages are joined by, before they are cut into pieces of --max-length tokens
    prompt: str = ""  # the question and what stands around it, as `Question: {question}`; "": the model's template
    examples: str = ""  # file of the same columns that is put before the prompt
    example: str = ""  # a row of it, with {question} and {answer}
    tokens: int = 0  # of the model's own answer, at most; 0: --max-new-tokens
    stop: tuple[str, ...] = ()  # the model's answer ends before the first of each, one after the other
    answer_tokens: int = 0  # the true answer is cut to so many, the one that the tokenizer puts first among them; 0: all count
    end: bool = True  # whether an end token follows the text
    metrics: tuple[str, ...] = ()  # beside those that every set has


@dataclass(frozen=True)
class ScoreOf:
    """Says what a score of a benchmark is made of; `of` is arithmetic on metrics of sets, on scores above it and on numbers."""

    of: str = ""
    title: str = ""
    should: str = "rise"
    instead_of: str = ""  # a score above it, which this one stands for where that is missing


@dataclass(frozen=True)
class Published:
    """What others report: scores by method, and where."""

    source: str = ""
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Declaration:
    """What a benchmark declares."""

    name: str = ""
    about: str = ""
    source: str = ""
    data: str = ""  # the hub's data set, where --data is not given
    get: str = ""  # how to come by the data, where there is no such
    rows: Mapping[str, RowsOf] = field(default_factory=dict)
    forget: tuple[str, ...] = ()  # entries of `rows`, one for each task
    retain: str = ""
    measure: tuple[str, ...] = ()
    scores: Mapping[str, ScoreOf] = field(default_factory=dict)
    published: Published = field(default_factory=Published)
    presets: Mapping[str, Any] = field(default_factory=dict)  # read by config/presets.py

    def sets(self) -> list[str]:
        """Name all sets that can have scores: those that are measured, and their groups."""
        return [name for entry in self.measure for name in (entry, *(f"{entry}_{group}" for group in self.rows[entry].groups))]


def benchmarks() -> list[str]:
    """Name the benchmarks of the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))


def read_declaration(benchmark: str) -> Declaration:
    """Read a benchmark by its name in the package, or by the path of a .yaml file.

    Raises:
        InputError: naming file and key, if there is none or a part of it is wrong.
    """
    where = f"--benchmark {benchmark}"
    raw = _read(benchmark, where)
    rows = raw.get("rows")
    if isinstance(rows, dict):
        raw["rows"] = {key: _like(rows, key, where) for key in rows}
    found: Declaration = _built(Declaration, {"name": Path(benchmark).stem, **raw}, where)
    for key, entry in found.rows.items():
        if not entry.file:
            raise InputError(f"{where}: rows.{key} has no file; name one of --data")
    named = {"forget": found.forget, "retain": (found.retain,) if found.retain else (), "measure": found.measure}
    for key, entries in named.items():
        for name in entries:
            if name not in found.rows:
                raise InputError(f"{where}: {key} names {name!r}; rows has {', '.join(found.rows) or 'no entry'}")
    if not found.forget:
        raise InputError(f"{where}: nothing is forgotten; name an entry of rows under forget")
    if "forget" not in found.measure:
        raise InputError(f"{where}: measure lacks forget; one of its sets has that name")
    return found


def _read(name: str, where: str) -> dict[str, Any]:
    """Read the YAML of a declaration over that which it extends."""
    packaged = name in benchmarks()
    if not packaged and not name.endswith((".yaml", ".yml")):
        raise InputError(f"{where}: no such benchmark; take {', '.join(benchmarks())}, or give a .yaml file of your own")
    path = str(_FOLDER.joinpath(f"{name}.yaml")) if packaged else name
    raw = read_yaml(where, path, "data/README.md shows a whole one")
    if not isinstance(raw, dict):
        raise InputError(f"{where}: holds no `name: value` lines; data/README.md shows a whole one")
    if (other := raw.pop("extends", None)) is None:
        return raw
    if other not in benchmarks():
        raise InputError(f"{where}: extends is {shown(other)}; take {', '.join(benchmarks())}")
    return _over(_read(other, where), raw)


def _over(below: Any, above: Any) -> Any:
    """Lay a value over another, key by key where both have keys."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {
        key: _over(below[key], above[key]) if key in below and key in above else (below | above)[key] for key in below | above
    }


def _like(rows: Mapping[str, Any], key: str, where: str) -> Any:
    """Take what an entry does not say from the one that it is like."""
    own = rows[key]
    if not isinstance(own, dict) or "like" not in own:
        return own
    other = own["like"]
    if not isinstance(rows.get(other), dict) or "like" in rows[other]:
        raise InputError(f"{where}: rows.{key}.like is {shown(other)}; name an entry that is not itself like another")
    return rows[other] | own


def _built(kind: Any, raw: Any, where: str) -> Any:
    """Make a value of a type that declarations have of what YAML says.

    Raises:
        InputError: naming the key, if it is unknown or its value has another type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(kind, "__dataclass_fields__"):
        hints, names = typing.get_type_hints(kind), [one.name for one in fields(kind)]
        for key in _mapping(raw, where):
            if key not in names:
                raise InputError(f"{where}: unknown key {shown(key)}; take {', '.join(names)}")
        return kind(**{key: _built(hints[key], value, _under(where, key)) for key, value in raw.items()})
    if origin is tuple:
        return tuple(_built(inner[0], one, where) for one in (raw if isinstance(raw, list) else [raw]))
    if kind is Any:
        return raw
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {str(key): _built(inner[1], value, _under(where, key)) for key, value in _mapping(raw, where).items()}
    wanted = next(one for one in (inner or (kind,)) if one is not type(None))
    if wanted is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if type(raw) is not wanted or (wanted is int and raw < 0):
        raise InputError(f"{where} is {shown(raw)}; give {_NAMES[wanted]}")
    return raw


_NAMES = {str: "a text", int: "a whole number from 0", float: "a number", bool: "true or false"}


def _mapping(raw: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"{where} is {shown(raw)}; give `name: value` lines")
    return raw


def _under(where: str, key: object) -> str:
    """Name a key of a declaration: `--benchmark lume: rows.forget.file`."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


def longest_answer(args: MeasureArgs) -> int:
    """Say how many tokens a model answers at most in an evaluation with `args`."""
    rows = read_declaration(args.benchmark).rows.values() if args.benchmark else ()
    return max([args.max_new_tokens, *(entry.tokens for entry in rows)])
