"""Methods at equal forgetting, on curves whose answer is known."""

import math

import pytest
from support import result_line as line

from dualoptim.reporting.frontier import (
    area,
    chief_kind,
    envelope,
    has_frontier,
    kept_at,
    mean_curve,
    methods_of,
    reached,
)


def test_what_is_linear_in_the_logarithm_is_interpolated_exactly_and_nothing_is_said_beyond():
    front = envelope((p, 1 + 0.1 * math.log10(p)) for p in (0.5, 0.05, 0.005))
    for level in (0.3, 0.1, 0.02, 0.006):
        assert kept_at(front, level) == pytest.approx(1 + 0.1 * math.log10(level), abs=1e-12)
    assert kept_at(front, 0.005) == pytest.approx(1 + 0.1 * math.log10(0.005))
    assert kept_at(front, 0.0049) is None
    assert kept_at(front, 0.9) == front[-1][1], "what forgets more has kept at least that"
    assert kept_at([], 0.1) is None


def test_a_run_that_forgets_no_more_and_keeps_no_more_than_another_is_not_on_the_curve():
    points = [(0.1, 0.9), (0.01, 0.5), (0.02, 0.4), (0.2, 0.9), (0.3, 0.95), (0.01, 0.3)]
    front = envelope(points)
    assert front == [(0.01, 0.5), (0.1, 0.9), (0.3, 0.95)]
    values = [kept_at(front, level) for level in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 1.0)]
    assert values == sorted(values)


def test_an_area_is_the_mean_over_the_logarithm_and_counts_nothing_where_no_run_comes():
    assert area([(0.01, 0.6), (0.1, 0.8)], 0.01, 0.1) == pytest.approx(0.7)
    assert area([(0.001, 0.5)], 0.01, 0.1) == pytest.approx(0.5)
    assert area([(math.sqrt(0.001), 0.8)], 0.01, 0.1) == pytest.approx(0.4)  # half of the way
    assert area([(0.1, 0.8)], 0.01, 0.1) == area([], 0.01, 0.1) == 0


def test_a_mean_curve_goes_as_far_as_every_seed():
    curve = mean_curve([[(0.01, 0.5), (0.1, 0.7)], [(0.001, 0.3), (0.1, 0.9)]])
    assert (curve[0][0], curve[-1][0]) == (0.01, pytest.approx(0.1))
    assert curve[0][1:] == (pytest.approx(0.55), pytest.approx(0.5), pytest.approx(0.6))
    assert mean_curve([]) == []


def test_runs_are_sorted_by_method_and_rates_ratios_and_seeds_make_none():
    lines = [
        line(0.1, 0.9), line(0.01, 0.8, 2e-4), line(0.02, 0.7, seed="2", forget_lr="0.0003"), line(0.1, 0.5, retain_freq="3"),
        line(0.1, 0.4, optim="adamw"), line(0.1, 0.4, optim="adamw", forget_coeff="0.1"),
    ]  # fmt: skip
    methods = methods_of(lines)
    assert [(m.name, len(m.runs)) for m in methods] == [
        ("ME+GD dual-adamw", 4), ("ME+GD adamw", 1), ("ME+GD adamw forget_coeff 0.1", 1),
    ]  # fmt: skip
    first = methods[0]
    assert first.runs[2].ratio == pytest.approx(3)
    assert first.at("unseen", 0.05) == [pytest.approx(0.8 + 0.1 * math.log(5) / math.log(10)), 0.7]
    assert first.at("unseen", 0.015) == [pytest.approx(0.8 + 0.1 * math.log(1.5) / math.log(10))], "the other seed did not come"
    assert first.at("unseen", 0.001) == []
    assert [first.goes_beyond("unseen", level) for level in (0.015, 0.05, 0.1)] == [False, True, True], (
        "the second seed has .02 alone"
    )
    assert has_frontier(methods)
    assert not has_frontier(methods_of([line(0.1, 0.9), line(0.1, 0.9, seed="2"), line(0.1, 0.9, optim="adamw")]))


def test_a_sequence_counts_once_with_the_mean_of_its_tasks_and_from_before_its_first():
    own = {"losses": "ME+GD", "optim": "adamw", "learning_rate": "1e-05", "forget_lr": "1e-05", "seed": 1}
    lines = [
        own | {"task": 1, "folder": "x/1/task1", "forget_probability": 0.5, "before_retain_probability": 0.9},
        own | {"task": 2, "folder": "x/1/task2", "forget_probability": 0.2, "forget_task1_probability": 0.4}
        | {"retain_probability": 0.3, "before_retain_probability": 0.4},
    ]  # fmt: skip
    ((run,),) = [method.runs for method in methods_of(lines)]
    assert run.forget == pytest.approx(0.3)
    assert run.left("seen") == pytest.approx(1 / 3)
    alone = [{**one, "tasks_independent": "True"} for one in lines]
    assert [run.seed for run in methods_of(alone)[0].runs] == ["1 1", "1 2"]


