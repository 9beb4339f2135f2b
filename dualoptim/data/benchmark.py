"""The rows of a benchmark, as its declaration says where they stand: what is forgotten, what is kept, what is measured."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dualoptim.config.args import CommonArgs
from dualoptim.data.benchmark_records import (
    BenchmarkFiles,
    NoFileError,
    Placed,
    cell,
    filled,
    fits,
    is_long,
    question_and_answer,
    written,
)
from dualoptim.data.cuts import cut_rows
from dualoptim.data.declaration import Declaration, RowsOf, benchmarks, read_declaration
from dualoptim.data.prompts import Formatter
from dualoptim.data.readers import is_read
from dualoptim.data.rows import HOLDOUT, Asking, Corpus, Row, parse_passage, parse_row, with_own_texts
from dualoptim.data.stream import seeded
from dualoptim.data.tofu import EvaluationSets
from dualoptim.errors import InputError, OutOfReachError, shown

_RETAIN = "retain"  # the rows of --retain-file, and the set that they are measured as
_SEED = 0  # of the rows that --benchmark-rows draws: not the training's


class Benchmark:
    """Says which rows of a benchmark a task forgets, keeps and measures."""

    def __init__(self, args: CommonArgs, holdout: Sequence[Row] = (), retain: Sequence[Row] = ()) -> None:
        """Read the benchmark of `args`.

        `holdout` are rows that no model has seen, and `retain` rows to keep, if not the benchmark's own.

        Raises:
            InputError: naming file, row or key.
        """
        self.declared: Declaration = read_declaration(str(args.benchmark))
        self.name = self.declared.name
        self._each = args.benchmark_rows
        self._alternatives = is_read(args, "alternative")
        place = args.data or self.declared.data
        if not place:
            raise OutOfReachError(
                f"--benchmark {args.benchmark} needs its files; give their folder with --data. {self.declared.get}"
            )
        if retain and not self.declared.lacks_kept:
            raise InputError(f"--retain-file: {self.name} says by itself what is kept; drop it")
        self._files = BenchmarkFiles(place, self.declared.folders)
        self._formatter: Formatter | None = None
        self._own = {name: list(rows) for name, rows in ((HOLDOUT, holdout), (_RETAIN, retain)) if rows}
        self._missing: dict[tuple[str, str], str] = {}
        self._known: dict[tuple[str, str], list[Row]] = {}  # by entry and target
        self.targets = self._read_targets()
        if not self.targets:
            for name in self._entries():
                self._rows(name)
            if str(args.benchmark) not in benchmarks():  # whose patterns are right, and whose files may be a part of them
                self._check_groups()

    def rows(self, split: str) -> list[Row]:
        """Give all rows of one entry of the declaration, of every target; of `full` those that are forgotten and kept.

        Raises:
            InputError: if there is no such entry.
        """
        entries = [*dict.fromkeys([*self.declared.forgotten(), *self.declared.kept()])] if split == "full" else [split]
        for entry in entries:
            if entry not in self._entries():
                known = ", ".join(self._entries())
                raise InputError(f"--splits {split}: {self.name} has {known}, and full for what is trained on")
        found, earlier = list[Row](), set[tuple[str, Row]]()
        for target in self.targets or [""]:
            rows = [row for entry in entries for row in self._rows(entry, target)]
            found += [row for row in rows if (row.place, row) not in earlier]  # what belongs to every target comes once
            earlier |= {(row.place, row) for row in rows}
        return [*found, *(self._own.get(_RETAIN, []) if split == "full" else [])]

    def cut(self, formatter: Formatter) -> None:
        """Cut passages and true answers to the tokens that count, each once, and a user's own passages into pieces."""
        self._formatter = formatter
        for name, rows in self._own.items():
            self._own[name] = [part for row in rows for part in formatter.cut_passage(row)]
        whole = {place: rows for place, rows in self._known.items() if not self.declared.rows[place[0]].parts}
        self._known = {place: self._cut(place[0], rows) for place, rows in whole.items()}  # the others are made anew of theirs

    def tasks(self, split: str) -> list[int]:
        """List the tasks, from 1."""
        return list(range(1, len(self.targets or self.declared.forget or (self.declared.corpora,)) + 1))

    def task_rows(self, split: str, task: int) -> list[Row]:
        """Give what a task is to forget.

        Raises:
            InputError: if there is no such task.
        """
        entry, target = self._of_task(task)
        if self.declared.corpora:
            return self._of_corpora({name: one.forget for name, one in self.declared.corpora.items()})
        return self._rows(entry, target)

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        """Give the rows to keep, the same for every task that has no target of its own."""
        if self.declared.corpora:
            return self._of_corpora({name: one.retain for name, one in self.declared.corpora.items()})
        if not self.declared.retain:
            return self._own.get(_RETAIN, [])
        return self._rows(self.declared.retain, self._of_task(unlearned[-1])[1])

    def evaluation_sets(self, split: str, task: int) -> EvaluationSets:
        """Give the rows of every set that is measured, the same for every task without a target, and why others are missing."""
        target = self._of_task(task)[1]
        found = {name: self._rows(name, target) for name in self.declared.measure}
        found |= {name: rows for name, rows in self._own.items() if name == HOLDOUT or name not in self.declared.measure}
        sets = {name: rows for name, rows in found.items() if rows}
        skipped = {_RETAIN: self.lacks_retain} if self.lacks_retain else {}
        return sets, skipped | {name: why for (name, of), why in self._missing.items() if of == target and name not in sets}

    @property
    def lacks_retain(self) -> str:
        """Say how to come by a measured set `retain`; nothing if there is one."""
        return "" if _RETAIN in self._own else self.declared.lacks(_RETAIN, self.declared.kept())

    def groups(self) -> list[str]:
        """Name the groups of measured sets as the rows have them that were read, as sets of their own."""
        read = [(name, rows) for (name, _), rows in self._known.items() if name in self.declared.measure]
        return sorted({f"{name}_{group}" for name, rows in read for row in rows for group in _groups(row)})

    def describe(self, split: str, task: int) -> str:
        """Say in words which rows a task is."""
        entry, target = self._of_task(task)
        parts = {one: self._rows(one, target) for one in (self.declared.forgotten() if self.declared.corpora else [entry])}
        said = [f"{len(rows)} rows of {target or (*self.declared.rows[one].file, one)[0]}" for one, rows in parts.items()]
        return f"task {task} of {self.name}: {', '.join(said)}"

    def _of_corpora(self, entries: Mapping[str, str]) -> list[Row]:
        """Give the rows of an entry for each corpus, or a user's own where it names none, with whose they are."""
        found = []
        for name, entry in entries.items():
            one = self.declared.corpora[name]
            corpus = Corpus(name, one.beta, one.regularization_coeff)
            found += [replace(row, corpus=corpus) for row in (self._rows(entry) if entry else self._own.get(_RETAIN, []))]
        return found

    def _check_groups(self) -> None:
        """Refuse a group that no row of any entry with it fits."""
        fitted: dict[tuple[str, str], bool] = {}
        for (name, _), rows in self._known.items():
            own = {group for row in rows for group in _groups(row)}
            for part in (self.declared.rows[name].parts or (name,)) if rows else ():
                for group, where in self.declared.rows[part].groups.items():
                    fitted[group, str(where)] = fitted.get((group, str(where)), False) or set(group.split()) <= own
        for group, pattern in (one for one, has_rows in fitted.items() if not has_rows):
            raise InputError(
                f"--benchmark {self.name}: no row is as the group {group} says ({pattern}); change it, or take it away"
            )

    def _entries(self) -> list[str]:
        return [*dict.fromkeys([*self.declared.forgotten(), *self.declared.kept(), *self.declared.measure])]

    def _of_task(self, task: int) -> tuple[str, str]:
        """Name the entry that a task forgets, and its target."""
        tasks = self.tasks("")
        if task not in tasks:
            has = ", ".join(map(str, tasks)) if len(tasks) < 10 else f"1 to {len(tasks)}"
            raise InputError(f"task {task}: {self.name} has no such task; it has {has}")
        if self.targets:
            return self.declared.forget[0], self.targets[task - 1]
        return self.declared.forgotten()[task - 1], ""

    def _read_targets(self) -> list[str]:
        """List what can be forgotten one by one, in the order of their numbers."""
        of = self.declared.targets
        if not of.file:
            return []
        try:
            return [*dict.fromkeys(str(cell(raw, of.column, place)) for place, raw in self._files.read(of.file))]
        except NoFileError as error:
            raise InputError(f"--benchmark {self.name}: targets.file: {error}") from None

    def _rows(self, name: str, target: str = "") -> list[Row]:
        """Give the rows of an entry, of one target if there are such; none if its file may be missing, and is."""
        if (name, target) not in self._known:
            entry, rows, missing = self.declared.rows[name], list[Row](), ""
            for part in entry.parts or (name,):
                try:
                    rows += self._cut(part, self._read(part, target))
                except NoFileError as error:
                    missing = str(error)
                    if not entry.optional:
                        missing += f". {self.declared.get}" if self.declared.get else f"; {self._files.listing()}"
                    break
            if not rows and not missing:
                file = self.declared.rows[(entry.parts or (name,))[0]].file[0]
                key = "where" if entry.where or entry.longer_than is None else "longer_than"
                missing = f"no row of {file} is {f'of {target} and ' * bool(target)}as rows.{name}.{key} says; change it"
            if missing and not entry.optional:
                raise InputError(f"--benchmark {self.name}: {missing}")
            if missing:
                rows, self._missing[name, target] = [], missing
            self._known[name, target] = _drawn(rows, entry.draw, name) if entry.parts else rows
        return self._known[name, target]

    def _read(self, name: str, target: str) -> list[Row]:
        """Read the rows of an entry that has a file, with how they are asked."""
        entry = self.declared.rows[name]
        learned = name in (*self.declared.forgotten(), *self.declared.kept())
        preface = "" if learned else self.declared.preface.replace("{target}", target)
        length = 0 if learned else self.declared.length
        entry = replace(entry, message=preface + entry.message) if entry.message else entry
        entry = entry if self._alternatives else replace(entry, alternative="")
        examples = self._of(target, (entry.examples,), f"rows.{name}.examples") if entry.examples else ()
        before = "".join(written(entry.example, raw, entry, place) for place, raw in examples)
        raws = [
            (place, raw) for place, raw in self._of(target, entry.file, f"rows.{name}.file") if fits(raw, entry.where, place)
        ]
        raws = [(place, raw) for place, raw in raws if is_long(raw, entry, place)]
        asked = [replace(_asking(raw, entry, before, f"{place}: rows.{name}"), length=length) for place, raw in raws]
        rows = [_row(raw, entry, asking, place) for (place, raw), asking in zip(raws, asked, strict=True)]
        rows = [replace(row, answer=preface + row.answer) for row in rows] if entry.text else rows
        return _drawn(rows, self._each or entry.draw, entry.file[0])

    def _of(self, target: str, file: Sequence[str], key: str) -> Iterable[Placed]:
        """Give the records of a target in the file that a key asks for."""
        try:
            found = self._files.read(file, target)
        except NoFileError as error:
            raise NoFileError(f"{key}: {error}") from None
        subject = self.declared.targets.subject
        return [(place, raw) for place, raw in found if not target or str(raw.get(subject, target)) == target]

    def _cut(self, name: str, rows: list[Row]) -> list[Row]:
        return cut_rows(rows, self.declared.rows[name], self._formatter) if self._formatter else rows


