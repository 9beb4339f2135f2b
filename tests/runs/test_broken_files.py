"""A file of our own that is cut, empty or something else ends in one line, or is made anew with a word said."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import arguments, state_of

from dualoptim import EvalArgs, InputError, run
from dualoptim.config.args import SweepArgs
from dualoptim.evaluate import evaluate
from dualoptim.sweep import sweep

TEXTS = {
    "empty": b"",
    "a list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "a number": b"3",
    "a text": b'"x"',
    "NUL bytes": b"\0\0\0\0",
    "no UTF-8": b'{"steps": "\xff"}',
    "deep": b"[" * 100_000,
    "other kinds": b'{"steps": "x", "step": "x", "processes": null, "settings": 3, "rows": 5, "inputs": 3, "weights": [1]}',
    "other rows": b'{"steps": -1, "step": -1, "processes": -1, "files": 3, "settings": {}, "rows": [3], "inputs": {"rows": 3}}',
}
WAYS = [*TEXTS, "cut", "a folder"]


def spoil(file: Path, way: str) -> None:
    if way == "cut":
        file.write_bytes(file.read_bytes()[: max(1, file.stat().st_size // 2)])
    elif way == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(TEXTS[way])


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- --resume

CHANGES = {"forget_losses": ("NPO+GD",), "learning_rates": (1e-3,), "max_steps": 3, "save_every": 2, "keep_checkpoints": 9}
TASK = Path("NPO+GD_lr0.001") / "task1"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A run that nothing stopped: its folder."""
    folder = tmp_path_factory.mktemp("whole")
    run(arguments(tiny, folder, "dual-adamw", **CHANGES))
    return folder


def again(whole: Path, tiny: Path, folder: Path, finished: bool, **changes):
    """A copy of that run, which has ended or was interrupted before it could say so, and the arguments to go on with."""
    shutil.copytree(whole, folder)
    if not finished:
        (folder / TASK / "trained.json").unlink()
    return arguments(tiny, folder, "dual-adamw", **CHANGES, resume="newest", **changes)


RESUMED = {
    "checkpoint/step-2/state.json": "its state.json is not what was written, and there is no other one to go on from",
    "trained.json": r"trained.json( is a folder|.*; remove it, and --resume goes on from the newest checkpoint)",
    "config.yaml": r"config.yaml.*; put back what the run wrote, or move \S+task1 away$",
    "log.jsonl": r"log.jsonl( is a folder|, which has [01] steps)",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_not_taken_up_again_with_what_it_did_not_write(name, way, whole, tiny, tmp_path):
    args = again(whole, tiny, tmp_path / "run", finished=name == "trained.json")
    spoil(tmp_path / "run" / TASK / name, way)
    if (name, way) == ("trained.json", "other rows"):  # of fewer steps, as after a raised --max-steps
        run(args)
        return
    before = files_of(tmp_path / "run")
    with pytest.raises(InputError, match=RESUMED[name]) as error:
        run(args)
    assert "\n" not in str(error.value)
    assert files_of(tmp_path / "run") == before
    if (name, way) == ("config.yaml", "cut"):  # and what it says works
        (tmp_path / "run" / TASK).rename(tmp_path / "moved")
        run(args)


def test_without_what_says_that_it_has_ended_a_run_goes_on_from_its_newest_checkpoint(whole, tiny, tmp_path):
    run(again(whole, tiny, tmp_path / "run", finished=False))
    one, other = (state_of(folder / TASK / "model") for folder in (tmp_path / "run", whole))
    assert all(one[name].equal(other[name]) for name in other)
    assert (tmp_path / "run" / TASK / "trained.json").is_file()


# ------------------------------------------------------------------------------------------------------------- reference


def foreign(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


def other_counts(path: Path) -> None:
    values = load_file(path)
    save_file({**values, "ends": values["ends"] + 7}, path)


@pytest.mark.parametrize("way", ["empty", "a list", "cut", "a folder", foreign, other_counts])
def test_a_file_of_a_reference_is_made_anew(way, whole, tiny, tmp_path, capsys):
    shutil.copytree(whole / "reference", tmp_path / "run" / "reference")
    (file,) = (tmp_path / "run").rglob("*.safetensors")
    way(file) if callable(way) else spoil(file, way)
    run(arguments(tiny, tmp_path / "run", "dual-adamw", **CHANGES))
    assert f"{file} is no part of a reference; what it may have held is scored again" in capsys.readouterr().out
    one, other = (state_of(folder / TASK / "model") for folder in (tmp_path / "run", whole))
    assert all(one[name].equal(other[name]) for name in other)


# ------------------------------------------------------------------------------------------------------------ evaluations

MEASURED = {"data": "demo", "eval_rows": 2, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory) -> Path:
    """An evaluation, its folder."""
    folder = tmp_path_factory.mktemp("measured")
    evaluate(EvalArgs(model=str(tiny), output_dir=str(folder), **MEASURED))
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["finished.json", "forget.jsonl"])
def test_an_evaluation_measures_anew_what_is_not_what_it_wrote(name, way, measured, tiny, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "run") / "eval"
    (folder / "summary.json").unlink()  # as if it had been interrupted
    spoil(folder / name, way)
    args = EvalArgs(model=str(tiny), output_dir=str(tmp_path / "run"), **MEASURED)
    if way == "a folder":
        with pytest.raises(InputError, match=r"is an earlier result; give another folder, or --overwrite to replace it$"):
            evaluate(args)
        args = dataclasses.replace(args, overwrite=True)
    evaluate(args)
    assert (folder / "forget.jsonl").read_bytes() == (measured / "eval" / "forget.jsonl").read_bytes()
    assert (folder / "summary.json").read_bytes() == (measured / "eval" / "summary.json").read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_an_evaluation_is_not_continued_beside_arguments_that_it_did_not_write(way, measured, tiny, tmp_path):
    folder = shutil.copytree(measured, tmp_path / "run") / "eval"
    (folder / "summary.json").unlink()
    spoil(folder / "config.yaml", way)
    before = files_of(folder)
    args = EvalArgs(model=str(tiny), output_dir=str(tmp_path / "run"), **MEASURED)
    with pytest.raises(InputError, match=r"config.yaml.*; put back what the run wrote, or move \S+eval away$") as error:
        evaluate(args)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="was not written by dualoptim; move it away"):
        evaluate(dataclasses.replace(args, overwrite=True))
    assert files_of(folder) == before
    folder.rename(tmp_path / "moved")
    evaluate(args)


# ---------------------------------------------------------------------------------------------------------------- sweeps


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory) -> tuple[SweepArgs, Path]:
    """A sweep of one run: its arguments and folder."""
    folder = tmp_path_factory.mktemp("sweep")
    args = SweepArgs(
        model=str(tiny), data="demo", learning_rates=(1e-3,), eval=False, max_steps=1, save_every=0, output_dir=str(folder)
    )
    sweep(args)
    return args, folder


@pytest.mark.parametrize("way", WAYS)
def test_a_sweep_says_that_a_run_did_not_end_as_runs_end(way, swept, tmp_path):
    args, folder = swept
    shutil.copytree(folder, tmp_path / "sweep")
    (file,) = (tmp_path / "sweep").rglob("finished.json")
    spoil(file, way)
    before = files_of(tmp_path / "sweep")
    args = dataclasses.replace(args, output_dir=str(tmp_path / "sweep"))
    with pytest.raises(InputError, match=r"finished.json.*; move it away, and the run is taken again") as error:
        sweep(args)
    assert "\n" not in str(error.value)
    assert files_of(tmp_path / "sweep") == before
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    (line,) = sweep(args)
    assert "failed" not in line
