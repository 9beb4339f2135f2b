"""Every pair, rate, forget rate and seed is a run of its own, with what belongs to it and nothing else."""

import pytest

from dualoptim import UnlearnArgs
from dualoptim.config.product import single_runs


def test_pairs_come_first_then_rates_then_forget_rates_then_seeds():
    args = UnlearnArgs(forget_losses=("ME+GD", "GA+GD"), learning_rates=(1e-5, 2e-5))
    found = [(one.forget_losses, one.learning_rates) for one in single_runs(args)]
    assert found == [((pair,), (rate,)) for pair in ("ME+GD", "GA+GD") for rate in (1e-5, 2e-5)]
    found = [(one.learning_rates, one.forget_lr, one.seed) for one in single_runs(args, (3e-5, 4e-5), (1, 2))]
    per_pair = [((rate,), forget, seed) for rate in (1e-5, 2e-5) for forget in (3e-5, 4e-5) for seed in (1, 2)]
    assert found == per_pair * 2


def test_the_forget_rate_is_written_out():
    """A run's config.yaml says both rates, and repeats the run under any default."""
    (one,) = single_runs(UnlearnArgs(model="org/name"))
    assert (one.learning_rates, one.forget_lr) == ((1e-5,), pytest.approx(3e-5))
    (one,) = single_runs(UnlearnArgs(learning_rates=(2e-5,), forget_lr=3e-5))
    assert (one.learning_rates, one.forget_lr) == ((2e-5,), 3e-5)
    (one,) = single_runs(UnlearnArgs(optim="adamw", learning_rates=(2e-5,)))
    assert one.forget_lr is None  # one rate for both losses
    found = single_runs(UnlearnArgs(learning_rates=(1e-5, 2e-5), forget_strength=3))
    assert [(one.learning_rates[0], one.forget_lr, one.forget_strength) for one in found] == [
        (1e-5, pytest.approx(3e-5), None),
        (2e-5, pytest.approx(6e-5), None),
    ]
    (one,) = single_runs(UnlearnArgs(optim="adamw", learning_rates=(2e-5,)))
    assert list(single_runs(one)) == [one]


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({}, 3),
        ({"forget_strength": 1.0}, 1),
        ({"retain_optimizer": "sgd"}, 3),
        ({"decouple": "m"}, 1),
        ({"decouple": "none"}, 1),
        ({"optim": "dual-adamw-plus"}, 1),
        ({"optim": "adamw-alternate"}, 1),
    ],
)
def test_forget_steps_of_two_states_are_three_times_as_fast_unless_a_rate_is_given(settings, strength):
    (one,) = single_runs(UnlearnArgs(learning_rates=(2e-5,), **settings))
    assert one.forget_lr == pytest.approx(2e-5 * strength)
    own = {name: value for name, value in settings.items() if name != "forget_strength"}
    (one,) = single_runs(UnlearnArgs(learning_rates=(2e-5,), forget_lr=2e-5, **own))
    assert one.forget_lr == 2e-5


def test_constants_of_other_pairs_are_left_out():
    args = UnlearnArgs(
        forget_losses=("NPO+GD", "SimNPO+GD", "RMU+EMBED", "ME+GD"), beta=0.2, gamma=0.3, layer=1, fix_ref_model=True
    )
    found = {one.forget_losses[0]: (one.beta, one.gamma, one.layer, one.fix_ref_model) for one in single_runs(args)}
    assert found == {
        "NPO+GD": (0.2, None, None, True),
        "SimNPO+GD": (0.2, 0.3, None, False),
        "RMU+EMBED": (0.2, None, 1, True),
        "ME+GD": (None, None, None, False),
    }


def test_everything_else_stays():
    args = UnlearnArgs(num_epochs=3, task_list=(2, 1), seed=5, output_dir="x")
    (one,) = single_runs(args)
    assert (one.num_epochs, one.task_list, one.seed, one.output_dir) == (3, (2, 1), 5, "x")


def test_a_pair_without_retain_steps_has_no_flags_of_theirs():
    settings = {"project_forget": "tensor", "retain_optimizer": "sgd"}
    without, within = single_runs(UnlearnArgs(forget_losses=("NPO+none", "NPO+GD"), **settings))
    assert {name: getattr(within, name) for name in settings} == settings
    assert {name: getattr(without, name) for name in settings} == {name: getattr(UnlearnArgs(), name) for name in settings}
