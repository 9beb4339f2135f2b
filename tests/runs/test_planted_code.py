"""Code that someone has planted in a checkpoint is not run when it is resumed, and what nobody touched goes on bit for bit."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted import plant_whole
from support import FOLDER, ROOT, arguments, launch, same_end

from dualoptim import InputError, run

SHORT = {
    "max_steps": 6,
    "save_every": 2,
    "keep_checkpoints": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "threads": 1,
}
FILES = {
    "ddp": ["optimizer.bin", "random_states_0.pkl", "random_states_1.pkl"],
    "zero2": [
        "pytorch_model/mp_rank_00_model_states.pt",
        "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "random_states_1.pkl",
    ],
    "zero3": [
        "pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "random_states_0.pkl",
    ],
    "fsdp2": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "random_states_1.pkl"],
}


def copies(parts: Path, names: list[str]) -> dict[str, Path]:
    """Copies of an interrupted run, each with code planted in one file of its only checkpoint, by the file's name."""
    (checkpoint,) = (parts / FOLDER / "checkpoint").iterdir()
    found = {}
    for name in names:
        found[name] = shutil.copytree(parts, parts.with_name(name.replace("/", "-")))
        plant_whole(found[name] / checkpoint.relative_to(parts), name, found[name] / "ran")
    return found


def test_planted_code_is_refused_and_not_run(tiny, tmp_path):
    args = arguments(tiny, tmp_path / "parts", "dual-adamw", **{**SHORT, "max_steps": 4})
    run(args)
    (tmp_path / "parts" / FOLDER / "trained.json").unlink()  # as if it had been interrupted there
    for name, folder in copies(tmp_path / "parts", ["optimizer.bin", "random_states_0.pkl"]).items():
        again = dataclasses.replace(args, output_dir=str(folder), max_steps=6, resume="newest")
        message = (
            rf"--resume: .*step-4: {name} asks for code to be run \(posix.mkdir\), and there is no other one to go on from"
        )
        with pytest.raises(InputError, match=message):
            run(again)
        line = [sys.executable, str(ROOT / "train_unlearn.py"), "--config", str(folder / FOLDER / "config.yaml"), "--resume"]
        done = subprocess.run([*line, "--max-steps", "6", "--output-dir", str(folder)], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("error: --resume: ")
        assert not (folder / "ran").exists()


def test_an_earlier_checkpoint_without_it_is_gone_on_from(tiny, tmp_path, capsys):
    changes = {**SHORT, "keep_checkpoints": 2}
    run(arguments(tiny, tmp_path / "whole", "dual-adamw", **changes))
    args = arguments(tiny, tmp_path / "parts", "dual-adamw", **{**changes, "max_steps": 4})
    run(args)
    (tmp_path / "parts" / FOLDER / "trained.json").unlink()
    newest = tmp_path / "parts" / FOLDER / "checkpoint" / "step-4"
    plant_whole(newest, "optimizer.bin", tmp_path / "ran")
    run(dataclasses.replace(args, max_steps=6, resume="newest"))
    assert "optimizer.bin asks for code to be run (posix.mkdir); going on from step-2" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_a_file_that_the_run_has_not_written_is_looked_at_too(tiny, tmp_path):
    args = arguments(tiny, tmp_path / "run", "dual-adamw", **{**SHORT, "max_steps": 4})
    run(args)
    (tmp_path / "run" / FOLDER / "trained.json").unlink()
    checkpoint = tmp_path / "run" / FOLDER / "checkpoint" / "step-4"
    shutil.copy(checkpoint / "optimizer.bin", tmp_path / "optimizer.bin")
    plant_whole(checkpoint, "optimizer.bin", tmp_path / "ran")
    (checkpoint / "optimizer.bin").rename(checkpoint / "scheduler.bin")
    shutil.copy(tmp_path / "optimizer.bin", checkpoint / "optimizer.bin")
    with pytest.raises(InputError, match=r"is not what was written|scheduler.bin asks for code"):
        run(dataclasses.replace(args, max_steps=6, resume="newest"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.launch
@pytest.mark.parametrize("strategy", FILES)
def test_two_processes_go_on_from_what_nobody_touched_and_refuse_the_rest(tiny, tmp_path, strategy):
    parts = arguments(tiny, tmp_path / "parts", "dual-adamw", **{**SHORT, "max_steps": 4})
    whole = arguments(tiny, tmp_path / "whole", "dual-adamw", **SHORT)
    launch(strategy, {"runs": [dataclasses.asdict(whole), dataclasses.asdict(parts)]})
    (tmp_path / "parts" / FOLDER / "trained.json").unlink()
    planted = copies(tmp_path / "parts", FILES[strategy])
    again = dataclasses.replace(parts, max_steps=6, resume="newest")
    launch(strategy, {"runs": [dataclasses.asdict(again)]})
    same_end(tmp_path / "whole", tmp_path / "parts")

    runs = [dataclasses.asdict(dataclasses.replace(again, output_dir=str(folder))) for folder in planted.values()]
    done = launch(strategy, {"runs": runs, "refused": True})
    for name, folder in planted.items():
        said = f"{folder / FOLDER}/checkpoint/step-4: {Path(name).name} asks for code to be run (posix.mkdir)"
        assert done.stdout.count(said) == 2, done.stdout[-3000:]
        assert not (folder / "ran").exists()
