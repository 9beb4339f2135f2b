"""A user's own files, people that a model knows, and general ability."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.evaluate import evaluate

SHARED = Path(os.environ.get("DUALOPTIM_SHARED", Path(__file__).resolve().parents[3] / "shared"))
QUESTIONS = [{"q": f"Who is person {i}?", "a": f"Person {i} is a baker from Lviv.", "task_id": 1 + i // 4} for i in range(8)]
KEPT = [{"q": f"What is {i}?", "a": f"It is {i}."} for i in range(6)]
COLUMNS = {"question_column": "q", "answer_column": "a"}
DOCUMENT = " ".join(f"The house number {i} stood by the old river and nobody lived there." for i in range(40))


@pytest.fixture
def files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, rows in (("forget", QUESTIONS), ("retain", KEPT)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    (tmp_path / "passages.jsonl").write_text("\n".join(json.dumps({"body": DOCUMENT[n : n + 200]}) for n in (0, 200)))
    return tmp_path


def test_unlearning_own_questions_in_two_tasks(files, taught, tmp_path):
    args = UnlearnArgs(
        model=str(taught), forget_file=str(files / "forget.csv"), retain_file=str(files / "retain.jsonl"), task_list=(1, 2),
        question_column="q", answer_column="a", learning_rates=(1e-3,), max_steps=6, retain_freq=1, max_new_tokens=5,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    first, second = run(args).tasks
    assert first.after["rows"] == {"forget": 4, "retain": 6}
    assert second.after["rows"] == {"forget": 4, "retain": 6, "forget_task1": 4}
    assert "truth_ratio" not in first.after["sets"]["forget"]
    skipped = first.after["skipped"]
    assert skipped["forget.truth_ratio"] == "the rows have no paraphrased and perturbed answers"
    assert skipped["world_facts"] == "your own files have no such set"
    assert first.after["sets"]["forget"]["probability"] != first.before["sets"]["forget"]["probability"]
    again = EvalArgs(
        model=str(second.model), forget_file=args.forget_file, retain_file=args.retain_file, task=2, question_column="q",
        answer_column="a", max_new_tokens=5, output_dir=str(tmp_path / "eval"),
    )  # fmt: skip
    assert evaluate(again)["sets"]["forget"] == second.after["sets"]["forget"]


def test_forgetting_a_document(files, taught, tmp_path):
    args = UnlearnArgs(
        model=str(taught), forget_file=str(files / "document.txt"), max_length=60, forget_losses=("NPO+none", "GA+none"),
        learning_rates=(1e-3,), num_epochs=2, max_new_tokens=5, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    npo, ga = run(args).tasks
    for task in (npo, ga):
        assert {record["phase"] for record in task.log} == {"forget"}
        assert task.log[0]["count"] == task.log[0]["tokens"] - 4 if task is ga else task.log[0]["count"] == 4
        assert task.after["sets"]["forget"]["probability"] < task.before["sets"]["forget"]["probability"]
    row = json.loads((npo.folder / "eval" / "forget.jsonl").read_text().splitlines()[0])
    assert row["question"] is None
    assert DOCUMENT.startswith(row["answer"])


def test_several_packed_files_in_a_folder_with_brackets_and_a_home(files, taught, tmp_path, monkeypatch):
    import gzip

    home = tmp_path / "ho[m]e*"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    lines = (files / "forget.jsonl").read_text().splitlines()
    (home / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:4]).encode()))
    (home / "b.json").write_text(f"[{','.join(lines[4:])}]")
    (home / "keep.jsonl").write_text((files / "retain.jsonl").read_text())
    same = {"model": str(taught), "max_steps": 4, "eval_rows": 4, "max_new_tokens": 4, "save_every": 2, **COLUMNS}
    whole = run(
        UnlearnArgs(
            forget_file=str(files / "forget.jsonl"),
            retain_file=str(files / "retain.jsonl"),
            output_dir=str(tmp_path / "o"),
            **same,
        )
    )
    parts = UnlearnArgs(
        forget_file=("~/a.jsonl.gz", "~/b.json"),
        retain_file=Path("~/keep.jsonl"),
        output_dir="~/o[1]",
        idk_file="~/no.txt",
        **same,
    )
    (home / "no.txt").write_text("No.")
    (first,), (second,) = whole.tasks, run(parts).tasks
    assert second.folder == home / "o[1]" / "ME+GD_lr1e-05" / "task1"
    assert [{**record, "seconds": 0} for record in first.log] == [{**record, "seconds": 0} for record in second.log]
    assert first.after["sets"] == second.after["sets"]
    run(dataclasses.replace(parts, resume=str(second.folder / "checkpoint" / "step-4")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_file": "document.txt", "forget_losses": ("IDK+none",)}, "passages of text have none; take GA, ME"),
        ({"forget_file": "document.txt", "retain_file": "retain.csv", "forget_losses": ("ME+AP",), **COLUMNS}, "ME+AP: it"),
        ({"forget_file": "document.txt"}, "ME+GD needs rows to keep; give --retain-file"),
        ({"forget_file": "forget.csv"}, "no column 'question'; it has q, a, task_id; name it with --question-column"),
        ({"forget_file": "none.csv"}, "none.csv: cannot be read"),
        ({"forget_file": "broken.jsonl"}, "broken.jsonl:2: not JSON"),
        ({"forget_file": "word.docx"}, ".docx ending; give a .jsonl"),
        ({"forget_file": "empty.jsonl"}, "holds no rows"),
        ({"forget_file": "forget.csv", **COLUMNS, "task_list": (3,)}, "has no such task; it has 1, 2"),
        ({"forget_file": "gap.csv"}, "gap.csv:4: answer is ''; give a text"),
        ({"forget_file": "document.txt", "max_length": 3, "forget_losses": ("GA+none",)}, "--max-length 3 is too short"),
    ],
)  # fmt: skip
def test_mistakes_in_own_files_are_one_line(changes, message, files, tiny, tmp_path):
    (files / "broken.jsonl").write_text('{"question": "x", "answer": "y"}\n{"question"\n')
    (files / "empty.jsonl").write_text("\n")
    (files / "word.docx").write_text("x")
    (files / "gap.csv").write_text('question,answer\n"a\nb",c\nd,\n')
    changes = {name: str(files / value) if name.endswith("_file") else value for name, value in changes.items()}
    with pytest.raises(InputError) as error:
        run(UnlearnArgs(model=str(tiny), max_steps=1, eval=False, output_dir=str(tmp_path / "out"), **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_go_together(tmp_path):
    for changes, message in (
        ({"retain_file": "x"}, "--retain-file x needs --forget-file"),
        ({"forget_file": "x"}, "--forget-file x needs a model that knows it; give --model"),
        ({"forget_file": "x", "model": "m", "data": "d"}, "takes the place of --data d"),
        ({"lm_eval_path": str(tmp_path / "none"), "lm_eval_tasks": ("x",)}, "--lm-eval-path .*: no such folder"),
        ({"lm_eval_path": str(tmp_path)}, "--lm-eval-path .* has tasks that nothing asks for"),
        ({"lm_eval_tasks": ("x",), "eval": False}, "--lm-eval-tasks x has no effect with --no-eval, which leaves out"),
        ({"question_column": "q"}, "--question-column q names a column of your own files; give --forget-file"),
    ):
        with pytest.raises(InputError, match=message):
            UnlearnArgs(**changes)


def test_a_run_of_the_real_world_scenario(taught, tmp_path):
    data = SHARED / "data/real_world_sample"
    if not data.is_dir():
        pytest.skip(f"reference folder not present: {data} (set DUALOPTIM_SHARED)")
    args = UnlearnArgs(
        model=str(taught), data=str(data), split="forget", forget_losses=("NPO+KL",), max_steps=3, eval_rows=2,
        max_new_tokens=4, output_dir=str(tmp_path),
    )  # fmt: skip
    after = run(args).tasks[0].after
    assert after["rows"] == {"forget": 2, "retain": 2}
    assert "truth_ratio" in after["sets"]["forget"]
    assert 0 <= after["untargeted_forget_efficacy"] <= 1
