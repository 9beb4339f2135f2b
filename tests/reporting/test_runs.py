"""What a report finds in the folders of runs, and in which order."""

import math
import re

import pytest

from dualoptim import EvalArgs, InputError
from dualoptim.config.saved import to_dict, write_config
from dualoptim.report import describe
from dualoptim.reporting.runs import Training, find_outcomes


def test_tasks_are_told_in_the_order_in_which_they_were_unlearned(tmp_path, made, read_page, write_task, after):
    again = {**after, "sets": {**after["sets"], "forget_task10": {"probability": 0.077}}}
    for task, summary in ((2, again), (10, after)):
        write_task(tmp_path / "out" / "ME+GD_lr0.0005" / f"task{task}", after=summary, task_list=[10, 2])
    assert [outcome.task for outcome in find_outcomes(tmp_path / "out")] == [10, 2]
    markdown, html = made(tmp_path / "out")
    assert ["10", "0.012", "0.987", "0.012", "0.965", "0.643", "0.901"] in read_page(html).rows
    assert ["2", "0.077", "0.012", "0.044", "0.965", "0.643", "0.901"] in read_page(html).rows
    assert "report/ME+GD_lr0.0005-tasks.png" in markdown
    assert ["task 10, unlearned before", "probability of the true answer", "-", "0.077", "-", "stay forgotten"] in read_page(
        html
    ).rows


def test_a_task_folder_a_sweep_and_an_evaluation_are_runs(
    run, tmp_path, made, lines_of, read_page, write_task, write_json, after
):
    (alone,) = find_outcomes(run / "ME+GD_lr0.0005" / "task1")
    assert (alone.label, alone.task) == ("ME+GD_lr0.0005/task1", 1)
    for seed in (1, 2):
        write_task(tmp_path / "sweep" / f"a_seed{seed}" / "ME+GD_lr0.0005" / "task1", seed=seed)
    assert [s.label for s in find_outcomes(tmp_path / "sweep")] == [f"a_seed{n}/ME+GD_lr0.0005/task1" for n in (1, 2)]
    write_json(tmp_path / "evaluated" / "eval" / "summary.json", after)
    write_config(tmp_path / "evaluated" / "eval" / "config.yaml", {"model": "org/other"})
    markdown, html = made(tmp_path / "evaluated")
    assert ["model utility", "0.643", "0.621", "stay"] in read_page(html).rows
    assert ["score", "score", "retain-only", "should"] in read_page(html).rows
    assert "| model | org/other |" in lines_of(markdown)


def test_runs_of_a_sweep_are_in_the_order_of_their_rates_and_named_by_their_folders_alone(tmp_path, write_task):
    folders = [f"ME+GD_lr0.0005_flr{rate}_seed1" for rate in ("3e-05", "0.0002", "0.001")]
    for folder in folders:
        write_task(tmp_path / folder / "ME+GD_lr0.0005" / "task1")
    assert [outcome.label for outcome in find_outcomes(tmp_path)] == [f"{folder}/task1" for folder in folders]


@pytest.mark.parametrize("relearn", [(20,), ()])
def test_what_none_of_several_results_has_gets_no_column(relearn, tmp_path, write_task, write_json):
    """As of a run of one's own rows beside an evaluation that attacks it."""
    scores = {"sets": {"forget": {"probability": 0.1}, "retain": {"probability": 0.9}}, "precision": "float32"}
    write_task(tmp_path / "run" / "ME+GD_lr0.0005" / "task1", before=None, after=scores)
    write_json(tmp_path / "attack" / "eval" / "summary.json", scores)
    write_config(
        tmp_path / "attack" / "eval" / "config.yaml", to_dict(EvalArgs(model="org/base", data="demo", relearn=relearn))
    )
    outcomes = [one for name in ("run", "attack") for one in find_outcomes(tmp_path / name)]
    comparison = describe(outcomes, "both", 0).parts[0]
    (scores,), (settings,) = comparison.tables, comparison.parts[0].tables
    assert scores.head == ("", "result", "verdict", "forget probability", "retain probability")
    assert "optim" in settings.head
    assert ("relearn" in settings.head) == bool(relearn)
    for column in [*zip(*scores.rows, strict=True), *zip(*settings.rows, strict=True)]:
        assert any(cell.strip("-") for cell in column)


