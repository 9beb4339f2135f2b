"""Tables of all results, and of tasks."""

import csv
from dataclasses import replace

import pytest

from dualoptim import UnlearnArgs
from dualoptim.evaluation.summary import Summary, Verdict
from dualoptim.evaluation.verdict import judge
from dualoptim.reporting import frontier, tables
from dualoptim.reporting.console import shown
from dualoptim.reporting.methods import brief_methods, write_methods
from dualoptim.reporting.results import (
    SEQUENCE_FILES,
    TaskResult,
    result_columns,
    titles,
    write_results,
    write_tasks,
)
from dualoptim.reporting.sequence import sequence, sequence_table, write_sequence
from dualoptim.told import tell


def result(folder, task, before, after):
    return TaskResult("ME+GD", 1e-5, task, folder / f"task{task}", folder / "model", [], before, after)


def test_a_line_of_results_has_every_score_after_and_before(before, after, tmp_path):
    line = result_columns(result(tmp_path, 1, Summary.from_json(before), Summary.from_json(after)))
    assert list(line)[:5] == ["losses", "learning_rate", "task", "model_utility", "untargeted_forget_efficacy"]
    assert (line["learning_rate"], line["forget_probability"], line["before_forget_probability"]) == ("1e-05", 0.012, 0.987)
    assert list(line)[-1] == "folder"
    assert list(result_columns(result(tmp_path, 1, None, None))) == ["losses", "learning_rate", "task", "folder"]


def test_lines_of_earlier_runs_stay_and_a_repeated_one_is_replaced(after, tmp_path, lines_of):
    def write(task, **changes):
        write_results(tmp_path, [result_columns(result(tmp_path, task, None, Summary.from_json({**after, **changes})))])

    write(0)
    write(1)
    write(1, model_utility=0.5)
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(line["task"], line["model_utility"]) for line in table] == [("0", "0.643"), ("1", "0.5")]
    lines = lines_of((tmp_path / "results.md").read_text())
    assert lines[0].startswith("| losses | learning rate | task | forget probability |")
    assert "| ME+GD | 1e-05 | 0 | 0.012 | 0.012 | 0.965 | 0.965 | 0.643 | 0.901 |" in lines


def test_a_sequence_measures_every_task_after_each(before, after, tmp_path):
    again = {**after, "sets": {**after["sets"], "forget_task10": {"probability": 0.077}}}
    first, second, third = map(Summary.from_json, (before, after, again))
    table = sequence_table(sequence([10, 2], [first, second], [second, third]))
    assert table.head[:4] == ("after task", "task10 probability", "task2 probability", "all tasks probability")
    assert table.rows == [
        ("before", "0.987", "-", "-", "0.976", "0.654", "0.123"),
        ("10", "0.012", "0.012", "0.012", "0.965", "0.643", "0.901"),  # just before its turn
        ("2", "0.077", "0.012", "0.044", "0.965", "0.643", "0.901"),
    ]
    write_sequence(tmp_path, [result(tmp_path, 10, first, second), result(tmp_path, 2, second, third)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SEQUENCE_FILES)
    lines = list(csv.DictReader((tmp_path / "tasks.csv").open()))
    assert [line["task10_rouge_l_recall"] for line in lines] == ["0.987", "0.012", ""]


def test_a_verdict_stands_in_every_table_and_is_counted_where_rows_are_averaged(before, after, tmp_path, lines_of):
    first, gone = Summary.from_json(before), Summary.from_json(after)
    verdicts = [Verdict("yes", kept, "fixed levels", {}, [], []) for kept in ("yes", "no")]
    done = [result(tmp_path, task, first, replace(gone, verdict=one)) for task, one in enumerate(verdicts, 1)]
    lines = [result_columns(one) | {"tasks_independent": "True"} for one in done]
    write_results(tmp_path, lines[:1])
    write_results(tmp_path, lines[1:])
    assert [line[-3:] for line in map(cells, lines_of((tmp_path / "results.md").read_text())[2:])] == [
        ["0.643", "0.901", "forgotten, kept"],
        ["0.643", "0.901", "forgotten, not kept"],
    ]
    write_methods(tmp_path, lines)
    assert cells(lines_of((tmp_path / "methods.md").read_text())[2])[-1] == "1 forgotten, kept; 1 forgotten, not kept"
    write_methods(tmp_path, lines[:1])
    assert cells(lines_of((tmp_path / "methods.md").read_text())[2])[-1] == "forgotten, kept"
    write_tasks(tmp_path, done)
    table = [cells(line) for line in lines_of((tmp_path / "tasks.md").read_text())]
    assert [line[:2] for line in table[2:]] == [
        ["before", "0.987"], ["1", "0.012"], ["2", "0.012"], ["mean", "0.012"], ["deviation", "0.000"]
    ]  # fmt: skip
    assert [line[-1] for line in table[2:]] == [
        "-", "forgotten, kept", "forgotten, not kept", "1 forgotten, kept; 1 forgotten, not kept", "-"
    ]  # fmt: skip
    table = sequence_table(sequence([1, 2], [first] * 2, [one.after for one in done]))
    assert [row[-1] for row in table.rows] == ["-", "forgotten, kept", "forgotten, not kept"]


@pytest.mark.parametrize("independent", [True, False])
def test_the_last_of_several_tasks_shows_all_of_them_in_a_terminal(before, after, tmp_path, monkeypatch, capsys, independent):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    done = [result(tmp_path / "pair", task, Summary.from_json(before), Summary.from_json(after)) for task in (10, 2)]
    (tmp_path / "pair").mkdir()
    args = UnlearnArgs(task_list=(10, 2), tasks_independent=independent, output_dir=str(tmp_path), texts=False)
    tell(args, done[:1])
    assert "all tasks:" not in capsys.readouterr().out
    tell(args, done)
    table, named = capsys.readouterr().out.rpartition("model: ")[2].partition("\n")[2].split("all tasks: ")
    assert named.strip() == str(tmp_path / "pair" / "tasks.md")
    assert "0.012" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("first", ["task", "after task"])
def test_a_number_that_heads_a_row_in_a_narrow_terminal_says_what_it_counts(monkeypatch, first):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    table = tables.Table((first, "retain probability", "verdict"), [("before", "0.9", "-"), ("10", "0.8", "kept")])
    heads = [line for line in shown(table).splitlines() if not line.startswith(" ")]
    assert heads == ["before", f"{first} 10"]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_that_no_step_trained_on_have_one_name_in_every_table_and_in_the_verdict():
    name = tables.set_title("retain_unseen")
    assert name == "retain rows that no step trained on"
    assert titles(["retain_unseen_probability", "model_utility"]) == (f"probability of {name}", "model utility")
    assert frontier.KEPT["unseen"] == name
    _, says = brief_methods(
        [{"losses": "ME+GD", "task": "-", "folder": "x", "retain_unseen_probability": 0.5, "learning_rate": "1e-5"}]
    )
    assert f"unseen ({name})" in says
    known, now = (Summary(sets={"retain_seen": {"probability": p}, "retain_unseen": {"probability": p}}) for p in (0.9, 0.5))
    assert any(f"{name}: probability of the true answer 0.900 → 0.500" in one for one in judge(known, now).says)
