"""Read what a benchmark declares in YAML: its rows, what is forgotten, kept and measured, its scores, what was published.

The package has some by name in `benchmarks/`; `--benchmark` takes the path of one's own as well.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dualoptim.config.args import MeasureArgs, UnlearnArgs
from dualoptim.config.flags import flags
from dualoptim.config.opening import parse_yaml, read_text
from dualoptim.data.typed import built
from dualoptim.errors import InputError, shown

Filter = Mapping[str, str]
"""Patterns as of a shell (`*sc1`, `*qa[0-4]`; with `!a|b` all but a and b) by the columns whose texts have to match them."""

_FOLDER = resources.files("dualoptim.data").joinpath("benchmarks")


@dataclass(frozen=True)
class RowsOf:
    """Says where some rows of a benchmark stand, how they are put to a model, and how they are measured."""

    file: tuple[str, ...] = ()  # of --data, or configuration:split of a data set in the hub's layout; the first that is there
    like: str = ""  # an entry whose settings hold here as well
    parts: tuple[str, ...] = ()  # entries in place of a file, whose rows these are, one entry after another
    optional: bool = False  # whether the file may be missing
    where: Filter = field(default_factory=dict)  # all others are left out
    groups: Mapping[str, Filter] = field(default_factory=dict)  # with means of their own
    group_by: str = ""  # a column, of which each value is a group as well
    question: str = "question"  # the columns
    answer: str = "answer"  # a list in it has several that are true
    choices: str = ""  # a list, of which the answer is the number of the right one, or choices and labels; "": there are none
    refusal: str = ""  # of what should be answered, for objectives that teach it; "": drawn
    alternative: str = ""  # of plausible other answers
    text: str = ""  # the column of passages
    as_json: bool = False  # a passage is its whole record as JSON writes it (so WMDP's code reads the cyber corpus)
    longer_than: int | None = None  # characters; shorter passages are left out
    draw: int = 0  # so many rows alone, of each group, drawn by a fixed seed; 0: all
    cut: int = 0  # tokens that a passage has at most, of which none is added by us; the rest of it is left out
    join: str | None = None  # what passages are joined by, before they are cut into pieces of --max-length tokens
    prompt: str = ""  # the question and what stands around it, as `Question: {question}`; "": the model's template
    message: str = ""  # the same within the model's template
    lead: str = ""  # what stands behind that, before the answer
    examples: str = ""  # file of the same columns that is put before the prompt
    example: str = ""  # a row of it, with {question} and {answer}
    shots: str = ""  # a column of such rows of its own, for {shots} in the message
    tokens: int = 0  # of the model's own answer, at most; 0: --max-new-tokens
    stop: tuple[str, ...] = ()  # the model's answer ends before the first of each, one after the other
    stop_tokens: tuple[str, ...] = ()  # it ends before the first token whose text is one of them
    answer_tokens: int = 0  # the true answer is cut to so many, the one that the tokenizer puts first among them; 0: all count
    end: bool = True  # whether an end token follows the text
    metrics: tuple[str, ...] = ()  # beside those that every set has
    only: bool = False  # no others than these


@dataclass(frozen=True)
class TargetsOf:
    """Says what a benchmark can forget one by one, each as a task of its own."""

    file: tuple[str, ...] = ()  # that lists them, in the order of their numbers
    column: str = "target"
    subject: str = "subject"  # the column of all other files with the target of a record; one without it is of every target


@dataclass(frozen=True)
class CorpusOf:
    """Says which rows one of several corpora forgets and keeps, and what it has for itself in place of a flag."""

    forget: str = ""  # entries of `rows`
    retain: str = ""
    beta: float | None = None
    regularization_coeff: float | None = None


@dataclass(frozen=True)
class ScoreOf:
    """Says what a score of a benchmark is made of; `of` is arithmetic on metrics of sets, on scores above it and on numbers."""

    of: str = ""
    title: str = ""
    should: str = ""  # rise, fall, stay or as in `_SHOULD`; "": as a bare SET.METRIC should in that set, else rise
    instead_of: str = ""  # a score above it, which this one stands for where that is missing


@dataclass(frozen=True)
class Published:
    """What others report: scores by method, and where."""

    source: str = ""
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenUnlearning:
    """What OpenUnlearning calls a benchmark, and by its names SET.METRIC of those that it has."""

    suite: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Declaration:
    """What a benchmark declares."""

    name: str = ""
    about: str = ""
    source: str = ""
    data: str = ""  # the hub's data set, where --data is not given
    get: str = ""  # how to come by the data, where there is no such
    folders: tuple[str, ...] = ("",)  # of --data where its files lie, the first that has one; {target}: with _ for blanks
    targets: TargetsOf = field(default_factory=TargetsOf)
    rows: Mapping[str, RowsOf] = field(default_factory=dict)
    forget: tuple[str, ...] = ()  # entries of `rows`, one for each task, or one for all targets
    retain: str = ""
    corpora: Mapping[str, CorpusOf] = field(default_factory=dict)  # in place of `forget`: one task, which takes them in turn
    measure: tuple[str, ...] = ()
    length: int = 0  # of texts that are measured, in tokens at most, where that is more than --max-length
    preface: str = ""  # before messages and passages that are measured; {target} stands for its name
    scores: Mapping[str, ScoreOf] = field(default_factory=dict)
    published: Published = field(default_factory=Published)
    open_unlearning: OpenUnlearning = field(default_factory=OpenUnlearning)
    presets: Mapping[str, Any] = field(default_factory=dict)  # read by config/presets.py

    def sets(self) -> list[str]:
        """Name all sets that can have scores: those that are measured, and their groups."""
        return [name for entry in self.measure for name in (entry, *(f"{entry}_{group}" for group in self.groups(entry)))]

    def forgotten(self) -> list[str]:
        """Name the entries that are trained on to be forgotten, each once."""
        return [*dict.fromkeys(self.forget or (one.forget for one in self.corpora.values()))]

    def kept(self) -> list[str]:
        """Name the entries that are trained on to be kept, each once."""
        return [*dict.fromkeys(filter(None, [self.retain, *(one.retain for one in self.corpora.values())]))]

    @property
    def lacks_kept(self) -> bool:
        """Tell whether something is forgotten that the benchmark has nothing to keep for."""
        return not all([one.retain for one in self.corpora.values()] or [self.retain])

    def forgets(self, name: str) -> bool:
        """Tell whether a measured set, or a group of one, is to be forgotten: by what is trained on, else by its name."""
        entry = max((one for one in self.measure if f"{name}_".startswith(f"{one}_")), key=len, default=name)
        return entry in self.forgotten() or (entry.startswith("forget") and entry not in self.kept())

    def lacks(self, name: str, trained: Sequence[str]) -> str:
        """Say how to come by a measured set of this name, which of those `trained` on may be; nothing if there is one."""
        if name in self.measure:
            return ""
        likely = [*(one for one in self.measure if one.startswith(name)), *(one for one in self.measure if one in trained)]
        remedy = f"rename {likely[0]} wherever it stands" if likely else f"add an entry {name} to rows and measure"
        return f"measure has no set called {name}; {remedy}"

    def formulas(self) -> dict[str, tuple[str, str]]:
        """Give what every score is made of, and in whose place it stands."""
        return {name: (score.of, score.instead_of) for name, score in self.scores.items()}

    def groups(self, entry: str) -> list[str]:
        """Name the groups of an entry, and of its parts."""
        return [*dict.fromkeys(group for one in (entry, *self.rows[entry].parts) for group in self.rows[one].groups)]


def benchmarks() -> list[str]:
    """Name the benchmarks of the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir() if file.name.endswith(".yaml"))


