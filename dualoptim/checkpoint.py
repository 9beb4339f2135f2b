"""Writing results so that a reader never sees half of one: beside the target, then renamed."""

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dualoptim.args import CommonArgs
from dualoptim.errors import InputError
from dualoptim.modeling import Policy


def output_folder(args: CommonArgs, accelerator: Accelerator) -> Path:
    """Where this run writes, the same on all processes. Nothing is created yet."""
    names = broadcast_object_list([args.output_dir or time.strftime("runs/%Y%m%d-%H%M%S")])
    return Path(names[0]).expanduser()


def claim_folders(args: CommonArgs, accelerator: Accelerator, folders: Iterable[Path]) -> None:
    """Empty the folders that this run is going to fill.

    Raises:
        InputError: if one of them holds something and `--overwrite` was not given, or cannot be written.
    """
    folders = list(folders)
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output-dir: {folder} is a file; give another folder")
        if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
            raise InputError(
                f"--output-dir: {folder} holds an earlier result; give another folder, or --overwrite to replace it"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise InputError(f"--output-dir: {folder} cannot be written ({error.strerror}); give another folder") from None
    accelerator.wait_for_everyone()


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


def export_model(accelerator: Accelerator, policy: Policy, folder: Path, card: str) -> None:
    """Write what `from_pretrained` loads: safetensors weights, configuration, tokenizer and a model card."""
    state = accelerator.get_state_dict(policy.model)
    if accelerator.is_main_process:
        beside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        model = accelerator.unwrap_model(policy.model)
        # save_pretrained pops entries from the dictionary that it is given
        model.save_pretrained(beside, state_dict=dict(state), safe_serialization=True)
        policy.tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    accelerator.wait_for_everyone()
