"""Data of TOFU's shape: which rows a task forgets, which are kept meanwhile, and which are measured.

Two layouts say which rows a task is: in the published folder of DualOptim (and in the demo) each row carries the number
of its task, in `locuslab/TOFU` a task is a range of rows of the split `full`.
"""

from collections.abc import Sequence
from dataclasses import replace

from dualoptim.data.rows import HOLDOUT, Row, of_task, still_known, task_numbers
from dualoptim.data.splits import Splits, open_splits
from dualoptim.errors import InputError

EvaluationSets = tuple[dict[str, list[Row]], dict[str, str]]
"""The rows of each evaluation set, and why a set is missing or lacks answers to compare."""

REAL_WORLD = "forget"
"""The split of the real-world scenario: people that a model knows."""

_RETAIN = {"forget01": "retain90", "forget05": "retain50", "forget10": "retain10", REAL_WORLD: "neighbor"}
_EVALUATION_SETS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}

# Row ranges of TOFU's `full` (200 authors x 20 questions) that are the published tasks, and what is never forgotten.
_TASK_ROWS = {"forget01": 40, "forget05": 200, "forget10": 400}
_TASK_STARTS = {
    "forget01": [3600 + 40 * k for k in range(10)],
    "forget05": [3600, 3800, 3200, 3400, 2800, 3000, 2000, 2200, 2400, 2600],
    "forget10": [3600, 3200, 2800, 2000, 2400, 400, 800, 1200, 1600],
}
_RETAIN_ROWS = {"forget01": 3600, "forget05": 2000, "forget10": 400}
_HUB_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


class _Numbered:
    """Finds the rows of a task by the number that each row carries; what no task takes away is a split of its own."""

    def __init__(self, splits: Splits) -> None:
        self.splits = splits

    def tasks(self, split: str) -> list[int]:
        return task_numbers(self.splits.rows(split))

    def task_rows(self, split: str, task: int) -> list[Row]:
        return of_task(self.splits.rows(split), task)

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        return self.splits.rows(_RETAIN[split]) + still_known(self.splits.rows(split), unlearned)

    def compared(self, split: str, task: int) -> list[Row]:
        return of_task(self.splits.optional(f"{split}_perturbed"), task)

    def describe(self, split: str, task: int) -> str:
        return f"task {task} of {split} of {self.splits.name}"


class _CutFromFull:
    """Cuts the published tasks 1, 2, ... out of the split `full`; task 0 is the hub's own forget set and retain set."""

    def __init__(self, splits: Splits) -> None:
        self.splits = splits

    def tasks(self, split: str) -> list[int]:
        return list(range(len(_TASK_STARTS[split]) + 1))

    def task_rows(self, split: str, task: int) -> list[Row]:
        return self.splits.rows(split) if task == 0 else self._cut(*self._range(split, task))

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        if 0 in unlearned:
            if len(unlearned) > 1:
                raise InputError("--task-list mixes task 0, the hub's own forget set, with the published cuts 1 to 10")
            return self.splits.rows(_HUB_RETAIN[split])
        tasks = [task for task in self.tasks(split) if task not in (0, *unlearned)]
        return self._cut(0, _RETAIN_ROWS[split]) + [row for task in tasks for row in self.task_rows(split, task)]

    def compared(self, split: str, task: int) -> list[Row]:
        if task == 0:
            return of_task(self.splits.optional(f"{split}_perturbed"), task)
        # forget10_perturbed covers rows 3600 to 4000 of full, which hold every task of forget01 and some of the others
        compared = {row.question: row for row in self.splits.optional("forget10_perturbed")}
        return [compared.get(row.question, row) for row in self.task_rows(split, task)]

    def describe(self, split: str, task: int) -> str:
        if task == 0:
            return f"{split} of {self.splits.name} (the hub's own cut)"
        start, end = self._range(split, task)
        return f"task {task} of {split}: rows {start} to {end - 1} of {self.splits.name} full"

    def _range(self, split: str, task: int) -> tuple[int, int]:
        start = _TASK_STARTS[split][task - 1]
        return start, start + _TASK_ROWS[split]

    def _cut(self, start: int, end: int) -> list[Row]:
        full = self.splits.rows("full")
        if len(full) < end:
            raise InputError(
                f"--data {self.splits.name}: full has {len(full)} rows, the published tasks are cut from 4000; give them all"
            )
        return full[start:end]


