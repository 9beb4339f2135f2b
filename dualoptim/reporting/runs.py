"""Find what runs have left in their folders, and read it: settings, steps, scores and answers."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dualoptim.atomic import read_json
from dualoptim.config.args import SPLITS, CommonArgs, EvalArgs, MeasureArgs, UnlearnArgs
from dualoptim.config.flags import flags
from dualoptim.config.opening import read_text
from dualoptim.config.saved import read_written, to_dict
from dualoptim.config.values import field_value
from dualoptim.errors import InputError
from dualoptim.evaluation.past import watched, why_ended
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.plots import Points
from dualoptim.reporting.unread import unread


@dataclass(frozen=True)
class Training:
    """What log.jsonl says of a task's optimizer steps; a point of a curve is the number of a step and its value."""

    steps: int
    seconds: float
    losses: Mapping[str, Points]  # of forget and of retain, where there is one
    gradient_norms: Mapping[str, Points]  # by phase, before clipping

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]]) -> "Training":
        """Gather the curves of a log; values that are not finite are left out."""
        if any(not 0 <= record["step"] < 2**63 for record in records):
            raise ValueError("a step has no number")
        losses = {name: [(record["step"], _loss(record, name)) for record in records] for name in ("forget", "retain")}
        norms: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            norms.setdefault(record["phase"], []).append((record["step"], record["grad_norm"] or math.nan))  # its axis has no 0
        return cls(len(records), sum(record["seconds"] for record in records), _drawn(losses), _drawn(norms))


def _drawn(curves: Mapping[str, Points]) -> dict[str, Points]:
    """Keep the finite points of curves, and curves that have some."""
    kept = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    return {name: points for name, points in kept.items() if points}


def _loss(record: Mapping[str, Any], name: str) -> float:
    """Read a loss from a step of its own phase, or of both; NaN where there is none."""
    alone = record["phase"] == name or (record["phase"] == "joint" and name == "forget" and "forget_loss" not in record)
    key = "loss" if alone else f"{name}_loss"
    return float(record[key]) if key in record else math.nan


@dataclass(frozen=True)
class Outcome:
    """A task that was unlearned, or a model that was evaluated: what its folder says, as far as it is there."""

    label: str
    folder: Path
    settings: Mapping[str, Any]  # flags as in config.yaml, and `environment`
    task: int | None = None  # None: evaluated alone
    training: Training | None = None
    before: Summary | None = None
    after: Summary | None = None
    on_the_way: Mapping[int, Summary] = field(default_factory=dict)  # after so many steps
    watched: Sequence[Mapping[str, float]] = ()  # what was known of watched rows, by `step`, where there were limits
    measured: Mapping[str, str] = field(default_factory=dict)  # a hash of texts and settings by the set that was measured
    ended: str = ""  # why, behind a comma, where a limit has ended it or was not reached

    @property
    def kind(self) -> type[MeasureArgs]:
        """The arguments that the settings are of."""
        return EvalArgs if self.task is None else UnlearnArgs

    def setting(self, name: str) -> Any:
        """Look a flag up, which counts as its default where the settings lack it; None if there are no settings."""
        return self._resolved.get(name)

    def read(self, name: str) -> Any:
        """Look a flag up in the same way; None also where nothing of the run reads it."""
        return None if name in unread(self._resolved) else self.setting(name)

    @cached_property
    def _resolved(self) -> dict[str, Any]:
        return {**to_dict(self.kind()), **self.settings} if self.settings else {}

    def answers(self, name: str, count: int) -> dict[str, list[Record]]:
        """Read the first `count` rows of an evaluation set, before and after.

        Raises:
            InputError: if a file cannot be read.
        """
        parts = {"answer": "eval"} if self.task is None else {"before": "eval_before", "after": "eval"}
        return {title: _read_records(self.folder / part / f"{name}.jsonl", count) for title, part in parts.items()}


