"""Write checkpoints, from which a run that was killed goes on at the same bits, and find and read them."""

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator, DistributedType

from dualoptim.atomic import write_json
from dualoptim.config.args import NEWEST
from dualoptim.errors import InputError


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write everything that a run needs to go on after `step` steps: weights, both banks, random states.

    Streams and rates are functions of the step and need nothing. Written beside and renamed, so that a kill at any moment
    leaves whole checkpoints only; older ones than the newest `keep` are removed.
    """
    beside, target = folder / "unfinished", folder / f"step-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside), **({"exclude_frozen_parameters": True} if _leaves_out_frozen(accelerator) else {}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(beside / "state.json", {"step": step, "processes": accelerator.num_processes})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Put what `save_checkpoint` wrote back into everything that is prepared."""
    accelerator.load_state(str(path), **({"load_module_strict": False} if _leaves_out_frozen(accelerator) else {}))


def _leaves_out_frozen(accelerator: Accelerator) -> bool:
    """Whether checkpoints hold the trained weights alone: under DeepSpeed, with an adapter."""
    frozen = any(not parameter.requires_grad for model in accelerator._models for parameter in model.parameters())
    return frozen and accelerator.distributed_type == DistributedType.DEEPSPEED


def list_checkpoints(folder: Path) -> list[Path]:
    """List the whole checkpoints of a task, the newest last."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_of(task: Path, resume: str | None) -> Path | None:
    """Find where a task goes on: from its newest checkpoint, the one that `--resume` names if it is its own, or nowhere."""
    if resume in (None, NEWEST):
        whole = list_checkpoints(task / "checkpoint") if resume else []
        return whole[-1] if whole else None
    given = Path(str(resume))
    return given if given.resolve().parent == (task / "checkpoint").resolve() else None


def read_checkpoint(accelerator: Accelerator, path: Path) -> int:
    """Read the number of steps that a checkpoint has taken.

    Raises:
        InputError: if it is no checkpoint, or was written by another number of processes.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise InputError(f"--resume {path}: no checkpoint there; give a folder step-N inside a task's checkpoint/") from None
    if state["processes"] != accelerator.num_processes:
        raise InputError(
            f"--resume: {path} was written by {state['processes']} processes and this run has {accelerator.num_processes}; "
            f"start {state['processes']}"
        )
    return state["step"]