def read_declaration(benchmark: str) -> Declaration:
    """Read a benchmark by its name in the package, or by the path of a .yaml file.

    Raises:
        InputError: naming file and key, if there is none or a part of it is wrong.
    """
    return _declaration(benchmark, _text(benchmark, f"--benchmark {benchmark}"))


@cache  # a run asks for it many times, and a file that has changed meanwhile has another text
def _declaration(benchmark: str, text: str) -> Declaration:
    """Read a benchmark from the text of its YAML."""
    where = f"--benchmark {benchmark}"
    raw = _laid_over(text, where)
    rows = raw.get("rows")
    if isinstance(rows, dict):
        raw["rows"] = {key: _like(rows, key, where) for key in rows}
    found: Declaration = built(Declaration, {"name": Path(benchmark).stem, **raw}, where)
    for key, entry in found.rows.items():
        if not entry.file and not entry.parts:
            raise InputError(f"{where}: rows.{key} has no file; name one of --data")
        for part in entry.parts:
            if part not in found.rows or found.rows[part].parts:
                raise InputError(f"{where}: rows.{key}.parts has {shown(part)}; name entries that have a file")
    for key, corpus in found.corpora.items():
        if found.forget or found.retain or not corpus.forget:
            remedy = "give it forget, and drop the keys forget and retain that stand beside corpora"
            raise InputError(f"{where}: corpora.{key} says what is forgotten and kept; {remedy}")
        for name in ("beta", "regularization_coeff"):
            value, flag = getattr(corpus, name), flags(UnlearnArgs)[name]
            if value is not None and not flag.holds(value):
                raise InputError(f"{where}: corpora.{key}.{name} is {value:g}; give {flag.bounds('a number')}")
    named = {"forget": found.forgotten(), "retain": found.kept(), "measure": list(found.measure)}
    for key, entries in named.items():
        for name in entries:
            if name not in found.rows:
                raise InputError(f"{where}: {key} names {name!r}; rows has {', '.join(found.rows) or 'no entry'}")
    if not found.forgotten():
        raise InputError(f"{where}: nothing is forgotten; name an entry of rows under forget")
    if found.targets.file and len(found.forget) > 1:
        raise InputError(f"{where}: forget names {len(found.forget)} entries; of targets, each is a task, so name one")
    for key, score in found.scores.items():
        if score.should and not re.fullmatch(_SHOULD, score.should):
            remedy = "give rise, fall or stay, `fall to 0.25` or `rise to 0.9`, or words that begin with `not`, `be` or `like`"
            raise InputError(f"{where}: scores.{key}.should is {shown(score.should)}; {remedy}")
    if why := found.lacks("forget", found.forgotten()):
        raise InputError(f"{where}: {why}")
    return found