WHOLE = "environment: {git_commit: 0123abc, versions: {tokenizers: 0.21.1}}\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("log.jsonl", '{"step": 1}\n{"st', "log.jsonl:2: not JSON"),
        ("log.jsonl", "[1]\n", "log.jsonl:1: not a JSON object"),
        ("log.jsonl", '{"step": 1}\n', "log.jsonl: not a log of steps (KeyError('phase'))"),
        ("eval/summary.json", "", "summary.json: not JSON"),
        ("eval/summary.json", '{"sets": 1}', "summary.json: no summary of an evaluation"),
        ("eval/forget.jsonl", "{}}\n", "forget.jsonl:1: not JSON"),
        ("eval/forget.jsonl", "{}\n", "forget.jsonl:1 has no question; repeat that evaluation"),
        ("config.yaml", "a: [", "config.yaml is not whole"),
        ("log.jsonl", "[" * 100_000, "log.jsonl:1: not JSON (maximum recursion"),
        ("log.jsonl", f'{{"step": 1{"0" * 400}, "phase": "forget", "loss": 1, "grad_norm": 1, "seconds": 1}}', "not a log of"),
        ("log.jsonl", "\x00", "log.jsonl:1: not UTF-8 text"),
        ("eval/summary.json", "[" * 100_000, "summary.json: no summary of an evaluation (maximum recursion"),
        ("eval/summary.json", f'{{"model_utility": 1{"0" * 400}}}', "model_utility has more digits than a score can have"),
        ("config.yaml", "seed: 2025-13-40", "config.yaml is not whole"),
        ("config.yaml", "seed: " + "9" * 5000, "config.yaml is not whole"),
        ("config.yaml", "a: &a [x]\nb: *a", "config.yaml is not whole"),
        ("config.yaml", f"forget_losses: 5\n{WHOLE}", "config.yaml: forget_losses: 5 has the wrong type"),
        ("config.yaml", f"optim: [1]\n{WHOLE}", "config.yaml: optim: [1] has the wrong type"),
        ("config.yaml", "text", "config.yaml is not whole"),
    ],
)
def test_a_broken_file_is_named(file, text, message, run, made):
    (run / "ME+GD_lr0.0005" / "task1" / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        made(run)
    assert not (run / "report.md").exists()


def test_names_that_are_long_or_half_characters_are_shown(write_task, tmp_path, made, after):
    after = {**after, "retain_only": {**after["retain_only"], "from": "\ud83d"}}
    write_task(tmp_path / ("x" * 240) / "task1", after=after)
    write_task(tmp_path / ("y\n|<b>" * 30) / "task1", after=after)
    markdown, html = made(tmp_path)
    assert "\\ud83d" in html
    assert "<b>" not in html
    assert max(len(name) for name in re.findall(r"report/(.+?)\)", markdown)) < 130


def test_an_evaluation_without_texts_says_so(write_task, tmp_path, made, after):
    for part in ("eval_before", "eval"):
        path = write_task(tmp_path / part / "task1", after=after)
        (path / "eval" / "forget.jsonl").write_text('{"row": 1, "probability": 0.5}\n')
    markdown, html = made(tmp_path)
    assert "Texts were not kept" in html
    assert "no-texts" in markdown


def test_joint_steps_have_both_losses(log):
    curves = Training.of_records(log(joint=True)).losses
    assert curves["forget"] == [(step, 3.0 - step / 10) for step in range(1, 13)]
    assert curves["retain"] == [(step, 0.1 * step) for step in range(1, 13)]


def test_a_joint_run_with_nothing_to_retain_has_a_forget_loss():
    records = [{"step": n, "phase": "joint", "loss": 1.0 / n, "grad_norm": 1.0, "seconds": 0.5} for n in (1, 2)]
    training = Training.of_records(records)
    assert training == Training(2, 1.0, {"forget": [(1, 1.0), (2, 0.5)]}, {"joint": [(1, 1.0), (2, 1.0)]})


def test_values_that_no_axis_has_are_left_out():
    step = {"phase": "forget", "seconds": 0.5}
    records = [step | {"step": 1, "loss": math.nan, "grad_norm": 0.0}, step | {"step": 2, "loss": 1.0, "grad_norm": math.inf}]
    assert Training.of_records(records) == Training(2, 1.0, {"forget": [(2, 1.0)]}, {})


def test_a_run_that_has_taken_no_step_yet_is_one_without_steps(write_task, tmp_path):
    (write_task(tmp_path / "task1", None, None) / "log.jsonl").write_text("")
    (outcome,) = find_outcomes(tmp_path)
    assert outcome.training == Training(0, 0, {}, {})


def test_a_flag_that_an_older_run_did_not_have_counts_as_its_default(write_task, tmp_path):
    write_task(tmp_path / "task1")
    (outcome,) = find_outcomes(tmp_path)
    assert outcome.setting("weight_decay") == 0.0
    assert outcome.setting("batch_size") == 4
