"""The table of a sweep's methods, or of a run's splits: means and deviations."""

from dualoptim.reporting.console import shown
from dualoptim.reporting.methods import brief_methods, scores_by_method, write_methods, write_sweep
from dualoptim.reporting.tables import Table


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


def test_independent_tasks_all_count_and_what_varies_makes_a_method(tmp_path, lines_of):
    lines = [
        {"losses": "ME+GD", "learning_rate": "1e-05", "split": split, "tasks_independent": "True", "task": task}
        | {"folder": f"x/{split}/task{task}", "model_utility": utility}
        for split, task, utility in (("forget01", 1, 0.9), ("forget01", 2, 0.4), ("forget05", 1, 0.9), ("forget05", 2, 0.6))
    ]
    assert {method: scores["model_utility"] for method, scores in scores_by_method(lines).items()} == {
        "ME+GD lr 1e-05 split forget01": [0.9, 0.4],
        "ME+GD lr 1e-05 split forget05": [0.9, 0.6],
    }
    write_methods(tmp_path, lines)
    table = lines_of((tmp_path / "methods.md").read_text())
    assert table[2] == "| ME+GD lr 1e-05 split forget01 | 2 | 0.650 ± 0.354 | - | - | - |"


def test_tasks_one_after_another_beside_independent_ones_are_a_method_of_their_own():
    lines = [
        {"losses": "ME+GD", "learning_rate": "1e-05", "tasks_independent": alone, "task": task}
        | {"folder": f"x/{alone}/task{task}", "model_utility": utility}
        for alone, task, utility in (("True", 1, 0.9), ("True", 2, 0.4), ("False", 1, 0.8), ("False", 2, 0.6))
    ]
    assert {method: scores["model_utility"] for method, scores in scores_by_method(lines).items()} == {
        "ME+GD lr 1e-05 tasks_independent True": [0.9, 0.4],
        "ME+GD lr 1e-05 tasks_independent False": [0.6],
    }


def test_a_terminal_of_80_columns_gets_a_line_a_method_by_what_differs_and_no_word_is_cut(monkeypatch):
    common = {"losses": "ME+GD", "learning_rate": "0.0005", "seed": 1, "task": 1, "verdict": "not forgotten, kept"}
    scores = dict.fromkeys(("model_utility", "untargeted_forget_efficacy", "retain_probability", "forget_probability"), 0.5)
    scores["retain_unseen_probability"] = 0.25
    lines = [
        common | scores | {"optim": optim, "forget_lr": rate, "folder": f"x/{optim}{rate}/task1"}
        for optim in ("dual-adamw", "adamw-alternate")
        for rate in ("0.0002", "0.0005")
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    table, says = brief_methods(lines)
    assert says.endswith("; all methods: ME+GD, lr 0.0005.")
    text = shown(table)
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    assert words[:2] == ["model", "forget"]
    assert {"method", "utility", "efficacy", "adamw-alternate", "0.0002", "forgotten,"} <= set(words)
    assert "runs" not in words, "each has one"
    # where even words do not fit, each method is a list
    monkeypatch.setenv("COLUMNS", "40")
    lines = shown(table).splitlines()
    assert lines[0] == "dual-adamw forget 0.0002"
    assert [line.split() for line in lines[1:3]] == [["model", "utility", "0.500"], ["forget", "efficacy", "0.500"]]
    assert "aaaa" in shown(Table(("before", "after"), [("a b", "a" * 200)], left=2)).splitlines()[-1], "side by side as before"
