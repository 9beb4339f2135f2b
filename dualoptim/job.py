"""Read and check everything that unlearning needs, before anything is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.config.notes import low_rates
from dualoptim.config.optimizers import kind_of
from dualoptim.config.product import sequences, single_runs
from dualoptim.data.demo import is_taught
from dualoptim.data.own import OwnFiles, Source, load_refusals, open_source
from dualoptim.data.rows import Row, in_both
from dualoptim.data.stream import seeded
from dualoptim.data.unseen import kept_rows, said, trained_on
from dualoptim.errors import InputError
from dualoptim.evaluate import Measures
from dualoptim.evaluation.generation import check_asked
from dualoptim.evaluation.own_answers import Made, make_rows
from dualoptim.models.launch import decided, say
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.trainable import chosen_weights
from dualoptim.models.work import TaskRows, check_objectives
from dualoptim.reporting.hub import check_push
from dualoptim.reporting.results import SEQUENCE_FILES

MASTERS = "masters"
WATCHED = 64
"""Rows of a kind that `--forget-until` or `--keep-budget` watch at most: the same ones throughout."""


@dataclass(frozen=True)
class Job:
    """A run's arguments and launch, with the rows, refusals and measures that they name."""

    args: UnlearnArgs
    accelerator: Accelerator
    source: Source
    refusals: list[str]
    measures: Measures | None
    goes_on: Mapping[Path, Path] = field(default_factory=dict)  # from which checkpoint, by the task's folder
    weights: str = ""  # hash of those from which every pair and rate starts
    names_split: bool = False  # in folders, where there are several

    @staticmethod
    def read(args: UnlearnArgs, accelerator: Accelerator) -> "Job":
        """Read all that needs no model.

        Raises:
            InputError: if a part of it is missing or wrong.
        """
        source, refusals = open_source(args), load_refusals(args.idk_file)
        kind_of(args).build(args)
        decided(accelerator, lambda: check_push(args))
        job = Job(args, accelerator, source, refusals, None, names_split=len(args.split) > 1)
        for own, position in job.each_task():
            own.rows(position)
            own.evaluation_sets(position)
            own.watched(position)
        return replace(job, measures=Measures.load(args, accelerator, source) if args.eval else None)

    def each_task(self) -> Iterator[tuple["Job", int]]:
        """Give every task as the job of its sequence, which starts from the first model, and its position there."""
        for one in sequences(self.args):
            for position in range(len(one.task_list)):
                yield replace(self, args=one), position

    def rows(self, position: int) -> TaskRows:
        """Say what the task at `position` of the list forgets and keeps."""
        args = self.args
        forget = self.source.task_rows(args.split[0], args.task_list[position])
        return TaskRows(forget, kept_rows(args, self.source, args.task_list, position + 1), self.refusals)

    def trained_on(self, position: int) -> frozenset[str]:
        """Name the rows that steps have trained on once the task at `position` is done."""
        return trained_on(self.args, self.source, self.args.task_list, position + 1)

    def evaluation_sets(self, position: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
        """Say what is measured of the task at `position` and of earlier ones (remembered again?), and what is skipped."""
        args = self.args
        if not args.eval:
            return {}, {}
        sets, skipped = self.source.evaluation_sets(args.split[0], args.task_list[position])
        for earlier in args.task_list[:position]:
            own = self.source.evaluation_sets(args.split[0], earlier)[0]["forget"]
            if own != sets["forget"]:  # a benchmark may measure the same rows for every task
                sets[f"forget_task{earlier}"] = own
        return sets, skipped

    def watched(self, position: int) -> dict[str, list[Row]]:
        """Draw rows of what is forgotten for `--forget-until`, and for `--keep-budget` of what is kept.

        Those are rows of the retain set that no step trains on, or where there are none any of its rows.

        Raises:
            InputError: if there are no rows to keep.
        """
        args = self.args
        found: dict[str, list[Row]] = {"forget": list(self.rows(position).forget)} if args.forget_until is not None else {}
        if args.keep_budget is not None:
            sets, skipped = self.source.evaluation_sets(args.split[0], args.task_list[position])
            rows = sets.get("retain", [])
            if not rows:
                lacks = skipped["retain"] if args.benchmark and "retain" in skipped else "give --retain-file, or drop it"
                raise InputError(f"--keep-budget {args.keep_budget:g}: there are no rows to keep; {lacks}")
            trained = self.trained_on(position)
            found["kept"] = [row for row in rows if said(row) not in trained] or list(rows)
        return {kind: [rows[n] for n in seeded(0, "watched").permutation(len(rows))[:WATCHED]] for kind, rows in found.items()}

    def check(self, loaded: LoadedModel) -> None:
        """Make sure that the model takes every row, and that rows and model serve every pair of objectives.

        Raises:
            InputError: naming the row or the pair and why.
        """
        args = self.args
        chosen_weights(args, loaded.model)
        if self.measures:
            self.measures.check(loaded)
        self.source.cut(loaded.formatter)
        tasks = []
        for own, position in self.each_task():
            tasks.append(own.rows(position))
            loaded.formatter.check([*tasks[-1].forget, *tasks[-1].retain, *own.watched(position).get("kept", [])])
        check_asked(loaded, args, [own.evaluation_sets(position)[0] for own, position in self.each_task()])
        check_objectives(args, tasks, loaded)
        if is_taught(args.model) and (low := low_rates(args, 1e-4)):
            remedy = " ".join(f"{flag} {'4.5e-4' if 'forget' in flag else '1.5e-4'}" for flag in low)
            say(self.accelerator, f"{args.model} is of the demo, and such rates hardly move it; give {remedy}")
        if both := [pair for rows in tasks for pair in in_both(rows.forget, rows.retain)]:
            first = " and ".join(filter(None, (row.place for row in both[0])))
            what = f"rows to forget that are rows to keep as well: {len(both):,}, the first at {first}"
            say(self.accelerator, f"{what}; take them out of one, or steps undo each other")

    def make_rows(self, loaded: LoadedModel) -> Made | None:
        """Have the model make the rows to keep where no file has them; they are still to be written.

        Raises:
            InputError: if none of its answers can be kept.
        """
        if not (self.args.makes_rows and isinstance(self.source, OwnFiles)):
            return None
        questions = self.source.rows("retain")
        made = make_rows(loaded, self.args, questions, self.source.rows("forget"))
        if not made.rows:
            raise InputError(
                f"{self.args.model} has no answers to general questions that could be kept; give --retain-file, or a pair such "
                "as NPO+none"
            )
        self.source.keep(made.rows)
        loaded.formatter.check(made.rows)
        out, where = len(questions) - len(made.rows), f", in {made.path}" if self.args.texts else ""
        less = f" ({out} are left out: empty, repeating themselves, or about what is to be forgotten)" if out else ""
        say(
            self.accelerator,
            f"No --retain-file: {len(made.rows)} rows to keep are made from the model, its own answers to general questions"
            f"{less}{where}. They keep nothing else: facts of your own that it is to keep need --retain-file",
        )
        return made

    def folder(self, task: int) -> Path:
        """Say where a task of one pair, rate and split lies."""
        args = self.args
        name = f"{args.forget_losses[0]}_lr{args.learning_rates[0]:g}" + (f"_{args.split[0]}" if self.names_split else "")
        return Path(str(args.output_dir)) / name / f"task{task}"

    def masters(self, position: int) -> Path:
        """Say where the weights of a task lie as they were trained until the next one has been, if those saved are rounded."""
        return self.folder(self.args.task_list[position]) / MASTERS

    def targets(self) -> list[Path]:
        """List the files and folders that the run is going to write, and must not find."""
        args = self.args
        every = [one for own in single_runs(args) for one in sequences(own)]
        folders = [replace(self, args=one).folder(task) for one in every for task in one.task_list]
        targets = [*folders, *([Path(str(args.output_dir)) / "demo_model"] if args.model == DEMO else [])]
        if args.eval and len(args.task_list) > 1:
            targets += [folder / name for folder in {f.parent for f in folders} for name in SEQUENCE_FILES]
        return targets