def _groups(row: Row) -> list[str]:
    return ((row.asking and row.asking.group) or "").split()


def _asking(raw: dict[str, Any], entry: RowsOf, before: str, place: str) -> Asking:
    """Say how a record is asked: in which words, behind the text `before`, and in which groups it counts."""
    asked = entry.message or entry.prompt
    start, found, end = asked.partition("{question}")
    if asked and not found:
        raise InputError(f"{place}.{'message' if entry.message else 'prompt'} has no {{question}}; write where it stands")
    shots = cell(raw, entry.shots, place) if entry.shots else []
    if not (isinstance(shots, list) and all(isinstance(shot, dict) for shot in shots)):
        raise InputError(f"{place}.shots: {entry.shots} is {shown(shots)}; give a list of rows")
    worked = "".join(written(entry.example, shot, entry, place) for shot in shots)
    around = (before + filled(start, raw).replace("{shots}", worked), filled(end, raw)) if asked else None
    groups = [group for group, where in entry.groups.items() if fits(raw, where, place)]
    if entry.group_by:
        groups.append(re.sub(r"\W+", "_", str(cell(raw, entry.group_by, place))).strip("_").lower())
    return Asking(
        around,
        lead=entry.lead if entry.message else None,
        tokens=entry.tokens or None,
        stop=entry.stop,
        stop_tokens=entry.stop_tokens,
        end=entry.end,
        metrics=entry.metrics,
        only=entry.only,
        group=" ".join(filter(None, groups)) or None,
    )


