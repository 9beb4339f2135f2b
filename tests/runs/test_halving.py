"""Sweeps with fewer runs than they have: which are taken, and that the same command goes on with the same ones."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest

from dualoptim import InputError, unlearn
from dualoptim import sweep as sweep_module
from dualoptim.config.args import SweepArgs
from dualoptim.config.cli import parse
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.results import TaskResult
from dualoptim.sweep import command, first_runs, sweep

RATES = (1e-4, 2e-4, 4e-4, 8e-4)


@pytest.fixture
def args(tmp_path):
    return SweepArgs(
        model="none", forget_losses=("ME+GD",), learning_rates=RATES, vary=(("optim", "dual-adamw", "adamw-alternate"),),
        seeds=(1, 2, 3), budget=13, output_dir=str(tmp_path / "sweep"),
    )  # fmt: skip


@pytest.fixture
def taken(monkeypatch):
    """The runs that are taken, as optimizer, rate in 1e-4 and seed; the higher the rate, the more is forgotten and lost."""
    found = []

    def run(one):
        rate = one.learning_rates[0]
        found.append((one.optim, round(rate * 1e4), one.seed))
        kept = {"retain": {"probability": 1 - 100 * rate}}
        after = Summary(sets={"forget": {"probability": math.exp(-15_000 * rate)}, **kept})
        place = Path(one.output_dir) / f"ME+GD_lr{rate:g}" / "task1"
        return unlearn.RunResult(place.parent, [TaskResult("ME+GD", rate, 1, place, place / "model", [], after, after)])

    monkeypatch.setattr(sweep_module, "run", run)
    monkeypatch.setattr(sweep_module._Now, "changed", lambda *_: None)
    return found


def test_the_better_half_of_each_methods_settings_gets_another_seed(args, taken, capsys):
    sweep(args)
    first = [(optim, rate, 1) for optim in ("dual-adamw", "adamw-alternate") for rate in (1, 2, 4, 8)]
    # 4e-4 forgets to .0025 and keeps most of what does; 8e-4 keeps less, and the others do not forget
    second = [("dual-adamw", 4, 2), ("adamw-alternate", 4, 2), ("dual-adamw", 8, 2), ("adamw-alternate", 8, 2)]
    assert taken == [*first, *second, ("dual-adamw", 4, 3)]
    out = capsys.readouterr().out
    assert "run 13 of at most 13: " in out
    assert "13 of 24 runs, 0 failed" in out
    frontier = (Path(args.output_dir) / "frontier.md").read_text()
    assert frontier.count("/ME+GD_lr0.0004/") == 2, "the best settings' commands"
    # the same command reads what is there, and another budget goes on from it
    taken.clear()
    sweep(args)
    assert taken == []
    sweep(dataclasses.replace(args, budget=14))
    assert taken == [("adamw-alternate", 4, 3)]
    assert "run 14 of at most 14: " in capsys.readouterr().out


def test_of_too_many_settings_as_many_as_may_run_are_drawn_from_every_method_alike(args, taken):
    few = dataclasses.replace(args, budget=5)
    names = first_runs(few)
    sweep(few)
    assert len(taken) == len(names) == 5
    assert {seed for *_, seed in taken} == {1}
    assert sorted(sum(optim == one for one, *_ in taken) for optim in ("dual-adamw", "adamw-alternate")) == [2, 3]
    assert [
        Path(line["folder"]).parents[1].name for line in csv.DictReader((Path(few.output_dir) / "results.csv").open())
    ] == names


def test_a_setting_that_fails_gets_no_further_seed(args, taken, monkeypatch):
    whole = sweep_module.run

    def run(one):
        result = whole(one)
        if one.learning_rates[0] == 4e-4:
            raise RuntimeError("no luck")
        return result

    monkeypatch.setattr(sweep_module, "run", run)
    sweep(dataclasses.replace(args, vary=(), budget=11))
    assert [rate for _, rate, seed in taken if seed > 1] == [8, 2, 8], "the better half of three, then of two"


def test_settings_at_one_rate_that_take_retain_steps_more_often_are_several(args, taken):
    sweep(dataclasses.replace(args, learning_rates=(4e-4,), vary=(("retain_freq", "1", "3", "5"),), budget=5))
    assert [seed for *_, seed in taken] == [1, 1, 1, 2, 2]


def test_a_dry_run_lists_the_first_round_and_takes_none(args, taken, capsys):
    assert command(dataclasses.replace(args, dry_run=True)) == 0
    assert capsys.readouterr().out.split() == first_runs(args)
    assert first_runs(args)[0] == "ME+GD_lr0.0001_flr0.0003_seed1_optim=dual-adamw"
    assert len(first_runs(args)) == 8
    assert len(first_runs(dataclasses.replace(args, budget=None))) == 24
    assert taken == []
    assert not Path(args.output_dir).exists()
    with pytest.raises(InputError, match=r"call dualoptim\.sweep\.first_runs"):
        sweep(dataclasses.replace(args, dry_run=True))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (1, "--budget 1 is less than a run for each of the 2 methods; give that or more"),
        (24, "--budget 24 is enough for all of the 24 runs; drop it, or give less"),
        (99, "--budget 99 is enough for all of the 24 runs; drop it, or give less"),
    ],
)
def test_a_budget_that_makes_no_sense_is_one_line(args, budget, message):
    for call in (sweep, first_runs):
        with pytest.raises(InputError, match=message):
            call(dataclasses.replace(args, budget=budget))
    assert not Path(args.output_dir).exists()


def test_flags_that_a_budget_cannot_have_are_one_line():
    for line, message in (
        ("--budget 0", "--budget 0 is out of range"),
        ("--budget 3 --no-eval", "--budget 3 chooses by what runs keep, which --no-eval does not measure; drop one of them"),
        ("--vary budget 3 4", "--vary 'budget' is no flag that changes"),
    ):
        with pytest.raises(InputError, match=message):
            parse(SweepArgs, ["--output-dir", "x", *line.split()])


def test_a_search_on_a_model_ends_with_the_frontier_of_what_it_took(taught, tmp_path, capsys):
    args = SweepArgs(
        model=str(taught), data="demo", learning_rates=(1e-4, 4e-4), forget_lrs=(2e-4, 8e-4), seeds=(1, 2), max_steps=2,
        eval_rows=2, max_new_tokens=2, budget=6, output_dir=str(tmp_path / "sweep"),
    )  # fmt: skip
    assert len(sweep(args)) == 6
    assert len(list(csv.DictReader((tmp_path / "sweep" / "frontier.csv").open()))) == 6
    assert "dualoptim unlearn --config" in capsys.readouterr().out
