"""The rows of a benchmark, as its declaration says where they stand: what is forgotten, what is kept, what is measured."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dualoptim.config.args import CommonArgs
from dualoptim.data.declaration import Declaration, Filter, RowsOf, read_declaration
from dualoptim.data.files import ENDINGS, kind_of, records
from dualoptim.data.hub import HubData
from dualoptim.data.prompts import Formatter
from dualoptim.data.rows import HOLDOUT, Asking, Row, parse_passage, parse_row
from dualoptim.data.splits import lists_configurations
from dualoptim.data.stream import seeded
from dualoptim.data.tofu import EvaluationSets
from dualoptim.errors import InputError, shown

_SEED = 0  # of the rows that --benchmark-rows draws: not the training's


class Benchmark:
    """Says which rows of a benchmark a task forgets, keeps and measures."""

    def __init__(self, args: CommonArgs, holdout: Sequence[Row] = ()) -> None:
        """Read the benchmark of `args`; `holdout` are rows that no model has seen, if not the benchmark's own.

        Raises:
            InputError: naming file, row or key.
        """
        self.declared: Declaration = read_declaration(str(args.benchmark))
        self.name = self.declared.name
        self._each = args.benchmark_rows
        self._place = args.data or self.declared.data
        if not self._place:
            raise InputError(
                f"--benchmark {args.benchmark} needs its files; give their folder with --data. {self.declared.get}"
            )
        self._missing: dict[str, str] = {}
        entries = dict.fromkeys([*self.declared.forget, *filter(None, [self.declared.retain]), *self.declared.measure])
        self._rows = {name: self._read(name, self.declared.rows[name]) for name in entries}
        if holdout:
            self._rows[HOLDOUT] = list(holdout)

    def rows(self, split: str) -> list[Row]:
        """Give all rows of one entry of the declaration; of `full` those that are forgotten and kept.

        Raises:
            InputError: if there is no such entry.
        """
        entries = [*self.declared.forget, self.declared.retain] if split == "full" else [split]
        for entry in filter(None, entries):
            if entry not in self._rows:
                raise InputError(f"--splits {split}: {self.name} has {', '.join(self._rows)}, and full for what is trained on")
        return [row for entry in filter(None, dict.fromkeys(entries)) for row in self._rows[entry]]

    def cut(self, formatter: Formatter) -> None:
        """Cut passages that are joined into pieces, and true answers to the tokens that count; each once."""
        for name, rows in self._rows.items():
            entry = self.declared.rows.get(name, RowsOf())
            if entry.join is not None and rows and not rows[0].ids:
                self._rows[name] = _pieces(entry.join.join(row.answer for row in rows), rows[0], formatter)
            elif entry.answer_tokens:
                self._rows[name] = [replace(row, answer=_cut(row.answer, entry, formatter)) for row in rows]

    def tasks(self, split: str) -> list[int]:
        """List the tasks, from 1."""
        return list(range(1, len(self.declared.forget) + 1))

    def task_rows(self, split: str, task: int) -> list[Row]:
        """Give what a task is to forget.

        Raises:
            InputError: if there is no such task.
        """
        if task not in self.tasks(split):
            raise InputError(f"task {task}: {self.name} has no such task; it has {', '.join(map(str, self.tasks(split)))}")
        return self._rows[self.declared.forget[task - 1]]

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        """Give the rows to keep, the same for every task."""
        return self._rows.get(self.declared.retain, [])

    def evaluation_sets(self, split: str, task: int) -> EvaluationSets:
        """Give the rows of every set that is measured, the same for every task, and say why others are missing."""
        names = dict.fromkeys([*self.declared.measure, *([HOLDOUT] if HOLDOUT in self._rows else [])])
        sets = {name: self._rows[name] for name in names if self._rows[name]}
        return sets, {name: why for name, why in self._missing.items() if name not in sets}

    def describe(self, split: str, task: int) -> str:
        """Say in words which rows a task is."""
        rows, entry = self.task_rows(split, task), self.declared.forget[task - 1]
        return f"task {task} of {self.name}: {len(rows)} rows of {self.declared.rows[entry].file}"

    def _read(self, name: str, entry: RowsOf) -> list[Row]:
        """Read the rows of an entry, with how they are asked; none if its file may be missing, and is."""
        try:
            raws = [(place, raw) for place, raw in _raws(self._place, entry.file) if _fits(raw, entry.where, place)]
            examples = _raws(self._place, entry.examples) if entry.examples else []
        except _NoFile as error:
            if not entry.optional:
                raise InputError(f"--benchmark {self.name}: {error}") from None
            self._missing[name] = str(error)
            return []
        if not raws:
            raise InputError(f"--benchmark {self.name}: no row of {entry.file} is as rows.{name}.where says; change it")
        before = "".join(_written(entry.example, raw, entry, place) for place, raw in examples)
        start, found, end = entry.prompt.partition("{question}")
        if entry.prompt and not found:
            raise InputError(f"--benchmark {self.name}: rows.{name}.prompt has no {{question}}; write where it stands")
        around = (before + start, end) if entry.prompt else None
        asking = Asking(around, entry.tokens or None, entry.stop, entry.end, entry.metrics)
        rows = []
        for place, raw in raws:
            group = next((group for group, where in entry.groups.items() if _fits(raw, where, place)), None)
            rows.append(_row(raw, entry, replace(asking, group=group), place))
        return _drawn(rows, self._each, entry.file)


class _NoFile(Exception):
    """Says which file is missing, and where."""


def _raws(place: str, file: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the records of a file of a folder, or of configuration:split of a data set, with where each stands.

    Raises:
        InputError: if there is no such folder or data set, or a record is no object.
        _NoFile: if the folder has no such file.
    """
    folder = Path(place).expanduser()
    configuration, _, split = file.rpartition(":")
    if configuration and not (folder.is_dir() and not lists_configurations(folder / "README.md")):
        raws = HubData("--data", place, str(folder) if folder.is_dir() else place).rows(configuration, split)
        return [(f"{place} {file}:{number}", raw) for number, raw in enumerate(raws, start=1)]
    if not folder.is_dir():
        raise InputError(f"--data {place}: no such folder; give the one that has {file}")
    if configuration:  # a folder of files that are named as the hub names its own
        found = [path for path in sorted(folder.joinpath(configuration).glob(f"{split}[.-]*")) if kind_of(path) in ENDINGS]
    else:
        found = [path for path in (folder / file, folder / f"{file}.gz") if path.is_file()][:1]
    if not found:
        raise _NoFile(f"{place} has no {file.replace(':', '/')}")
    lines = [line for path in found for line in records(path)]
    for where, raw in lines:
        if not isinstance(raw, dict):
            raise InputError(f"{where}: not a JSON object; write one per line")
    return lines


