"""Settings of a run that another command takes from its config.yaml."""

import dataclasses

import pytest

from dualoptim import EvalArgs, FinetuneArgs, InputError, UnlearnArgs
from dualoptim.config.args import SweepArgs
from dualoptim.config.cli import parse
from dualoptim.config.saved import load_yaml, to_dict, write_config

OWN = {"forget_file": ("f.csv",), "retain_file": ("r.csv",), "question_column": "q", "template": "qa", "texts": False}


@pytest.fixture
def run(tmp_path):
    """Writes the config.yaml of a task, beside a model or without one, and gives its path."""

    def write(args, task="task1", model=True):
        folder = tmp_path / "run" / "NPO+GD_lr1e-05" / task
        (folder / "model").mkdir(parents=True) if model else folder.mkdir(parents=True)
        write_config(folder / "config.yaml", to_dict(args))
        return folder / "config.yaml"

    return write


def test_an_evaluation_takes_data_and_prompts_of_a_run_and_the_model_that_it_left(run, capsys):
    config = run(UnlearnArgs(model="org/name", output_dir="run", num_epochs=9, task_list=(2, 4), **OWN), "task4")
    args = parse(EvalArgs, ["--config", str(config), "--relearn", "20"])
    assert args == EvalArgs(model=str(config.with_name("model")), task=4, relearn=20, **OWN)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"--config {config} is of another command: of its settings this one takes ")
    assert "forget_file, retain_file, question_column" in line
    assert "num_epochs" not in line
    assert parse(EvalArgs, ["--config", str(config), "--model", "mine"]).model == "mine"


def test_an_evaluation_knows_the_task_of_a_run_by_its_target_or_as_the_only_one(run, tmp_path):
    people = UnlearnArgs(model="org/name", benchmark="rwku", data="R", targets=("Ann Lee", "Bob Ray"), task_list=(7, 3))
    args = load_yaml(run(people, "task3"), EvalArgs)
    assert (args.targets, args.task) == (("Bob Ray",), 1)
    alone = tmp_path / "config.yaml"
    write_config(alone, to_dict(UnlearnArgs(model="org/name", task_list=(3,))))
    (tmp_path / "model").mkdir()
    assert load_yaml(alone, EvalArgs) == EvalArgs(model=str(tmp_path / "model"), task=3)


@pytest.mark.parametrize(
    ("left", "command"),
    [
        (UnlearnArgs(model="org/name"), EvalArgs),
        (FinetuneArgs(model="org/name"), EvalArgs),
        (FinetuneArgs(model="org/name"), UnlearnArgs),
        (FinetuneArgs(model="org/name"), SweepArgs),
    ],
)
def test_a_run_that_left_no_model_is_not_taken_for_the_one_that_it_began_with(run, left, command):
    config = run(left, model=False)
    said = f"--config {config} is of a run that left no model beside it; finish that run with --resume, or give --model"
    with pytest.raises(InputError) as error:
        parse(command, ["--config", str(config)])
    assert str(error.value) == said
    assert parse(command, ["--config", str(config), "--model=mine"]).model == "mine"


def test_what_needs_no_model_of_a_run_is_not_asked_for_one(run):
    config = run(UnlearnArgs(model="org/name"), model=False)
    assert [parse(kind, ["--config", str(config)]).model for kind in (FinetuneArgs, UnlearnArgs)] == ["org/name"] * 2
    assert parse(UnlearnArgs, ["--config", str(run(EvalArgs(model="org/name"), "eval", model=False))]).model == "org/name"


def test_teaching_takes_the_first_model_of_a_run_and_unlearning_the_one_that_was_taught(run, tmp_path):
    config = run(UnlearnArgs(model="org/name", batch_size=2, seed=7, **OWN))
    assert load_yaml(config, FinetuneArgs) == FinetuneArgs(model="org/name", batch_size=2, seed=7, **OWN)
    (tmp_path / "model").mkdir()
    write_config(tmp_path / "config.yaml", to_dict(FinetuneArgs(model="org/name", splits=("full",), output_dir="x", **OWN)))
    assert load_yaml(tmp_path / "config.yaml", UnlearnArgs) == UnlearnArgs(model=str(tmp_path / "model"), **OWN)


def test_a_run_of_the_same_command_hands_on_all_without_a_word(run, capsys):
    args = UnlearnArgs(model="org/name", output_dir="x", **OWN)
    config = run(args, model=True)
    assert parse(UnlearnArgs, ["--config", str(config)]) == args
    assert parse(SweepArgs, ["--config", str(config)]).model == "org/name"
    assert capsys.readouterr().out == ""


def test_a_file_of_ones_own_is_held_to_the_flags_of_the_command(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: org/name\nseed: 1\n")
    with pytest.raises(InputError, match="unknown key 'seed'"):
        load_yaml(tmp_path / "mine.yaml", EvalArgs)


@pytest.mark.parametrize("given", ["run", "run/config.yaml", "run/NPO+GD_lr1e-05/task1"])
def test_a_folder_for_a_config_names_the_file_in_it(run, tmp_path, given):
    config = run(UnlearnArgs(model="org/name"))
    with pytest.raises(InputError, match=f"give {str(config).replace('+', '.')}$"):
        parse(EvalArgs, ["--config", str(tmp_path / given)])


def test_an_evaluation_takes_the_rows_to_keep_that_the_run_made(run, tmp_path):
    """Of several files none is known to be the run's."""
    made = tmp_path / "out" / "reference" / "own-answers-0.jsonl"
    args = UnlearnArgs(model="org/name", forget_file=("f.csv",), output_dir=str(tmp_path / "out"))
    config = run(args)
    assert load_yaml(config, EvalArgs).retain_file is None
    made.parent.mkdir(parents=True)
    made.touch()
    assert load_yaml(config, EvalArgs).retain_file == (str(made),)
    kept = run(dataclasses.replace(args, retain_file=("kept.csv",)), "task2")
    assert load_yaml(kept, EvalArgs).retain_file == ("kept.csv",)
    elsewhere = run(dataclasses.replace(args, reference_dir=str(tmp_path / "elsewhere")), "task3")
    assert load_yaml(elsewhere, EvalArgs).retain_file is None
    made.with_name("own-answers-1.jsonl").touch()
    assert load_yaml(config, EvalArgs).retain_file is None
