"""Writing results so that a reader never sees half of one: beside the target, then renamed."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list

from dualoptim.config.args import CommonArgs
from dualoptim.data.tofu import PROMPT_FILE
from dualoptim.errors import InputError
from dualoptim.models.load import Policy


def output_folder(args: CommonArgs, accelerator: Accelerator) -> Path:
    """Where this run writes, the same on all processes. Nothing is created yet."""
    names = broadcast_object_list([args.output_dir or time.strftime("runs/%Y%m%d-%H%M%S")])
    return Path(names[0]).expanduser()


def claim(args: CommonArgs, accelerator: Accelerator, targets: Iterable[Path]) -> None:
    """Make sure that the files and folders that this run is going to write are not there, removing them with `--overwrite`.

    Nothing else in the output folder is touched. Raises:
        InputError: if one of them exists and `--overwrite` was not given, holds the model or the data, or cannot be written.
    """
    targets = list(targets)
    sources = [Path(name).expanduser().resolve() for name in (args.model, args.data or "") if Path(name).expanduser().exists()]
    for target in targets:
        for ancestor in target.parents:
            if ancestor.exists() and not ancestor.is_dir():
                raise InputError(f"--output-dir: {ancestor} is a file; give another folder")
        if target.exists() and any(target.resolve() in (source, *source.parents) for source in sources if source != Path.cwd()):
            raise InputError(f"--output-dir: {target} holds the model or the data of this run; give another folder")
        if target.exists() and not args.overwrite:
            raise InputError(f"--output-dir: {target} is an earlier result; give another folder, or --overwrite to replace it")
    problem = [""]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            for target in targets:
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = [f"--output-dir: {error.filename} cannot be written ({error.strerror}); give another folder"]
    if broadcast_object_list(problem)[0]:
        raise InputError(problem[0])


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; a number that is not finite is an error, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[Any]:
    """What `write_json_lines` wrote. Lines end at \\n alone: generated texts hold other separators too."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor of a whole (not divided) model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Everything that step `step` (the number of steps taken) needs to go on: weights, both banks, random states.

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
    """The whole checkpoints of a task, the newest last."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(accelerator: Accelerator, path: Path) -> int:
    """The number of steps that a checkpoint has taken.

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


def export_model(accelerator: Accelerator, policy: Policy, folder: Path, card: str) -> None:
    """Write what `from_pretrained` loads: safetensors weights, configuration, tokenizer and a model card."""
    state = accelerator.get_state_dict(policy.model)
    if accelerator.is_main_process:
        beside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        model = accelerator.unwrap_model(policy.model)
        # gathered weights are copies, in which tied ones no longer show; save_pretrained pops entries from what it is given
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = {name: value for name, value in state.items() if name not in tied}
        # an adapter would ask the hub whether the base's vocabulary has been changed
        adapter = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(beside, state_dict=state, safe_serialization=True, **adapter)
        policy.tokenizer.save_pretrained(beside)
        tags = policy.formatter.tags
        write_json(beside / PROMPT_FILE, {"template": policy.template, "tags": asdict(tags) if tags else None})
        (beside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    accelerator.wait_for_everyone()
