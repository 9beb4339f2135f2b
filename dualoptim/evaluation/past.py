"""Know what lies behind a model that is judged: how it was before its task and before the first one, and what ended it."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualoptim.atomic import read_json, read_json_lines
from dualoptim.config.flags import flag_name
from dualoptim.config.saved import earlier_value, read_written
from dualoptim.errors import InputError
from dualoptim.evaluation.summary import Summary

TRAINED, WATCHED = "trained.json", "watched.jsonl"


@dataclass(frozen=True)
class Past:
    """What lies behind a model, beside how it was before its task."""

    first: Summary | None = None  # of the model before the first of several tasks
    ended_by: str = ""  # the limit that ended its unlearning before its steps had: keep_budget or forget_until
    pair: str = ""  # of objectives, as ME+GD, by which it has forgotten


def ended_by(task: Path) -> str:
    """Name the limit that ended a task before its steps had; nothing where none did."""
    return str(_trained(task).get("ended_by", ""))


def why_ended(task: Path) -> str:
    """Say behind a comma why a task ended before its steps had, or what it has not reached with them; mostly nothing."""
    found = _trained(task)
    return "".join(f", {found[name]}" for name in ("ended", "not_reached") if name in found)


def result_of(task: Path, steps: int) -> int:
    """Give the step whose model is a task's result: the last of `steps`, or an earlier one, if what followed lost too much."""
    return int(_trained(task).get("result", steps))


def watched(task: Path) -> list[dict[str, float]]:
    """Read what a task with a limit knew by its steps, of the rows that were watched.

    Raises:
        InputError: if it cannot be read.
    """
    path = task / WATCHED
    try:
        lines = read_json_lines(path) if path.is_file() else []
        return [{name: float(value) for name, value in line.items()} | {"step": int(line["step"])} for line in lines]
    except (OSError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not what was watched ({error!r}); repeat that run, or restore the file") from None


def before_unlearning(task: Path, folder: Path) -> tuple[Summary | None, Past]:
    """Read what lies behind the model of a task of ours; no scores where other rows were measured then, or otherwise than now.

    `folder` is where it is measured now.
    """
    before = _measured_alike(task / "eval_before", folder, ("forget", "retain"))
    first, by, pair, config = None, "", "", task / "config.yaml"
    with contextlib.suppress(InputError, LookupError, TypeError):
        pair = str(earlier_value(config, "forget_losses")[0])
        place = task.parent / f"task{earlier_value(config, 'task_list')[0]}"
        first = _measured_alike(place / "eval_before", folder, ("retain",)) if place != task else None
    with contextlib.suppress(InputError):
        by = ended_by(task)
    return before, Past(first, by, pair)


_ALIKE = ("eval_rows", "max_new_tokens")
"""Settings that say how many rows an evaluation measures, and how much of their answers."""


def otherwise(task: Path, settings: Mapping[str, Any]) -> str:
    """Say which settings keep an evaluation from being compared with the one before a task; mostly nothing."""
    then: dict[str, Any] = {}
    with contextlib.suppress(InputError):
        if (task / "eval_before" / "summary.json").is_file():
            then = read_written(task / "config.yaml")
    differ = [name for name in _ALIKE if name in then and then[name] != settings[name]]
    now, before = (", ".join(f"{flag_name(name)} {values[name]}" for name in differ) for values in (settings, then))
    why = f"{now}: not compared with before unlearning, which was measured with {before}; give the same for that"
    return why if differ else ""


def _measured_alike(place: Path, folder: Path, names: Iterable[str]) -> Summary | None:
    """Read a summary, if the sets of these names had the same rows there as in `folder`, and were measured in the same way."""
    try:
        then, now = (read_json(one / "finished.json", {}, "") for one in (place, folder))
        same = all(then[name]["inputs"] == now[name]["inputs"] for name in names if name in now)
        return Summary.read(place / "summary.json") if same else None
    except (InputError, KeyError, TypeError):
        return None


def _trained(task: Path) -> dict[str, Any]:
    path = task / TRAINED
    return read_json(path, {"steps": int}, "remove it") if path.exists() else {}