def test_runs_that_collapse_or_diverge_are_counted_and_those_that_fail_otherwise_are_not():
    failed = {"losses": "ME+GD", "optim": "dual-adamw", "learning_rate": "1", "forget_lr": "1", "seed": "1", "task": "-"}
    lines = [line(0.1, 0.9), line(0.01, 0.49, 2e-4), line(0.001, 0.51, 4e-4)]
    lines += [failed | {"failed": "NonFiniteError: step 3", "folder": "x/a"}, failed | {"failed": "OSError", "folder": "x/b"}]
    (method,) = methods_of(lines)
    assert (len(method.runs), method.failed, method.collapsed("unseen")) == (3, 2, (2, 4))
    assert reached([method], "unseen") == 0.003
    assert reached(methods_of(lines[:2]), "unseen") == 0.1, "to lower levels it collapses"


def test_a_window_is_measured_in_octaves_of_rate_between_the_runs():
    """The forget probability falls by a factor of 2 an octave, what is kept by .02: .95 is left until 5.7."""
    rates = (1, 4, 16, 64)
    lines = [line(0.8 / rate, 1 - 0.02 * math.log2(rate), rate * 1e-5) for rate in rates]
    (method,) = methods_of(lines)
    assert method.windows("unseen", 0.1) == [
        (pytest.approx(0), False)
    ]  # 2.5 octaves from the first at which .95 is left, and 3 to .1
    assert method.windows("unseen", 0.4) == [(pytest.approx(1.5), False)]
    assert methods_of(lines[:2])[0].windows("unseen", 0.4) == [(pytest.approx(1), True)], (
        "it ends with the rates that were tried"
    )
    assert methods_of(lines[:1])[0].windows("unseen", 0.1) == []
    # with one rate of retain steps, the rate of forget steps moves
    fixed = [line(0.8 / rate, 1 - 0.02 * math.log2(rate), 1e-5, forget_lr=f"{rate * 1e-5:g}") for rate in rates]
    assert methods_of(fixed)[0].windows("unseen", 0.4) == [(pytest.approx(1.5), False)]


def test_settings_are_ranked_by_what_they_keep_if_they_forget_and_by_how_much_they_forget_if_not():
    lines = [
        line(0.05, 0.9, 1e-4), line(0.05, 0.9, 1e-4, seed="2"), line(0.009, 0.7, 2e-4), line(0.009, 0.7, 2e-4, seed="2"),
        line(0.008, 0.8, 4e-4), line(0.007, 0.7, 4e-4, seed="2"), line(0.009, 0.99, 8e-4),
    ]  # fmt: skip
    (method,) = methods_of(lines)

    def rates(level):
        return [runs[0].rate for runs in method.ranked("unseen", level)]

    assert [run.seed for run in method.ranked("unseen", 0.01)[0]] == ["1", "2"]
    assert rates(0.01) == [4e-4, 2e-4, 1e-4, 8e-4], "of one seed less is known than of two"
    assert rates(0.1) == [1e-4, 4e-4, 2e-4, 8e-4]
    assert rates(0.001) == [4e-4, 2e-4, 1e-4, 8e-4]
    often = [line(0.01, 0.5, retain_freq="1"), line(0.01, 0.9, retain_freq="5")]
    assert [len(runs) for runs in methods_of(often)[0].ranked("unseen", 0.1)] == [1, 1], "two settings at one rate"


def test_where_some_runs_know_of_no_unseen_rows_methods_are_compared_by_the_others():
    with_all = methods_of([line(0.1, 0.9), line(0.01, 0.8, 2e-4)])
    assert chief_kind(with_all) == "unseen"
    assert with_all[0].runs[0].kept == {"unseen": 0.9, "seen": 0.95}
    assert chief_kind(methods_of([line(0.1, 0.9), line(0.01, "", 2e-4)])) == "seen"
    several = line(0.1, 0.9, real_authors_rouge_l_recall=0.5, world_facts_rouge_l_recall=0.7, retain_seen_probability=0.97)
    assert methods_of([several])[0].runs[0].kept == {"unseen": 0.9, "seen": 0.97, "general": pytest.approx(0.6)}


def test_a_run_that_has_kept_nothing_at_all_has_collapsed():
    methods = methods_of([line(0.002, 0.0), line(0.08, 0.9, 2e-4)])
    assert reached(methods, chief_kind(methods)) == 0.1
