"""The demo's taught model: kept, taken where everything agrees that decides its weights, and made anew otherwise."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import FOLDER, RATE, arguments, launch, state_of

from dualoptim import UnlearnArgs, run, taught
from dualoptim.config.args import DEMO
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


@pytest.fixture(autouse=True)
def briefly(monkeypatch, tmp_path):
    """Teach for one epoch, and keep what is taught beside the test's own files."""
    monkeypatch.setattr(taught, "DEMO_RECIPE", {**taught.DEMO_RECIPE, "num_epochs": 1, "splits": ("real_authors_perturbed",)})
    monkeypatch.setenv("DUALOPTIM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def teach(monkeypatch, tmp_path):
    """Save the demo's model to a folder of that name; says whether it was trained for it."""
    learned = []
    learn = taught.learn
    monkeypatch.setattr(taught, "learn", lambda *given: learned.append(1) or learn(*given))

    def run(name: str, **changes) -> bool:
        args = UnlearnArgs(model=DEMO, output_dir=str(tmp_path / name), **changes)
        accelerator = start_accelerator(args)
        learned.clear()
        taught.teach_demo(load_model(args, accelerator), args, tmp_path / name)
        return bool(learned)

    return run


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names = {path.name for path in one.iterdir()}
    return names == {p.name for p in other.iterdir()} and all((one / n).read_bytes() == (other / n).read_bytes() for n in names)


def test_a_second_demo_takes_what_the_first_was_taught(teach, tmp_path, monkeypatch):
    assert teach("first")
    assert not teach("second")
    monkeypatch.setenv("DUALOPTIM_CACHE", "")
    assert teach("third"), "nothing is kept"
    assert same(tmp_path / "first", tmp_path / "second")
    assert same(tmp_path / "first", tmp_path / "third")
    assert "model.safetensors" in os.listdir(tmp_path / "second")


def test_what_decides_the_weights_decides_what_is_taken(teach, monkeypatch, capsys):
    assert teach("first")
    assert "taught anew" not in capsys.readouterr().out
    assert teach("seed", seed=7)
    assert (
        "Earlier demos had another seed than 7, other settings or versions, so that it is taught anew"
        in capsys.readouterr().out
    )
    assert teach("threads", threads=torch.get_num_threads() + 1)
    assert teach("template", question_start_tag="Q: ")
    with monkeypatch.context() as patch:
        patch.setitem(taught.DEMO_RECIPE, "learning_rate", 1e-3)
        assert teach("recipe")
    with monkeypatch.context() as patch:
        patch.setattr(taught.transformers, "__version__", "5.1")
        assert teach("version")
    capsys.readouterr()
    assert not teach("again")
    assert "taught anew" not in capsys.readouterr().out


def test_what_is_not_whole_any_more_is_taught_anew(teach, tmp_path):
    teach("first")
    (kept,) = (tmp_path / "cache").iterdir()
    (kept / "model.safetensors").write_bytes((kept / "model.safetensors").read_bytes()[:-1] + b"x")
    assert teach("second")
    assert not teach("third")
    assert same(tmp_path / "first", tmp_path / "third")


def test_a_cache_that_cannot_be_written_to_costs_time_alone(teach, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert teach("first")
    assert (tmp_path / "first" / "model.safetensors").is_file()


def test_two_demos_may_keep_the_same_at_once(teach, tmp_path, monkeypatch):
    teach("first")
    cache = tmp_path / "cache"
    (kept,) = cache.iterdir()
    with contextlib.suppress(OSError):  # as where another was quicker
        taught._keep(kept.name.split("-")[0], tmp_path / "first")
    assert list(cache.iterdir()) == [kept]
    for number in range(12):
        shutil.copytree(tmp_path / "first", tmp_path / str(number))
        (tmp_path / str(number) / "README.md").write_text(str(number))
        taught._keep(f"{number}", tmp_path / str(number))
    assert len(list(cache.iterdir())) == 8


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("DUALOPTIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert taught._cache() == Path("/somewhere/dualoptim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert taught._cache() == Path("/home/somebody/.cache/dualoptim")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    assert taught._cache() is None


def test_a_run_of_the_demo_ends_alike_with_and_without(tmp_path):
    for name in ("one", "two"):
        run(UnlearnArgs(output_dir=str(tmp_path / name), eval=False, max_steps=3, learning_rates=(RATE,)))
    first, second = (state_of(tmp_path / name / f"ME+GD_lr{RATE:g}" / "task1" / "model") for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.launch
def test_the_processes_of_a_launch_take_it_together(tmp_path):
    runs = [dataclasses.asdict(arguments("demo", tmp_path / name, "dual-adamw", max_steps=2)) for name in ("one", "two")]
    done = launch("ddp", {"runs": runs, "demo_recipe": {"num_epochs": 1, "splits": ["real_authors_perturbed"]}})
    assert done.stdout.count("It has learned them before") == 1
    assert same(tmp_path / "one" / "demo_model", tmp_path / "two" / "demo_model")
    assert same(tmp_path / "one" / FOLDER / "model", tmp_path / "two" / FOLDER / "model")
