"""Tell how a run goes: a line per step in log.jsonl, a progress bar with both losses, and trackers if they are asked for."""

import contextlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from accelerate import Accelerator
from tqdm import tqdm

from dualoptim.atomic import write_json_lines, write_text
from dualoptim.config.args import CommonArgs
from dualoptim.config.saved import to_dict
from dualoptim.errors import InputError, reason
from dualoptim.evaluation.metrics import AGGREGATES
from dualoptim.evaluation.summary import Summary
from dualoptim.models.load import Policy


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
        if path is not None and is_main_process:
            write_json_lines(path, self.records)
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(total=total_steps, initial=len(self.records), desc=label, unit="step", disable=not is_main_process)
        self._losses: dict[str, str] = {}

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Keep one step's record and show the latest loss of each objective."""
        self.records.append(record)
        apart = {name.removesuffix("_loss"): loss for name, loss in record.items() if name.endswith("_loss")}
        self._losses |= {name: f"{loss:.3g}" for name, loss in (apart or {record["phase"]: record["loss"]}).items()}
        self._bar.set_postfix(self._losses, refresh=False)
        self._bar.update()
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
        self._accelerator.log({f"{record['phase']}/{name}": value for name, value in numbers.items()}, step=record["step"])


def say(accelerator: Accelerator, text: str) -> None:
    """Print on the main process alone. Accelerate's own `print` goes by the local rank, which spawned processes may lack."""
    if accelerator.is_main_process:
        print(text)


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
            local.mkdir(parents=True, exist_ok=True)
        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in config.items()}
        accelerator.init_trackers("dualoptim", plain, options)
    except Exception as error:  # every tracker has kinds of its own
        raise InputError(f"--log-with {' '.join(asked)}: cannot start ({reason(error)}); log in, or drop it") from None
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
    accelerator.log(tracked | {f"{label}/{name}": value for name, value in whole.items() if value is not None}, step=step)


def environment() -> dict[str, Any]:
    """Name the commit this code stands at (None outside a checkout) and the versions of the libraries that shape results."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    packages = ("dualoptim", "torch", "accelerate", "transformers", "peft", "datasets", "tokenizers")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"git_commit": commit, "versions": versions}


def resolve(args: CommonArgs, policy: Policy) -> dict[str, Any]:
    """Every argument as this run resolved it, readable by `--config`."""
    resolved = to_dict(args) | {
        "data": None if getattr(args, "forget_file", None) else args.data_source,
        "template": policy.template,
        "output_dir": str(args.output_dir),
    }
    if policy.formatter.tags:
        resolved |= {f"{name}_tag": text for name, text in asdict(policy.formatter.tags).items()}
    return resolved


def write_config(path: Path, resolved: dict[str, Any]) -> None:
    """The resolved arguments and the environment that they ran in."""
    write_text(path, yaml.safe_dump({**resolved, "environment": environment()}, sort_keys=False, allow_unicode=True))


# What may differ between a run and its continuation: where it ends, what is written and what is measured.
_FREE = """output_dir overwrite resume save_every keep_checkpoints threads eval eval_rows eval_batch_size max_new_tokens
max_steps log_with lm_eval_tasks lm_eval_path reference_dir holdout_file sentence_encoder entailment_model retain_logs
mia_gradnorm push_to_hub hub_public""".split()


def check_same(path: Path, resolved: dict[str, Any]) -> None:
    """Refuse to go on with a run whose `config.yaml` says another mathematics.

    Raises:
        InputError: naming the first argument that differs.
    """
    earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in resolved.items():
        if name not in _FREE and earlier.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"--resume: {flag} was {earlier.get(name)} in {path} and is {value}; give the same value")
