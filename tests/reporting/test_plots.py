"""Figures: what they draw, and that the same figure gives the same bytes."""

from matplotlib.figure import Figure

from dualoptim.reporting import plots


def test_each_loss_has_an_axis_of_its_own():
    figure = Figure()
    plots.losses({"forget": [(1, 2.0), (7, 1.5)], "retain": [(2, 0.1)]})(figure)
    curves = {axes.get_title(loc="center"): axes.lines[0].get_xydata().tolist() for axes in figure.axes}
    assert curves == {"forget loss": [[1, 2.0], [7, 1.5]], "retain loss": [[2, 0.1]]}


def test_the_same_figure_gives_the_same_bytes():
    draw = plots.tasks(["before", "after 1"], {"task 1": [0.9, 0.1], "retain set": [0.9, None]})
    assert plots.render(draw) == plots.render(draw)


def test_results_that_lie_together_share_a_number():
    figure = Figure()
    ends = [(0.5, 0.5), (0.5, 0.501), (0.9, 0.5)]
    plots.utility([{"before": (0.1, 0.6), "after": end} for end in ends])(figure)
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text()] == ["1, 2", "3"]


def test_a_method_without_scores_is_not_drawn():
    figure = Figure()
    scores = {"untargeted_forget_efficacy": [0.5, 0.7], "model_utility": [0.4, 0.6]}
    plots.methods({"failed": {name: [] for name in scores}, "ME+GD": scores})(figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ME+GD"]
