"""The data that arguments name: a user's own files or `--data`, rows that no model has seen, refusals."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from itertools import chain

from dualoptim.config.args import CommonArgs, MeasureArgs, UnlearnArgs
from dualoptim.config.opening import read_text
from dualoptim.data.benchmark import Benchmark
from dualoptim.data.prompts import Formatter
from dualoptim.data.questions import load_questions, unanswered
from dualoptim.data.readers import Columns, is_read, named_records, read_named
from dualoptim.data.rows import HOLDOUT, Row, of_task, still_known, task_numbers
from dualoptim.data.tofu import EvaluationSets, TofuSource, tofu_source
from dualoptim.data.wordings import OTHER_WORDS, in_other_words
from dualoptim.errors import InputError


class OwnFiles:
    """Says which rows of a user's own files, one to forget and one to keep, a task forgets, keeps and measures."""

    def __init__(self, args: CommonArgs, holdout: Sequence[Row] = ()) -> None:
        """Read the files of `args`; `holdout` are rows that no model has seen.

        Raises:
            InputError: naming file, line or column.
        """
        self.name = ", ".join(args.forget_file or ())
        self._forget = _rows_of("--forget-file", args.forget_file, args)
        self._retain = _rows_of("--retain-file", args.retain_file, args)
        if args.makes_rows:
            self._retain = unanswered(load_questions(getattr(args, "retain_questions", None)))
        self._holdout = list(holdout)

    def rows(self, split: str) -> list[Row]:
        """Give all rows to `forget`, all to `retain`, or the `full` of both.

        Raises:
            InputError: if it is something else, or there are none.
        """
        found = {"full": [*self._forget, *self._retain], "forget": self._forget, "retain": self._retain}.get(split, [])
        if not found:
            has = "full, forget" + (" and retain" if self._retain else ", and retain with --retain-file")
            raise InputError(f"--splits {split}: files of your own have {has}")
        return found

    def keep(self, rows: Sequence[Row]) -> None:
        """Take rows that were made in place of those to keep, whose answers were not known yet."""
        self._retain = list(rows)

    def cut(self, formatter: Formatter) -> None:
        """Cut passages into pieces of as many tokens as `formatter` takes."""
        self._forget, self._retain, self._holdout = (
            [part for row in rows for part in formatter.cut_passage(row)]
            for rows in (self._forget, self._retain, self._holdout)
        )

    def tasks(self, split: str) -> list[int]:
        """List the task numbers in the file, or 1."""
        return task_numbers(self._forget)

    def task_rows(self, split: str, task: int) -> list[Row]:
        """Give what a task is to forget.

        Raises:
            InputError: if there is no such task.
        """
        if task not in self.tasks(split):
            raise InputError(f"task {task}: {self.name} has no such task; it has {', '.join(map(str, self.tasks(split)))}")
        return of_task(self._forget, task)

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        """Join the rows to keep and those of tasks that have not been unlearned yet."""
        return self._retain + still_known(self._forget, unlearned)

    def evaluation_sets(self, split: str, task: int) -> EvaluationSets:
        """Give the rows to forget and to keep, and say why the published sets are missing."""
        forget = self.task_rows(split, task)
        sets = {"forget": forget, OTHER_WORDS: in_other_words(forget), "retain": self._retain, HOLDOUT: self._holdout}
        skipped = {OTHER_WORDS: "passages are asked nothing"} if not sets[OTHER_WORDS] else {}
        skipped |= {} if self._retain else {"retain": "no --retain-file"}
        sets = {name: rows for name, rows in sets.items() if rows}
        return sets, skipped | dict.fromkeys(("real_authors", "world_facts"), "your own files have no such set")

    def describe(self, split: str, task: int) -> str:
        """Say in words which rows a task is."""
        return f"task {task}: {len(self.task_rows(split, task))} rows of {self.name}"


Source = TofuSource | OwnFiles | Benchmark
"""All kinds of data have a `name` and answer the same questions, from `rows` to `describe`."""


def open_source(args: CommonArgs) -> Source:
    """Open the data that `args` name: a benchmark, own files, or `--data`.

    Raises:
        InputError: if that cannot be read.
    """
    holdout = read_holdout(args) if isinstance(args, MeasureArgs) else []
    if args.benchmark:
        source: Source = Benchmark(args, holdout, _rows_of("--retain-file", args.retain_file, args))
    else:
        source = OwnFiles(args, holdout) if args.forget_file else tofu_source(args.data_source, holdout)
    if isinstance(args, MeasureArgs) and args.group_column:
        _check_groups(args, args.group_column)
    return source


def _check_groups(args: MeasureArgs, column: str) -> None:
    """Make sure that a row of some file has the column of groups; rows of other files may have none."""
    named = {"--forget-file": args.forget_file, "--retain-file": args.retain_file, "--holdout-file": args.holdout_file}
    files, found = [(flag, name) for flag, names in named.items() for name in names or ()], dict[str, None]()
    for _, raw in chain.from_iterable(named_records(flag, name) for flag, name in files):
        if column in raw:
            return
        found |= dict.fromkeys(map(str, raw))
    names = ", ".join(name for _, name in files)
    raise InputError(f"--group-column {column}: no row of {names} has it; there are {', '.join(found)}; name one of them")


def read_holdout(args: MeasureArgs) -> list[Row]:
    """Read the rows of `--holdout-file`, none without it.

    Raises:
        InputError: naming file, line or column.
    """
    return _rows_of("--holdout-file", args.holdout_file, args)


def _rows_of(flag: str, names: Sequence[str] | None, args: CommonArgs) -> list[Row]:
    """Read the files of a flag; texts of their own have the rows to forget, and those to keep if an objective reads them."""
    columns, forgets = Columns.of(args), flag == "--forget-file"
    if isinstance(args, MeasureArgs) and (forgets or (flag == "--retain-file" and is_read(args, "refusal", side=1))):
        columns = replace(columns, refusal=args.refusal_column)
    if isinstance(args, UnlearnArgs) and forgets and is_read(args, "alternative"):
        columns = replace(columns, alternative=args.alternative_column)
    return [row for name in names or () for row in read_named(flag, name, columns)]


def load_refusals(path: str | None) -> list[str]:
    """Read refusals, one a line, from `path`, or from the list that comes with the package.

    Raises:
        InputError: if the file cannot be read or holds none.
    """
    if path is None:
        text = resources.files("dualoptim.data").joinpath("refusals.txt").read_text(encoding="utf-8")
    else:
        text = read_text(f"--idk-file {path}", path, "give a text file with one refusal a line")
    refusals = [line.strip() for line in text.splitlines() if line.strip()]
    if not refusals:
        raise InputError(f"--idk-file {path}: holds no lines; write one refusal a line")
    return refusals