def find_outcomes(run: Path, name: str = "") -> list[Outcome]:
    """Find every task and evaluation of a RUN, tasks in the order in which they were unlearned; `name` begins their labels.

    Raises:
        InputError: if there is none, or one of their files cannot be read.
    """
    if not run.is_dir():
        raise InputError(f"RUN {run}: no such folder; give the output folder of dualoptim unlearn, sweep or eval")
    folders = [run] if _is_task(run) else []
    folders = folders or [path for depth in ("", "*/", "*/*/") for path in run.glob(f"{depth}task*") if _is_task(path)]
    found = [_read_task(folder, run, name) for folder in folders]
    found.sort(key=lambda one: (_natural(str(one.folder.parent)), _position(one), _natural(one.folder.name)))
    for own in (run, *(run / split for split in SPLITS)):
        if own not in folders and (own / "eval" / "summary.json").is_file():
            settings, summary = (
                read_settings(own / "eval" / "config.yaml", EvalArgs),
                Summary.read(own / "eval" / "summary.json"),
            )
            label = (name or run.resolve().name) + (f"/{own.name}" if own != run else "")
            found.append(Outcome(label, own, settings, after=summary, measured=_measured(own / "eval")))
    if not found:
        raise InputError(
            f"RUN {run}: no task<k>/ with config.yaml and log.jsonl in it, and no eval/summary.json; give the output folder of "
            "dualoptim unlearn, sweep or eval"
        )
    return found


def _is_task(folder: Path) -> bool:
    named = re.fullmatch(r"task\d+", folder.resolve().name)
    return bool(named) and (folder / "config.yaml").is_file() and (folder / "log.jsonl").is_file()


def _read_task(folder: Path, run: Path, name: str) -> Outcome:
    whole = folder.resolve()
    parts = whole.relative_to(run.resolve()).parts
    parts = parts[:1] + parts[2:] if len(parts) > 2 and parts[0].startswith(f"{parts[1]}_") else parts  # of a sweep: said twice
    label = "/".join(parts) or f"{whole.parent.name}/{whole.name}"
    before, after = (folder / part / "summary.json" for part in ("eval_before", "eval"))
    return Outcome(
        f"{name}/{label}" if name and folder != run else name or label,
        folder,
        read_settings(folder / "config.yaml", UnlearnArgs),
        int(whole.name.removeprefix("task")),
        _read_log(folder / "log.jsonl"),
        Summary.read(before) if before.is_file() else None,
        Summary.read(after) if after.is_file() else None,
        measured_steps(folder),
        watched(folder),
        _measured(folder / "eval"),
        why_ended(folder),
    )


def _measured(folder: Path) -> dict[str, str]:
    """Read of which texts, measured in which way, an evaluation has computed each set; nothing where that is not known."""
    try:
        finished = read_json(folder / "finished.json", {}, "")
        return {name: str(own["inputs"]) for name, own in finished.items()}
    except (InputError, LookupError, TypeError):
        return {}


def measured_steps(folder: Path) -> dict[int, Summary]:
    """Read how the model of a task was measured between its steps, in their order, by the number of the last one before.

    Raises:
        InputError: if a file cannot be read.
    """
    found = (path for path in folder.glob("steps/step-*/eval/summary.json") if path.parts[-3].removeprefix("step-").isdecimal())
    steps = {int(path.parts[-3].removeprefix("step-")): path for path in found}
    return {step: Summary.read(steps[step]) for step in sorted(steps)}


def _position(outcome: Outcome) -> int:
    order = outcome.setting("task_list") or []
    return order.index(outcome.task) if outcome.task in order else len(order)


def _natural(name: str) -> list[tuple[float, str]]:
    """Return a sort key that puts task2 before task10, and lr0.0002 before lr0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name)
    return [(float(part), "") if part[:1].isdecimal() else (-1.0, part) for part in parts]


def _read_log(path: Path) -> Training:
    records = _read_objects(path)
    try:
        return Training.of_records(records)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not a log of steps ({error!r}); repeat that run, or restore the file") from None


def _read_records(path: Path, count: int) -> list[Record]:
    try:
        rows = _read_objects(path) if path.is_file() else []
        return [Record.from_json(row, f"{path}:{number}") for number, row in enumerate(rows[:count], 1)]
    except ValueError as error:
        raise InputError(f"{error}; repeat that evaluation, or restore the file") from None


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """Read JSON objects, one a line, naming the line that is none."""
    rows = []
    text = read_text(str(path), path, "restore the file").removesuffix("\n")
    for number, line in enumerate(text.split("\n") if text else [], 1):  # generated texts hold other separators too
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            raise InputError(f"{path}:{number}: not JSON ({why}); repeat that run, or restore the file") from None
        if not isinstance(rows[-1], dict):
            raise InputError(f"{path}:{number}: not a JSON object; repeat that run, or restore the file")
    return rows


def read_settings(path: Path, kind: type[CommonArgs]) -> dict[str, Any]:
    """Read a `config.yaml`, whose values are those that flags of `kind` take; nothing where there is none.

    Raises:
        InputError: if it is not what was written.
    """
    if not path.is_file():
        return {}
    value = read_written(path)
    for name in flags(kind).keys() & value.keys():
        field_value(kind, name, value[name], f"{path}: {name}")
    return value
