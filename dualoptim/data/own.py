"""The data that arguments name: a user's own files or `--data`, rows that no model has seen, refusals."""

from collections.abc import Sequence
from importlib import resources

from dualoptim.config.args import MeasureArgs
from dualoptim.config.opening import read_text
from dualoptim.data.benchmark import Benchmark
from dualoptim.data.prompts import Formatter
from dualoptim.data.readers import Columns, read_named
from dualoptim.data.rows import HOLDOUT, Row, of_task, still_known, task_numbers
from dualoptim.data.tofu import EvaluationSets, TofuSource, tofu_source
from dualoptim.errors import InputError


class OwnFiles:
    """Says which rows of a user's own files, one to forget and one to keep, a task forgets, keeps and measures."""

    def __init__(self, args: MeasureArgs) -> None:
        """Read the files of `args`.

        Raises:
            InputError: naming file, line or column.
        """
        self.name = ", ".join(args.forget_file or ())
        self._forget = _rows_of("--forget-file", args.forget_file, args)
        self._retain = _rows_of("--retain-file", args.retain_file, args)
        self._holdout = read_holdout(args)

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
        sets = {"forget": self.task_rows(split, task), "retain": self._retain, HOLDOUT: self._holdout}
        sets = {name: rows for name, rows in sets.items() if rows}
        skipped = {} if self._retain else {"retain": "no --retain-file"}
        return sets, skipped | dict.fromkeys(("real_authors", "world_facts"), "your own files have no such set")

    def describe(self, split: str, task: int) -> str:
        """Say in words which rows a task is."""
        return f"task {task}: {len(self.task_rows(split, task))} rows of {self.name}"


Source = TofuSource | OwnFiles | Benchmark
"""All kinds of data answer the same questions: `cut`, `tasks`, `task_rows`, `retain_rows`, `evaluation_sets`, `describe`."""


def open_source(args: MeasureArgs) -> Source:
    """Open the data that `args` name: a benchmark, own files, or `--data`.

    Raises:
        InputError: if that cannot be read.
    """
    if args.benchmark:
        return Benchmark(args, read_holdout(args))
    return OwnFiles(args) if args.forget_file else tofu_source(args.data_source, read_holdout(args))


def read_holdout(args: MeasureArgs) -> list[Row]:
    """Read the rows of `--holdout-file`, none without it.

    Raises:
        InputError: naming file, line or column.
    """
    return _rows_of("--holdout-file", args.holdout_file, args)


def _rows_of(flag: str, names: Sequence[str] | None, args: MeasureArgs) -> list[Row]:
    return [row for name in names or () for row in read_named(flag, name, Columns.of(args))]


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
