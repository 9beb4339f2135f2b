"""Several splits in one call: unlearned each from the first model, evaluated, swept over, with a table over splits."""

import csv
import json
from dataclasses import replace

import pytest
from support import arguments, check_same

from dualoptim import EvalArgs, InputError, SweepArgs, run, sweep, unlearn
from dualoptim.data import demo
from dualoptim.evaluate import evaluate, evaluate_splits
from dualoptim.report import ReportArgs, report

SMALL = {"eval_rows": 2, "max_new_tokens": 3, "threads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's rows as two splits in the layout of the published folder."""
    folder, splits = tmp_path_factory.mktemp("data"), demo.splits()
    short = [row for row in splits["forget05"] if row["task_id"] in ("1", "2")]
    files = {"forget01": short, "retain90": splits["retain50"][:20], "retain50": splits["retain50"]}
    files |= {name: splits[name] for name in ("forget05", "retain_perturbed")}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def splits_of(taught, data, folder, **changes):
    args = arguments(taught, folder, "dual-adamw", split=("forget01", "forget05"), task_list=(1, 2), max_steps=3)
    return replace(args, **{"data": str(data), "forget_losses": ("NPO+KL",), "eval": True, **SMALL, **changes})


def test_every_split_is_to_the_bit_a_run_of_its_own_and_has_a_line_in_the_table(taught, data, tmp_path, capsys):
    run(splits_of(taught, data, tmp_path / "both", tasks_independent=True))
    printed = capsys.readouterr().out
    run(splits_of(taught, data, tmp_path / "one", split="forget05", task_list=(2,)))
    check_same(tmp_path / "both" / "NPO+KL_lr0.001_forget05" / "task2", tmp_path / "one" / "NPO+KL_lr0.001" / "task2")

    lines = list(csv.DictReader((tmp_path / "both" / "results.csv").open()))
    assert [(line["split"], line["task"]) for line in lines] == [
        ("forget01", "1"), ("forget01", "2"), ("forget05", "1"), ("forget05", "2"),
    ]  # fmt: skip
    table = (tmp_path / "both" / "methods.md").read_text()
    assert table in printed
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "NPO+KL lr 0.001 split forget01", "NPO+KL lr 0.001 split forget05",
    ]  # fmt: skip
    assert table.count("±") == 2 * 4
    assert not (tmp_path / "one" / "methods.md").exists()
    report(ReportArgs(runs=(str(tmp_path / "both"),)))
    assert "forget05, tasks side by side" in (tmp_path / "both" / "report.md").read_text()


def test_a_run_over_splits_that_stopped_goes_on(taught, data, tmp_path, monkeypatch):
    args, train = splits_of(taught, data, tmp_path, eval=False, eval_rows=0, max_new_tokens=128), unlearn._train
    trained = []

    def stops(job, *rest):
        trained.append((*job.args.split, *rest[-1][-1].folder.parts[-1:]))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(job, *rest)

    monkeypatch.setattr(unlearn, "_train", stops)
    with pytest.raises(KeyboardInterrupt):
        run(args)
    run(replace(args, resume="newest"))
    tasks = [("forget01", "task1"), ("forget01", "task2"), ("forget05", "task1"), ("forget05", "task2")]
    assert trained == [*tasks, tasks[-1]]


def test_an_evaluation_by_several_splits_has_a_table_and_goes_on(taught, data, tmp_path, monkeypatch, capsys):
    args = EvalArgs(
        model=str(taught), data=str(data), split=("forget01", "forget05"), output_dir=str(tmp_path / "eval"), **SMALL
    )
    with pytest.raises(InputError, match="several --split are several evaluations"):
        evaluate(args)
    found = evaluate_splits(args)
    alone = evaluate(replace(args, split=("forget05",), output_dir=str(tmp_path / "alone")))
    assert found["forget05"] == alone
    table = (tmp_path / "eval" / "splits.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["forget01", "forget05"]
    report(ReportArgs(runs=(str(tmp_path / "eval"),)))
    assert "eval/forget05" in (tmp_path / "eval" / "report.md").read_text()

    # what is finished is kept; with other settings it is refused, and stays
    (tmp_path / "eval" / "forget05" / "eval" / "summary.json").unlink()
    assert evaluate_splits(args)["forget05"] == alone
    with pytest.raises(InputError, match="is an earlier result"):
        evaluate_splits(replace(args, eval_rows=3))
    assert (tmp_path / "eval" / "forget01" / "eval" / "summary.json").exists()


def test_a_sweep_varies_splits_and_flags_and_does_nothing_twice(taught, data, tmp_path, monkeypatch):
    args = SweepArgs(
        model=str(taught), data=str(data), split=("forget01", "forget05"), forget_losses=("NPO+GD",), max_steps=1,
        vary=(("retain_freq", "1", "2"),), output_dir=str(tmp_path), **SMALL,
    )  # fmt: skip
    lines = sweep.sweep(args)
    assert [(line["split"], line["retain_freq"]) for line in lines] == [
        ("forget01", "1"), ("forget01", "2"), ("forget05", "1"), ("forget05", "2"),
    ]  # fmt: skip
    names = [f"NPO+GD_lr1e-05_flr3e-05_seed1001_split={split}_retain_freq={freq}" for split in args.split for freq in (1, 2)]
    assert sorted(path.parent.name for path in tmp_path.glob("*/finished.json")) == sorted(names)
    head = [cell.strip() for cell in (tmp_path / "results.md").read_text().splitlines()[0].split("|")]
    assert head[1:9] == ["losses", "optim", "learning rate", "forget lr", "seed", "task", "split", "retain freq"]
    methods = (tmp_path / "methods.md").read_text()
    assert "| NPO+GD dual-adamw lr 1e-05 forget 3e-05 split forget05 retain_freq 2 |" in methods

    monkeypatch.setattr(sweep, "run", lambda _: pytest.fail("a finished run was started again"))
    assert json.loads(json.dumps(sweep.sweep(args))) == json.loads(json.dumps(lines))
    # what an earlier version finished, which knew one split by its name and nothing of independent tasks
    path = tmp_path / names[0] / "finished.json"
    finished = json.loads(path.read_text())
    finished["settings"]["split"] = "forget01"
    del finished["settings"]["tasks_independent"]
    path.write_text(json.dumps(finished))
    assert len(sweep.sweep(args)) == 4
