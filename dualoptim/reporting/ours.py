"""Know what runs of ours have left from what others have, by its names and by what files begin with.

config.yaml                            says under `environment` which commit wrote it
a task's folder, eval/                 hold a config.yaml of ours, and nothing but the names that a run writes
model/, trackers/, log.jsonl, ...      lie beside a config.yaml of ours
demo_model/                            holds a prompt.json
results.csv, other tables, reports     begin with our columns or title; plots lie beside the table that they show
"""

import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from dualoptim.atomic import LOCK
from dualoptim.config.saved import wrote
from dualoptim.errors import InputError
from dualoptim.reporting.results import read_results

_TRAINED = ("log.jsonl", "trained.json", "checkpoint", "model", "masters", "trackers")
_TASK = ("config.yaml", *_TRAINED, "steps", "best", "best.json", "watched.jsonl", "good", "eval_before", "eval", "report*")
_SUITES = ("*_EVAL.json", "*_SUMMARY.json")
_EVALUATION = ("config.yaml", "summary.json", *_SUITES, "finished.json", "*.jsonl", "retain_only", "attacks")
_ALWAYS = ("*.tmp", LOCK, "traceback-*.txt")

_BEGINNINGS: dict[str, str | tuple[str, ...]] = {
    "results.md": "| losses ",
    "methods.md": "| method ",
    "frontier.md": ("# What methods keep at equal forgetting\n", "| kept "),
    "frontier.csv": "method,learning_rate,",
    "splits.csv": "split,",
    "splits.md": "| split ",
    "tasks.csv": ("after_task,", "task,"),
    "tasks.md": ("| after task ", "| task "),
    "report.md": "# Unlearning report: ",
}
_BESIDE = {
    **dict.fromkeys((*_TRAINED, "steps"), "config.yaml"),
    **dict.fromkeys(("report.html", "report"), "report.md"),
    "tasks.png": "tasks.csv",
    "frontier.png": "frontier.csv",
}


def check_ours(paths: Iterable[Path], goes: bool = False) -> None:
    """Make sure that what is there of some files and folders was written by runs of ours; if it `goes`, all within as well.

    Raises:
        InputError: naming the first that was not.
    """
    for other in (other for path in paths for other in _not_ours(path, goes)):
        raise InputError(f"--output-dir: {other} was not written by dualoptim; move it away, or give another folder")


def _not_ours(path: Path, goes: bool) -> Iterator[Path]:
    """Find what is there under a name of ours and is not; a folder is looked at as far as its own entries."""
    if path.is_symlink() or (path.is_dir() and path.suffix):  # files of ours have endings, folders none
        yield path
    elif path.is_dir():
        inside = sorted(path.iterdir())
        if path.name in _BESIDE:
            kept = _is_ours(path.with_name(_BESIDE[path.name]))
        elif path.name == "demo_model":
            kept = (path / "prompt.json").is_file()
        else:
            kept = _is_ours(path / "config.yaml")
            names = (*_ALWAYS, *(_EVALUATION if path.name == "eval" else _TASK))
            yield from [one for one in inside if goes and not any(fnmatch.fnmatchcase(one.name, name) for name in names)]
        if inside and not kept:
            yield path
    elif path.exists() and not _is_ours(path):
        yield path


def _is_ours(file: Path) -> bool:
    """Tell whether a run of ours wrote a file, by what it begins with or, where nothing in it says so, by a file beside it."""
    if not file.is_file():
        return False
    if file.name in _BESIDE:
        return _is_ours(file.with_name(_BESIDE[file.name]))
    try:
        if file.name == "config.yaml":
            return wrote(yaml.safe_load(file.read_text(encoding="utf-8")))
        if file.name == "results.csv":
            return read_results(file) is not None
        with file.open(encoding="utf-8") as text:
            return text.read(200).startswith(_BEGINNINGS[file.name])
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