def _row(raw: dict[str, Any], entry: RowsOf, asking: Asking, place: str) -> Row:
    """Make a row of a record; blanks before an answer are the prompt's, if that ends in one."""
    if entry.text:
        text = json.dumps(raw) if entry.as_json else cell(raw, entry.text, place)
        return replace(parse_passage({entry.text: text}, place, entry.text), asking=asking)
    question, answer, wrong = question_and_answer(raw, entry, place)
    if isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer):
        answer, asking = answer[0], replace(asking, accepted=tuple(answer[1:]))
    row = replace(parse_row({"question": question, "answer": answer}, place), perturbed_answers=wrong)
    within = {column: cell(raw, column, place) for column in (entry.refusal, entry.alternative) if "." in column}
    row = with_own_texts(row, raw | within, entry.refusal or None, entry.alternative or None)
    return replace(row, answer=row.answer.lstrip() if (entry.prompt + entry.lead).endswith(" ") else row.answer, asking=asking)


def _drawn(rows: list[Row], each: int, file: str) -> list[Row]:
    """Draw so many rows of each group, in their order; all of them if `each` is 0."""
    if not each:
        return rows
    kept: set[int] = set()
    for group in dict.fromkeys(row.asking and row.asking.group for row in rows):
        own = [n for n, row in enumerate(rows) if (row.asking and row.asking.group) == group]
        kept |= {own[n] for n in seeded(_SEED, f"{file} {group}").permutation(len(own))[:each]}
    return [rows[n] for n in sorted(kept)]
