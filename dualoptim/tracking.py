"""What a run tells while it goes: one line per optimizer step in `log.jsonl`, and a progress bar with both losses."""

import importlib.metadata
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from tqdm import tqdm

from dualoptim.args import CommonArgs, to_dict
from dualoptim.checkpoint import write_text
from dualoptim.modeling import Policy


class StepLog:
    """Records of optimizer steps: kept in memory, written to `path` as they come, and shown as a progress bar.

    Only the main process writes and shows; a `path` of None keeps the records in memory alone.
    """

    def __init__(self, path: Path | None, total_steps: int, label: str, is_main_process: bool) -> None:
        self.records: list[dict[str, Any]] = []
        self._file = None
        if path is not None and is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        self._bar = tqdm(total=total_steps, desc=label, unit="step", disable=not is_main_process)
        self._losses: dict[str, str] = {}

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def add(self, record: dict[str, Any], losses: dict[str, float]) -> None:
        """Keep one step's record and show the latest loss of each objective."""
        self.records.append(record)
        self._losses |= {name: f"{loss:.3g}" for name, loss in losses.items()}
        self._bar.set_postfix(self._losses, refresh=False)
        self._bar.update()
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def environment() -> dict[str, Any]:
    """The commit this code stands at (None outside a checkout) and the versions of the libraries that shape results."""
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


def write_config(path: Path, args: CommonArgs, policy: Policy) -> None:
    """Every argument as this run resolved it, readable by `--config`, and the environment it ran in."""
    resolved = to_dict(args) | {"data": args.data_source, "template": policy.template, "output_dir": str(args.output_dir)}
    if policy.formatter.tags:
        resolved |= {f"{name}_tag": text for name, text in asdict(policy.formatter.tags).items()}
    write_text(path, yaml.safe_dump({**resolved, "environment": environment()}, sort_keys=False, allow_unicode=True))
