"""Hand the settings of a run on to another command: those that it has itself, of the model that the run left."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dualoptim.config.args import CommonArgs, EvalArgs, FinetuneArgs, UnlearnArgs
from dualoptim.config.flags import default_of, flags
from dualoptim.errors import InputError

_OWN = ("output_dir", "overwrite")
"""Settings of a run that mean no other call."""


def handed_on(
    kind: type[CommonArgs], values: Mapping[str, Any], path: Path, given: Collection[str] = ()
) -> tuple[dict[str, Any], str]:
    """Give what a command takes of the settings in a run's `config.yaml`, and a line that says so.

    All of them, and no line, where the run was of this command. An evaluation is of the task in whose folder the file lies, and
    of the model beside it, from which unlearning starts as well; teaching starts from the run's own first model. What is
    `given` by flags stands over all this.

    Raises:
        InputError: if the run was to train a model and left none beside the file, and no other is given.
    """
    known = {name for one in (UnlearnArgs, FinetuneArgs, EvalArgs) for name in flags(one)}
    if not (values.keys() & known) - flags(kind).keys():
        return dict(values), ""
    taken = {name: value for name, value in values.items() if name not in _OWN and (name in flags(kind) or name not in known)}
    if kind is EvalArgs:
        taken |= _task_of(values, path.absolute().parent.name) | _rows_made(values)
    if kind is not FinetuneArgs:
        model = path.with_name("model")
        trained = values.keys() & flags(FinetuneArgs).keys() - flags(EvalArgs).keys()
        if model.is_dir():
            taken["model"] = str(model)
        elif trained and "model" not in given:
            what = f"--config {path} is of a run that left no model beside it"
            raise InputError(f"{what}; finish that run with --resume, or give --model")
    named = [name for name in taken if name in flags(kind) and not _is_default(kind, name, taken[name])]
    return taken, f"--config {path} is of another command: of its settings this one takes {', '.join(named)}, and no other"


def _task_of(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Say which of a run's tasks lies in a folder of this name, or anywhere if it is the only one: by target or number."""
    tasks, targets, said = values.get("task_list") or [], values.get("targets") or [], re.fullmatch(r"task(\d+)", folder)
    task = int(said[1]) if said else tasks[0] if len(tasks) == 1 else None
    if task in tasks and len(targets) == len(tasks):
        return {"targets": [targets[tasks.index(task)]]}
    return {} if task is None else {"task": task}


def _rows_made(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name the file of the rows to keep that a run made from its model, so that what it kept is measured by the same ones."""
    if not values.get("forget_file") or values.get("retain_file") or not values.get("output_dir"):
        return {}
    folder = Path(values.get("reference_dir") or f"{values['output_dir']}/reference").expanduser()
    found = sorted(folder.glob("own-answers-*.jsonl"))
    return {"retain_file": [str(found[0])]} if len(found) == 1 else {}


def _is_default(kind: Any, name: str, value: Any) -> bool:
    default = default_of(kind, name)
    return value == (list(default) if isinstance(default, tuple) else default)
