"""Tables of all results, of a sequence of tasks, and of a sweep's methods."""

import csv

from dualoptim.evaluation.summary import Summary
from dualoptim.reporting.results import (
    SEQUENCE_FILES,
    TaskResult,
    result_columns,
    scores_by_method,
    sequence,
    sequence_table,
    write_results,
    write_sequence,
    write_sweep,
)


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
    table = sequence_table(sequence([10, 2], [first, second, third]))
    assert table.head[:4] == ("after task", "task10 probability", "task2 probability", "all tasks probability")
    assert table.rows == [
        ("before", "0.987", "-", "-", "0.976", "0.654", "0.123"),
        ("10", "0.012", "-", "0.012", "0.965", "0.643", "0.901"),
        ("2", "0.077", "0.012", "0.044", "0.965", "0.643", "0.901"),
    ]
    write_sequence(tmp_path, [result(tmp_path, 10, first, second), result(tmp_path, 2, second, third)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(SEQUENCE_FILES)
    lines = list(csv.DictReader((tmp_path / "tasks.csv").open()))
    assert [line["task10_rouge_l_recall"] for line in lines] == ["0.987", "0.012", ""]


def test_means_are_over_seeds_after_the_last_task():
    common = {"losses": "ME+GD", "optim": "dual-adamw", "learning_rate": "1e-05", "forget_lr": "1e-05"}
    rows = [
        common
        | {"seed": seed, "task": task, "folder": f"x/{seed}/task{task}", "model_utility": utility, "forget_probability": 0.5}
        for seed, task, utility in ((1, 1, 0.9), (1, 2, 0.4), (2, 1, 0.9), (2, 2, 0.6))
    ]
    (scores,) = scores_by_method(rows).values()
    assert scores["model_utility"] == [0.4, 0.6]


def test_a_run_that_failed_stands_in_the_table_of_a_sweep_with_its_reason(tmp_path, lines_of):
    common = {"optim": "dual-adamw", "forget_lr": "1e-05", "losses": "ME+GD", "learning_rate": "1e-05"}
    scores = {"model_utility": 0.5, "untargeted_forget_efficacy": 0.75}
    write_sweep(
        tmp_path,
        [
            common | {"seed": 1, "task": 1, **scores, "folder": "x/1/task1"},
            common | {"seed": 2, "task": "-", "failed": "out of luck", "folder": "x/2"},
        ],
    )
    assert "| ME+GD dual-adamw lr 1e-05 forget 1e-05 | 1 | 0.500 | 0.750 | - | - |" in lines_of(
        (tmp_path / "methods.md").read_text()
    )
    assert "out of luck" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
