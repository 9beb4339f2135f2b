"""Read and check everything that unlearning needs, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.config.product import single_runs
from dualoptim.data.own import Source, load_refusals, open_source
from dualoptim.evaluate import Measures
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.trainable import chosen_weights
from dualoptim.models.work import TaskRows, check_objectives
from dualoptim.reporting.hub import check_push
from dualoptim.reporting.results import SEQUENCE_FILES

MASTERS = "masters"


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

    @staticmethod
    def read(args: UnlearnArgs, accelerator: Accelerator) -> "Job":
        """Read all that needs no model.

        Raises:
            InputError: if a part of it is missing or wrong.
        """
        source, refusals = open_source(args), load_refusals(args.idk_file)
        kind_of(args).build(args)
        check_push(args)
        job = Job(args, accelerator, source, refusals, None)
        for position in range(len(args.task_list)):
            job.rows(position)
            job.evaluation_sets(position)
        return replace(job, measures=Measures.load(args, accelerator) if args.eval else None)

    def rows(self, position: int) -> TaskRows:
        """Say what the task at `position` of the list forgets and keeps."""
        args = self.args
        forget = self.source.task_rows(args.split, args.task_list[position])
        return TaskRows(forget, self.source.retain_rows(args.split, args.task_list[: position + 1]), self.refusals)

    def evaluation_sets(self, position: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
        """Say what is measured of the task at `position` and of earlier ones (remembered again?), and what is skipped."""
        args = self.args
        if not args.eval:
            return {}, {}
        sets, skipped = self.source.evaluation_sets(args.split, args.task_list[position])
        for earlier in args.task_list[:position]:
            own = self.source.evaluation_sets(args.split, earlier)[0]["forget"]
            if own != sets["forget"]:  # a benchmark may measure the same rows for every task
                sets[f"forget_task{earlier}"] = own
        return sets, skipped

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
        for position in range(len(args.task_list)):
            rows, sets = self.rows(position), self.evaluation_sets(position)[0]
            loaded.formatter.check([*rows.forget, *rows.retain, *(row for own in sets.values() for row in own)])
        check_objectives(args, [self.rows(position) for position in range(len(args.task_list))], loaded)

    def folder(self, task: int) -> Path:
        """Say where a task of one pair and rate lies."""
        args = self.args
        return Path(str(args.output_dir)) / f"{args.forget_losses[0]}_lr{args.learning_rates[0]:g}" / f"task{task}"

    def masters(self, position: int) -> Path:
        """Say where the weights of a task lie as they were trained until the next one has been, if those saved are rounded."""
        return self.folder(self.args.task_list[position]) / MASTERS

    def targets(self) -> list[Path]:
        """List the files and folders that the run is going to write, and must not find."""
        args = self.args
        folders = [replace(self, args=one).folder(task) for one in single_runs(args) for task in args.task_list]
        targets = [*folders, *([Path(str(args.output_dir)) / "demo_model"] if args.model == DEMO else [])]
        if args.eval and len(args.task_list) > 1:
            targets += [folder / name for folder in {f.parent for f in folders} for name in SEQUENCE_FILES]
        return targets
