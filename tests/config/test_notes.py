"""What is said of settings that do less, or more, than their names promise."""

import pytest

from dualoptim import UnlearnArgs
from dualoptim.config.cli import parse
from dualoptim.config.notes import low_rates, setting_notes, tasks_note
from dualoptim.config.presets import preset


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, 0),
        ({"forget_coeff": 0.1}, 1),
        ({"forget_coeff": 0.1, "regularization_coeff": 2.0}, 2),
        ({"forget_coeff": 0.1, "forget_optimizer": "signsgd"}, 1),
        ({"forget_coeff": 0.1, "optim_bits": 8}, 1),
        ({"forget_coeff": 0.1, "forget_optimizer": "sgd"}, 0),  # its steps grow with the gradient
        ({"forget_coeff": 0.1, "decouple": "m"}, 0),
        ({"forget_coeff": 0.1, "optim": "dual-adamw-plus"}, 0),
        ({"forget_coeff": 0.1, "optim": "adamw-alternate"}, 0),
        ({"forget_coeff": 0.1, "optim": "adamw"}, 0),
    ],
)
def test_a_factor_that_is_divided_out_is_told(changes, said):
    notes = setting_notes(UnlearnArgs(**changes))
    assert len(notes) == said
    if said:
        assert notes[0].startswith(
            "--forget-coeff 0.1 changes little, for the forget steps have an optimizer state of their own"
        )
        assert notes[0].endswith("give --forget-strength, --forget-lr or --retain-freq")


@pytest.mark.parametrize("changes", [{"forget_lr": 1e-9}, {"forget_strength": 0.5}])
def test_a_rate_of_forget_steps_over_a_shared_state_is_told(changes):
    (note,) = setting_notes(UnlearnArgs(optim="adamw-alternate", **changes))
    assert "retain steps carry forgetting on at their own rate" in note
    assert setting_notes(UnlearnArgs(optim="dual-adamw", **changes)) == []
    assert setting_notes(UnlearnArgs(optim="adamw-alternate")) == []


def test_every_rate_that_is_too_low_is_named_also_one_of_forget_steps_alone():
    both, names = ["--learning-rates", "--forget-lr"], ("tofu-phi-1.5", "me-gd")
    assert low_rates(preset(*names), 1e-4) == both
    assert low_rates(preset(*names, learning_rates=(5e-4,)), 1e-4) == ["--forget-lr"]
    assert low_rates(preset(*names, learning_rates=(5e-4,), forget_lr=5e-4), 1e-4) == []
    assert low_rates(UnlearnArgs(model="m", data="d", learning_rates=(1e-5,)), 1e-4) == both[:1]


def test_several_tasks_are_told_to_start_where_the_last_one_ended_or_each_from_the_first_model():
    assert tasks_note(UnlearnArgs()) == []
    assert tasks_note(UnlearnArgs(task_list=(1, 2))) == ["tasks 1, 2: one after another, each from what the last one left"]
    assert tasks_note(UnlearnArgs(task_list=(1, 2), tasks_independent=True)) == ["tasks 1, 2: each from the first model"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--preset tofu-llama2-7b --model m", "--template llama2"),
        ("--preset tofu-phi-1.5 me-gd --model_path m", "--template qa"),
        ("--preset tofu-llama2-7b", ""),
        ("--preset tofu-llama2-7b --model m --template auto", ""),
        ("--preset me-gd --model m", ""),
        ("--model m", ""),
    ],
)
def test_a_preset_is_told_to_keep_its_prompts_for_another_model(words, said, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse(UnlearnArgs, words.split())
    line = f"--preset: prompts are those of its own model, {said}; another kind of model takes --template auto\n"
    assert line in capsys.readouterr().out if said else "prompts" not in capsys.readouterr().out