class TofuSource:
    """Says which rows of TOFU-shaped data a task forgets, keeps and measures, wherever their splits lie."""

    def __init__(self, splits: Splits, holdout: Sequence[Row] = ()) -> None:
        """Take the splits, and rows that no model has seen in place of the data's own."""
        self.name = splits.name
        self._splits = splits
        self._holdout = list(holdout)
        self._layout: _Numbered | _CutFromFull = _CutFromFull(splits) if splits.cut_from_full else _Numbered(splits)

    def rows(self, split: str) -> list[Row]:
        """Give all rows of one split.

        Raises:
            InputError: if the split is unknown, cannot be reached, or holds a bad row.
        """
        return self._splits.rows(split)

    def cut(self, formatter: object) -> None:
        """Leave every row as it is: there are no passages."""

    def tasks(self, split: str) -> list[int]:
        """List the numbers of the forget tasks.

        Raises:
            InputError: if the data cannot be the real-world scenario that `split` asks for.
        """
        if split == REAL_WORLD and not self._splits.real_world:
            raise InputError("--split forget is the real-world scenario; give the folder of its files with --data")
        return self._layout.tasks(split)

    def task_rows(self, split: str, task: int) -> list[Row]:
        """Give what a task is to forget.

        Raises:
            InputError: if there is no such task.
        """
        tasks = self.tasks(split)
        if task not in tasks:
            raise InputError(f"task {task}: {split} of {self.name} has no such task; it has {', '.join(map(str, tasks))}")
        return self._layout.task_rows(split, task)

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        """Give what is kept while the last of the tasks `unlearned` is being forgotten.

        These are the rows that no task of this size ever takes away, and those of the tasks that have not been unlearned
        yet: the current task and earlier ones are out. The hub's own forget set (task 0) has the hub's own retain set.

        Raises:
            InputError: if task 0 is mixed with others.
        """
        return self._layout.retain_rows(split, unlearned)

    def evaluation_sets(self, split: str, task: int) -> EvaluationSets:
        """Give the rows that are measured by the name of their set, and why other sets are missing: `(sets, skipped)`."""
        forget = self.task_rows(split, task)
        sets = {"forget": self._layout.compared(split, task) or forget}
        skipped: dict[str, str] = {}
        real_world = split == REAL_WORLD
        for name, file in _EVALUATION_SETS.items():
            file = "neighbor_perturbed" if real_world and name == "retain" else file
            rows = self._splits.optional(file)
            if rows:
                sets[name] = rows
            elif real_world and name != "retain":
                skipped[name] = "the real-world scenario has no such set; --lm-eval-tasks measures general ability"
            else:
                skipped[name] = f"{self.name} has no {file}"
        holdout = self._holdout or self._splits.optional(split.replace("forget", HOLDOUT))
        if holdout:
            sets[HOLDOUT] = holdout
        if real_world:  # what is known is the short fact; the long answer says more than was asked
            sets = {
                name: [replace(row, answer=row.golden_answer or row.answer, original_answer=row.answer) for row in rows]
                for name, rows in sets.items()
            }
        return sets, skipped

    def describe(self, split: str, task: int) -> str:
        """Say in words which rows a task is."""
        return self._layout.describe(split, task)


def tofu_source(name: str, holdout: Sequence[Row] = ()) -> TofuSource:
    """Open `--data`: the demo, a folder or a hub id. `holdout` are rows that no model has seen, if not the data's own.

    Raises:
        InputError: if it looks like a folder and is none.
    """
    return TofuSource(open_splits(name), holdout)