_SHOULD = r"-|stay|(rise|fall)( to .+)?|(not|be|like) .+"
"""Where a score should go: what says nothing of it is a slip."""


_REMEDY = "data/README.md shows a whole one"


def _text(name: str, where: str) -> str:
    """Read the file of a benchmark of the package or of one's own."""
    packaged = name in benchmarks()
    if not packaged and not name.endswith((".yaml", ".yml")):
        raise InputError(f"{where}: no such benchmark; take {', '.join(benchmarks())}, or give a .yaml file of your own")
    return read_text(where, str(_FOLDER.joinpath(f"{name}.yaml")) if packaged else name, _REMEDY)


def _laid_over(text: str, where: str) -> dict[str, Any]:
    """Read the YAML of a declaration over that which it extends."""
    raw = parse_yaml(where, text, _REMEDY)
    if not isinstance(raw, dict):
        raise InputError(f"{where}: holds no `name: value` lines; {_REMEDY}")
    if (other := raw.pop("extends", None)) is None:
        return raw
    if other not in benchmarks():
        raise InputError(f"{where}: extends is {shown(other)}; take {', '.join(benchmarks())}")
    return _over(_laid_over(_text(other, where), where), raw)


def _over(below: Any, above: Any) -> Any:
    """Lay a value over another, key by key where both have keys; null takes a key away."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    kept = [key for key in below | above if (below | above)[key] is not None]
    return {key: _over(below[key], above[key]) if key in below and key in above else (below | above)[key] for key in kept}


def _like(rows: Mapping[str, Any], key: str, where: str) -> Any:
    """Take what an entry does not say from the one that it is like."""
    own = rows[key]
    if not isinstance(own, dict) or "like" not in own:
        return own
    other = own["like"]
    if not isinstance(rows.get(other), dict) or "like" in rows[other]:
        raise InputError(f"{where}: rows.{key}.like is {shown(other)}; name an entry that is not itself like another")
    return rows[other] | own


def longest_answer(args: MeasureArgs) -> int:
    """Say how many tokens a model answers at most in an evaluation with `args`."""
    rows = read_declaration(args.benchmark).rows.values() if args.benchmark else ()
    return max([args.max_new_tokens, *(entry.tokens for entry in rows)])
