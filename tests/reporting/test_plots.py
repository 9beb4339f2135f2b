"""Figures: what they draw, and that the same figure gives the same bytes."""

import matplotlib
from matplotlib.figure import Figure

from dualoptim.reporting import plots
from dualoptim.reporting.sequence import Standing, sequence_plot


def test_each_loss_has_an_axis_of_its_own():
    figure = Figure()
    plots.losses({"forget": [(1, 2.0), (7, 1.5)], "retain": [(2, 0.1)]})(figure)
    curves = {axes.get_title(loc="center"): axes.lines[0].get_xydata().tolist() for axes in figure.axes}
    assert curves == {"forget loss": [[1, 2.0], [7, 1.5]], "retain loss": [[2, 0.1]]}


def test_the_same_figure_gives_the_same_bytes():
    draw = plots.tasks(["before", "after"], {"task 1": [0.9, 0.1], "retain set": [0.9, None]})
    assert plots.render(draw) == plots.render(draw)


def test_many_steps_have_few_ticks_and_what_was_not_measured_no_curve():
    figure = Figure()
    plots.tasks(
        [str(step) for step in range(40)], {"task 1": [0.5] * 40, "retain set": [0.9, None] * 20, "utility": [None] * 40}
    )(figure)
    (axes,) = figure.axes
    assert len(axes.get_xticks()) <= 12
    assert [tick.get_text() for tick in axes.get_xticklabels()][:2] == ["0", "4"]
    assert [line.get_label() for line in axes.lines] == ["task 1", "retain set"]


def test_utility_is_no_probability_and_one_task_is_before_and_after():
    def drawn(tasks, utility):
        figure, scores = Figure(), {task: {"probability": 0.5} for task in tasks}
        standings = [Standing(after, scores, None, 0.9, utility, None) for after in ("before", *tasks)]
        sequence_plot(standings)(figure)
        (axes,) = figure.axes
        names = [line.get_label() for line in axes.lines]
        return axes.get_title(loc="left") or axes.get_title(), axes.get_xlabel(), names

    whole = "probability of the true answer and model utility"
    assert drawn([3], 0.7) == (whole, "", ["forget set", "retain set", "model utility"])
    assert drawn([3], None) == ("probability of the true answer", "", ["forget set", "retain set"])
    assert drawn([1, 2], 0.7) == (whole, "after task", ["task 1", "task 2", "retain set", "model utility"])


def test_results_that_lie_together_share_a_number():
    figure = Figure()
    ends = [(0.5, 0.5), (0.5, 0.501), (0.9, 0.5)]
    plots.utility([{"before": (0.1, 0.6), "after": end} for end in ends])(figure)
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["1, 2", "3"]


def test_an_axis_starts_at_zero_or_says_where_it_starts():
    figure = Figure()
    plots.losses({"forget": [(1, -3.0), (2, -2.0)], "retain": [(1, 0.7), (2, 0.6)]})(figure)
    forget, retain = figure.axes
    assert forget.get_title().startswith("forget loss (axis from -3")
    assert retain.get_ylim()[0] == 0
    figure = Figure()
    plots.utility([{"after": (0.5, 0.5)}, {"after": (0.6, 0.5)}])(figure)
    assert ", axis from 0.4" in figure.axes[0].get_xlabel()
    assert "\naxis from 0.4" in figure.axes[0].get_ylabel()


def test_the_names_of_the_axes_lie_within_the_figure_and_outside_the_legend():
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    with matplotlib.rc_context(plots._style()):
        plots.utility([{"before": (0.2, 0.68), "after": (x, 0.7)} for x in (0.6, 0.9)])(figure)
        figure.draw_without_rendering()
    label, legend = figure.axes[0].yaxis.label.get_window_extent(), figure.legends[0].get_window_extent()
    assert label.y0 >= 0
    assert label.y1 <= figure.bbox.y1
    assert not label.overlaps(legend)
