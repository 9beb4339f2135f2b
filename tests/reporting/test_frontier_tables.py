"""The frontier as a table, as data and as a plot."""

import csv
import html
import json
import shlex

from matplotlib.figure import Figure
from support import result_line as line

from dualoptim.evaluation.summary import RetainOnly, Summary
from dualoptim.reporting import plots
from dualoptim.reporting.frontier import methods_of
from dualoptim.reporting.frontier_tables import (
    FRONTIER_FILES,
    TITLE,
    frontier_section,
    kept_tables,
    range_table,
    write_frontier,
)
from dualoptim.reporting.ours import check_ours
from dualoptim.reporting.page import to_html
from dualoptim.reporting.results import write_results

LINES = [
    line(0.5, 0.99), line(0.005, 0.9, 4e-4), line(0.5, 0.97, seed="2"), line(0.005, 0.8, 4e-4, seed="2"),
    line(0.5, 0.9, optim="adamw"), line(0.05, 0.3, 4e-4, optim="adamw"),
]  # fmt: skip


def test_the_table_has_values_at_levels_and_says_where_no_run_has_come(lines_of):
    table = kept_tables(methods_of(LINES))[0]
    assert table.head == ("retain rows that no step trained on", "at 0.1", "at 0.03", "at 0.01", "at 0.003")
    assert table.rows == [
        ("before unlearning", "1.000", "1.000", "1.000", "1.000"),
        ("dual-adamw", "0.935 ± 0.034", "0.901 ± 0.049", "0.870 ± 0.062", "not reached"),
        ("adamw", "0.481", "not reached", "not reached", "not reached"),
    ]  # fmt: skip
    ranges = lines_of(range_table(methods_of(LINES)).markdown())
    assert ranges[0] == "| method | runs | area | window to 0.1 | collapsed |"
    assert ranges[3].endswith("| 0.00 octaves | 1 of 2 |")


def test_what_no_run_was_mild_enough_for_is_marked_as_a_bound():
    lines = [
        line(0.3, 0.99),
        line(0.002, 0.98, 4e-4),
        line(0.0011, 0.97, optim="adamw"),
        line(0.0004, 0.96, 4e-4, optim="adamw"),
    ]
    methods, section = methods_of(lines), frontier_section(lines)
    assert kept_tables(methods)[0].rows[2] == ("adamw", *["≥ 0.970"] * 4)
    assert kept_tables(methods)[0].rows[1][1:] == ("0.988", "0.985", "0.983", "0.981")
    assert [row[2:4] for row in range_table(methods).rows] == [("0.984", "≥ 1.56 octaves"), ("≥ 0.970", "≥ 2.00 octaves")]
    assert any(note.startswith("≥ is a bound") for note in section.points)
    assert any(note.startswith("One seed") for note in section.points)
    assert not any(note.startswith(("≥", "One seed")) for note in frontier_section(LINES).points)


def test_each_best_setting_is_repeated_into_a_folder_of_its_own_by_a_line_that_can_be_copied(tmp_path):
    commands = frontier_section(LINES).commands
    assert [shlex.split(command)[-2:] for command in commands] == [
        ["--output-dir", "runs/again-dual-adamw"], ["--output-dir", "runs/again-adamw"],
    ]  # fmt: skip
    write_frontier(tmp_path, LINES)
    assert f"\n    {commands[0]}\n    {commands[1]}\n" in (tmp_path / "frontier.md").read_text()
    assert f"<pre>{html.escape(commands[0], quote=False)}" in html.unescape(to_html(frontier_section(LINES)))


def test_a_sweep_writes_a_table_data_and_a_plot_that_are_known_as_ours(tmp_path):
    assert not write_frontier(tmp_path, LINES[:1])
    assert not list(tmp_path.iterdir())
    write_frontier(tmp_path, LINES)
    assert {path.name for path in tmp_path.iterdir()} == set(FRONTIER_FILES)
    check_ours(tmp_path / name for name in FRONTIER_FILES)
    text = (tmp_path / "frontier.md").read_text()
    assert text.index("Collapsed: less than") < text.index("at 0.03 |"), "what explains the tables stands before them"
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert [(row["method"], row["forget"], row["unseen"], row["on_curve"]) for row in rows[:2]] == [
        ("ME+GD dual-adamw", "0.5", "0.99", "True"), ("ME+GD dual-adamw", "0.005", "0.9", "True"),
    ]  # fmt: skip
    assert len(rows) == 6
    write_frontier(tmp_path, LINES[:1])
    assert not list(tmp_path.iterdir()), "what the sweep was before is gone"


def test_the_plot_has_a_curve_for_each_method_and_forgetting_grows_to_the_right():
    (plot,) = frontier_section(LINES).plots
    drawn = []
    plots.render(lambda figure: (plot.draw(figure), drawn.append(figure)))
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["dual-adamw", "adamw", "before"]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert not frontier_section(LINES[:1])


def test_both_axes_of_the_plot_hold_every_run_and_say_where_they_begin(tmp_path):
    alone = RetainOnly(sets={"forget": {"probability": 0.02}, "retain": {"probability": 0.8}})
    lines = [
        line(0.3, 0.99),
        line(0.002, 0.98, 4e-4),
        line(0.0011, 0.97, optim="adamw"),
        line(0.0004, 0.96, 4e-4, optim="adamw"),
    ]
    lines[0]["folder"] = str(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(Summary(retain_only=alone)))
    axes = axes_of(lines)
    assert drawn_inside(axes) == {0.3, 0.002, 0.0011, 0.0004, 0.02}
    assert axes.get_title().endswith("axis from 0.75"), "the retain-only model keeps least"
    assert "retain-only model" in [one.get_label() for one in axes.lines]
    axes = axes_of([line(0.3, 0.4), line(1e-9, 0.3, 4e-4)])
    assert drawn_inside(axes) == {0.3, 1e-5}
    assert "at the edge 1e-05 or less" in axes.get_xlabel()
    assert axes.get_ylim()[0] == 0


def axes_of(lines):
    figure = Figure()
    frontier_section(lines).plots[0].draw(figure)
    return figure.axes[0]


def drawn_inside(axes):
    """Where the marked runs of a plot lie, as far as its axes show them."""
    (right, left), (low, high) = sorted(axes.get_xlim()), axes.get_ylim()
    points = [
        tuple(point)
        for one in axes.lines
        if one.get_marker() != "None" and one.get_markevery() != []
        for point in one.get_xydata()
    ]
    return {round(x, 9) for x, y in points if right <= x <= left and low <= y <= high}


def test_a_report_of_a_sweep_begins_with_its_frontier(run, made):
    write_results(run, LINES)
    report, page = made(run)
    assert report.index(f"## {TITLE}") < report.index("at 0.1")
    assert "report/frontier.png" in report
    assert (run / "report" / "frontier.png").is_file()
    assert TITLE in page