def _fits(raw: dict[str, Any], where: Filter, place: str) -> bool:
    """Tell whether the texts of a record match the patterns of their columns."""
    return all(fnmatchcase(str(_cell(raw, column, place)), pattern) for column, pattern in where.items())


def _cell(raw: dict[str, Any], column: str, place: str) -> Any:
    if column not in raw:
        raise InputError(f"{place}: no column {column!r}; it has {', '.join(map(str, raw))}")
    return raw[column]


def _row(raw: dict[str, Any], entry: RowsOf, asking: Asking, place: str) -> Row:
    """Make a row of a record; blanks before an answer are the prompt's, if that ends in one."""
    if entry.text:
        _cell(raw, entry.text, place)
        return replace(parse_passage({entry.text: raw[entry.text]}, place, entry.text), asking=asking)
    row = parse_row({"question": _cell(raw, entry.question, place), "answer": _cell(raw, entry.answer, place)}, place)
    answer = row.answer.lstrip() if entry.prompt.endswith(" ") else row.answer
    return replace(row, answer=answer, asking=asking)


def _written(example: str, raw: dict[str, Any], entry: RowsOf, place: str) -> str:
    """Write a worked example, in the words of its row."""
    if "{question}" not in example or "{answer}" not in example:
        raise InputError(f"{place}: example is {shown(example)}; write where {{question}} and {{answer}} stand")
    before, _, after = example.partition("{question}")
    question, answer = (str(_cell(raw, column, place)) for column in (entry.question, entry.answer))
    return before + question + after.replace("{answer}", answer)


def _drawn(rows: list[Row], each: int, file: str) -> list[Row]:
    """Draw so many rows of each group, in their order; all of them if `each` is 0."""
    if not each:
        return rows
    kept: set[int] = set()
    for group in dict.fromkeys(row.asking and row.asking.group for row in rows):
        own = [n for n, row in enumerate(rows) if (row.asking and row.asking.group) == group]
        kept |= {own[n] for n in seeded(_SEED, f"{file} {group}").permutation(len(own))[:each]}
    return [rows[n] for n in sorted(kept)]


def _cut(answer: str, entry: RowsOf, formatter: Formatter) -> str:
    """Cut a true answer to the tokens that count, with the one that the tokenizer puts first among them."""
    ids = formatter.tokenizer(answer)["input_ids"][: entry.answer_tokens]
    cut: str = formatter.tokenizer.decode(ids, skip_special_tokens=True)
    return cut


def _pieces(text: str, like: Row, formatter: Formatter) -> list[Row]:
    """Make rows of the pieces of a long text."""
    tokenizer = formatter.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    pieces = pieces_of(ids, begin, formatter.max_length)
    return [replace(like, answer=tokenizer.decode(piece, skip_special_tokens=True), ids=tuple(piece)) for piece in pieces]


def pieces_of(ids: Sequence[int], begin: Sequence[int], size: int) -> list[list[int]]:
    """Cut tokens into pieces of `size`, each with `begin` before it; the last is filled up from the first (MUSE's rule)."""
    room = size - len(begin)
    pieces = [[*begin, *ids[start : start + room]] for start in range(0, len(ids), room)]
    pieces[-1] = (pieces[-1] + pieces[0])[:size]
    return pieces
