"""Tell how a run goes: a line per step in log.jsonl, a progress bar with both losses, and trackers if they are asked for."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from dualoptim.atomic import NO_ROOM, write_json_lines
from dualoptim.config.waiting import pulsing
from dualoptim.errors import InputError, reason
from dualoptim.evaluation.metrics import AGGREGATES
from dualoptim.evaluation.summary import Summary
from dualoptim.models.together import wait

_BAR = "{desc}: |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""With both losses a line of 80 columns has no room for the rate as well."""


class StepLog:
    """Keep the records of optimizer steps in memory, write them to `path` as they come, show a progress bar, and track them.

    Only the main process writes and shows; a `path` of None keeps the records in memory alone.
    """

    def __init__(
        self,
        path: Path | None,
        total_steps: int,
        label: str,
        accelerator: Accelerator,
        records: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Start a log, or go on with one whose first steps are `records`."""
        self._accelerator, is_main_process = accelerator, accelerator.is_main_process
        self.records: list[dict[str, Any]] = list(records)
        self._file = None
        self._path = path
        if path is not None and is_main_process:
            write_json_lines(path, self.records)
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(total=total_steps, initial=len(self.records), desc=label, disable=not is_main_process, bar_format=_BAR)
        self._pulse = pulsing(self._bar)
        self._losses: dict[str, str] = {}

    def __enter__(self) -> "StepLog":
        self._pulse.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pulse.__exit__(kind, error, trace)
        if self._file is not None:
            self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Keep one step's record and show the latest loss of each objective.

        Raises:
            FileNotFoundError: if the file is not the one that was opened, so that nobody would find the record.
        """
        self.records.append(record)
        apart = {name.removesuffix("_loss"): loss for name, loss in record.items() if name.endswith("_loss")}
        for name, loss in (apart or {record["phase"]: record["loss"]}).items():
            self._losses["loss" if name == "learn" else f"{name} loss"] = f"{loss:.3g}"
        self._bar.set_postfix(self._losses, refresh=False)
        self._bar.update()
        if self._file is not None:
            self._check_place()
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
        self._accelerator.log({f"{record['phase']}/{name}": value for name, value in numbers.items()}, step=record["step"])

    def _check_place(self) -> None:
        with contextlib.suppress(OSError):
            if self._path is None or os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):  # type: ignore[union-attr]
                return
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))


@contextlib.contextmanager
def trackers(accelerator: Accelerator, folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Have the trackers of `--log-with` follow one task, called `name`; those that write files write to `folder`/trackers.

    `config` are the run's arguments as resolved, which every tracker shows.

    Raises:
        InputError: if one of them cannot start, for example because nobody is logged in.
    """
    asked = list(config["log_with"])
    if not asked:
        yield
        return
    local = folder / "trackers"
    accelerator.project_configuration.logging_dir = str(local)
    accelerator.log_with = asked
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": name, "dir": str(local)},
        "mlflow": {"run_name": name},
        "trackio": {"name": name},
        "swanlab": {"experiment_name": name, "logdir": str(local / "swanlab")},
        "dvclive": {"dir": str(local / "dvclive")},
    }
    try:
        if accelerator.is_main_process:
            local.mkdir(exist_ok=True)
        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
        accelerator.init_trackers("dualoptim", plain, options)
    except Exception as error:  # every tracker has kinds of its own
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise InputError(f"--log-with {' '.join(asked)}: cannot start ({reason(error)}); log in, or drop it") from None
    wait(accelerator)  # some ask a server first
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()  # Accelerate's own way of ending them ends the process group too


def track_scores(accelerator: Accelerator, label: str, summary: Summary, step: int) -> None:
    """Give the scores of an evaluation to the trackers, as they stood after `step` steps."""
    tracked = {f"{label}/{name}/{metric}": value for name, scores in summary.sets.items() for metric, value in scores.items()}
    whole = {name: summary.score(name) for name in AGGREGATES if "." not in name}
    whole |= summary.benchmark.scores if summary.benchmark else {}
    accelerator.log(tracked | {f"{label}/{name}": value for name, value in whole.items() if value is not None}, step=step)
