"""Find the model that a run has left, and the one that it began with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from dualoptim.config.args import CommonArgs, EvalArgs
from dualoptim.config.values import expect
from dualoptim.errors import InputError
from dualoptim.models.load import load_model
from dualoptim.models.loaded import LoadedModel
from dualoptim.reporting.runs import read_settings

_PROMPTING = ("template", "question_start_tag", "question_end_tag", "answer_tag", "date_string", "system_prompt", "max_length")


@dataclass(frozen=True)
class Left:
    """The model that a run has left, or one that is no run's, and the one that the run began with."""

    after: EvalArgs
    before: EvalArgs | None = None


def left_by(run: str) -> Left:
    """Find the newest model in the output folder of a run, both asked as the run asked; anything else is a model itself.

    Raises:
        InputError: if there is a folder with no model in it, or what the run says of itself cannot be read.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir() or any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return Left(EvalArgs(model=run))
    models = [path.with_name("model") for path in folder.rglob("config.yaml") if path.with_name("model").is_dir()]
    if not models:
        raise InputError(f"RUN {run}: no model in it; give the output folder of a run that has ended, or the folder of a model")
    newest = max(models, key=lambda path: path.stat().st_mtime_ns)
    settings = read_settings(newest.with_name("config.yaml"), CommonArgs)
    prompting = {name: settings[name] for name in _PROMPTING if name in settings}
    return Left(EvalArgs(model=str(newest), **prompting), EvalArgs(model=str(settings["model"]), **prompting))


def load_left(one: EvalArgs, accelerator: Accelerator) -> LoadedModel:
    """Load a model to be asked, or written elsewhere.

    Raises:
        InputError: if it cannot be, or has no weights on disk.
    """
    expect(one, EvalArgs)
    return load_model(one, accelerator, "measure")


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Have errors that name `--model` name what the user has given it by."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--model", flag, 1)) from None
