"""A user's own files, people that a model knows, and general ability."""

import csv
import dataclasses
import json
import os
from pathlib import Path

import pytest

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs, run
from dualoptim.config.saved import read_inputs
from dualoptim.data.identity import rows_hash
from dualoptim.data.own import open_source
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.job import Job
from dualoptim.memory_plan import dry_run
from dualoptim.models.launch import start_accelerator
from dualoptim.sweep import sweep

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


def test_rows_are_taught_refusals_of_their_own_and_have_means_by_groups(tiny, tmp_path):
    """Where all rows have the same, that is what a list of this one gives."""
    refusal = "I never met that person."
    rows = [{**row, "no": refusal, "kind": "even" if n % 2 == 0 else "odd"} for n, row in enumerate(QUESTIONS)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "idk.txt").write_text(refusal)
    common = {"model": str(tiny), "forget_file": str(tmp_path / "own.jsonl"), "forget_losses": ("IDK+none",), **COLUMNS}
    common |= {"learning_rates": (1e-3,), "max_steps": 2}
    texts = {"refusal_column": "no", "group_column": "kind", "max_new_tokens": 2}
    own = UnlearnArgs(**common, **texts, output_dir=str(tmp_path / "own"))
    drawn = UnlearnArgs(**common, idk_file=str(tmp_path / "idk.txt"), eval=False, output_dir=str(tmp_path / "drawn"))
    (one,), (other,) = run(own).tasks, run(drawn).tasks
    losses, expected = ([record["loss"] for record in task.log] for task in (one, other))
    assert losses == expected
    assert one.after.rows == {"forget": 4, "forget_even": 2, "forget_odd": 2, "forget_other_words": 12}
    means = [one.after.sets[name]["probability"] for name in ("forget_even", "forget_odd")]
    assert sum(means) / 2 == pytest.approx(one.after.sets["forget"]["probability"])
    with pytest.raises(InputError, match="--refusal-column no names a column of your own files; give --forget-file"):
        UnlearnArgs(refusal_column="no")


def test_rows_that_are_held_out_are_trained_on_by_no_step_and_measured_apart(files, tiny, tmp_path):
    """The evaluation of the model finds the same rows by the same number."""
    common = {"forget_file": str(files / "forget.csv"), "retain_file": str(files / "retain.csv"), **COLUMNS}
    common |= {"retain_held_out": 2, "max_new_tokens": 2}
    args = UnlearnArgs(model=str(tiny), **common, learning_rates=(1e-2,), max_steps=6, output_dir=str(tmp_path / "out"))
    (task,) = run(args).tasks
    pool = {row.question for row in Job.read(args, start_accelerator(args)).rows(0).retain}
    out = [row["q"] for row in KEPT if row["q"] not in pool]
    assert (len(pool), len(out)) == (4 + 4, 2)  # those of task 2 are kept as well
    own = {"retain": 6, "retain_seen": 4, "retain_unseen": 2}
    assert task.after.rows == {"forget": 4, "forget_other_words": 12, **own}
    rows = map(json.loads, (task.folder / "eval" / "retain.jsonl").read_text().splitlines())
    own = [row["probability"] for row in rows if row["question"] in out]
    assert task.after.sets["retain_unseen"]["probability"] == pytest.approx(sum(own) / 2)
    assert task.after.sets["retain_unseen"]["probability"] != task.before.sets["retain_unseen"]["probability"]
    again = evaluate(EvalArgs(model=str(task.model), **common, output_dir=str(tmp_path / "eval")))
    assert again.sets == task.after.sets
    assert not (task.folder / "eval" / "retain_unseen.jsonl").exists()  # no row is measured twice
    report = (task.model / "README.md").read_text()
    assert "retain rows that no step trained on" in report


def test_unlearning_own_questions_in_two_tasks(files, taught, tmp_path):
    args = UnlearnArgs(
        model=str(taught), forget_file=str(files / "forget.csv"), retain_file=str(files / "retain.jsonl"), task_list=(1, 2),
        question_column="q", answer_column="a", learning_rates=(1e-3,), max_steps=6, retain_freq=1, max_new_tokens=5,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    first, second = run(args).tasks
    assert first.after["rows"] == {"forget": 4, "forget_other_words": 12, "retain": 6}
    assert second.after["rows"] == {"forget": 4, "forget_other_words": 12, "retain": 6, "forget_task1": 4}
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


def test_learning_own_files(files, taught, tmp_path, capsys):
    """Rows and passages of one's own are learned, and what another learns of the same files is named by its split."""
    shared = {"model": str(taught), "learning_rate": 1e-3, "max_steps": 3, "max_length": 64}
    own = {"forget_file": str(files / "forget.csv"), "retain_file": str(files / "retain.jsonl"), **COLUMNS}
    for name, splits in (("target", ("full",)), ("retain-only", ("retain",))):
        result = finetune(FinetuneArgs(**shared, **own, splits=splits, output_dir=str(tmp_path / name)))
        learned = rows_hash(open_source(UnlearnArgs(model="m", **own)).rows(*splits))
        assert read_inputs(result.folder / "config.yaml")["rows"] == learned
        assert f"fine-tuned on {splits[0]} of forget.csv, retain.jsonl" in (result.model / "README.md").read_text()
    document = FinetuneArgs(**shared, forget_file=str(files / "document.txt"), output_dir=str(tmp_path / "document"))
    log = finetune(document).log
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(InputError, match="nothing says what is to be learned"):
        finetune(FinetuneArgs(**shared, output_dir=str(tmp_path / "none")))
    with pytest.raises(InputError, match="--splits retain90: files of your own have full, forget and retain"):
        finetune(FinetuneArgs(**shared, **own, splits="retain90", output_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_who_gives_nothing_but_what_to_forget_keeps_what_the_model_answers(files, babbling, tmp_path, capsys):
    """The rows are made once, before anything is trained, and are the same for a run that goes on, a sweep and a dry run."""
    args = UnlearnArgs(
        model=str(babbling), forget_file=str(files / "forget.csv"), **COLUMNS, max_steps=6, save_every=4,
        learning_rates=(1e-3,), max_new_tokens=4, eval_rows=3, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    task = run(args).tasks[0]
    said = capsys.readouterr().out
    assert "true answers longer than the 4 tokens of the model's own: 6 of 9" in said, "not those that are still to be made"
    assert said.count("rows to keep are made from the model, its own answers to general questions") == 1
    (made,) = (tmp_path / "out" / "reference").glob("own-answers-*.jsonl")
    kept = [json.loads(line) for line in made.read_text().splitlines()]
    assert len(kept) > 90
    assert all(row["question"] and row["answer"].strip() for row in kept)
    assert {record["phase"] for record in task.log} == {"forget", "retain"}
    assert task.after.rows == {"forget": 3, "forget_other_words": 3, "retain": 3}
    assert (task.before.retain_from, task.after.retain_from) == ("model", "model")
    assert "retain set, made from the model (should stay): probability" in said
    assert "facts of your own were not measured" in said
    assert "retain set, made from the model" in (task.model / "README.md").read_text(encoding="utf-8")
    shown = (task.folder / "eval" / "retain.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in shown] == [row["question"] for row in kept[:3]]

    run(dataclasses.replace(args, resume=str(task.folder / "checkpoint" / "step-4")))
    with pytest.raises(InputError, match="is an earlier result"):
        run(args)
    silent = run(dataclasses.replace(args, texts=False, output_dir=str(tmp_path / "silent"))).tasks[0]
    assert read_inputs(silent.folder / "config.yaml")["rows"] == read_inputs(task.folder / "config.yaml")["rows"]
    assert not list((tmp_path / "silent").rglob("own-answers-*"))
    planned = dry_run(dataclasses.replace(args, dry_run=True, output_dir=str(tmp_path / "none")))
    assert "5 retain steps of 4 rows (20 examples)" in planned.lengths.steps[0]
    assert not (tmp_path / "none").exists()


def test_a_sweep_makes_rows_to_keep_once_and_knows_what_it_has_finished(files, babbling, tmp_path, capsys):
    """Also where one of its pairs keeps nothing."""
    args = SweepArgs(
        model=str(babbling), forget_file=str(files / "forget.csv"), **COLUMNS, forget_losses=("NPO+none", "ME+GD", "GA+GD"),
        max_steps=1, eval=False, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    sweep(args)
    (made,) = (tmp_path / "out").rglob("own-answers-*.jsonl")
    assert made.parent == tmp_path / "out" / "reference"
    capsys.readouterr()
    sweep(args)
    assert capsys.readouterr().out.count("finished before") == 3


def test_an_untaught_model_that_answers_nothing_has_nothing_to_keep(files, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("dualoptim.evaluation.own_answers.generate_tokens", lambda scoring, label, asked: [[] for _ in asked])
    args = UnlearnArgs(model=str(tiny), forget_file=str(files / "forget.csv"), **COLUMNS, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="no answers to general questions that could be kept; give --retain-file, or a pair"):
        run(args)
    assert not (tmp_path / "out").exists()


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
        ({"forget_file": "document.txt", "max_length": 12}, "--max-length 12 leaves no room for an answer after the question"),
        ({"forget_file": "document.txt", "retain_questions": "none.txt"}, "--retain-questions {d}/none.txt: cannot be read"),
        ({"forget_file": "forget.csv"}, "no column 'question'; it has q, a, task_id; name it with --question-column"),
        ({"forget_file": "none.csv"}, "none.csv: cannot be read"),
        ({"forget_file": "broken.jsonl"}, "broken.jsonl:2: not JSON"),
        ({"forget_file": "word.docx"}, ".docx ending; give a .jsonl"),
        ({"forget_file": "empty.jsonl"}, "holds no rows"),
        ({"forget_file": "forget.csv", **COLUMNS, "task_list": (3,)}, "has no such task; it has 1, 2"),
        ({"forget_file": "gap.csv"}, "gap.csv:4: column 'answer' is ''; give a text"),
        ({"forget_file": "document.txt", "max_length": 3, "forget_losses": ("GA+none",)}, "--max-length 3 is too short"),
    ],
)  # fmt: skip
def test_mistakes_in_own_files_are_one_line(changes, message, files, tiny, tmp_path):
    (files / "broken.jsonl").write_text('{"question": "x", "answer": "y"}\n{"question"\n')
    (files / "empty.jsonl").write_text("\n")
    (files / "word.docx").write_text("x")
    (files / "gap.csv").write_text('question,answer\n"a\nb",c\nd,\n')
    changes = {name: str(files / value) if name.endswith(("_file", "_questions")) else value for name, value in changes.items()}
    with pytest.raises(InputError) as error:
        run(UnlearnArgs(model=str(tiny), max_steps=1, eval=False, output_dir=str(tmp_path / "out"), **changes))
    assert message.replace("{d}", str(files)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_go_together(tmp_path):
    for changes, message in (
        ({"retain_file": "x"}, "--retain-file x needs --forget-file"),
        (
            {"forget_file": "x"},
            "--forget-file x needs a model that knows its rows, .* folder demo_model in that of a demo run",
        ),
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
    assert after["rows"] == {"forget": 2, "retain": 2, "retain_unseen": 2}
    assert "truth_ratio" in after["sets"]["forget"]
    assert 0 <= after["untargeted_forget_efficacy"] <= 1


def test_a_start_says_what_is_forgotten_and_kept_at_once_and_which_answers_are_cut(files, tiny, tmp_path, capsys):
    """Once a run, before a model is trained; a dry run ends where the data are wrong."""
    (files / "same.jsonl").write_text("\n".join(map(json.dumps, [*KEPT, *QUESTIONS[1:3]])))
    own = {"forget_file": str(files / "forget.jsonl"), "retain_file": str(files / "same.jsonl"), **COLUMNS}
    args = UnlearnArgs(model=str(tiny), **own, max_steps=1, learning_rates=(1e-5,), max_new_tokens=2, threads=1)
    run(dataclasses.replace(args, output_dir=str(tmp_path / "out")))
    said = capsys.readouterr().out
    assert "hardly move" not in said
    assert f"keep as well: 2, the first at {files}/forget.jsonl:2 and {files}/same.jsonl:7; take them out of one" in said
    assert said.count("true answers longer than the 2 tokens of the model's own: 22 of 22, which caps exact match") == 1
    for changes, message in (
        ({"question_column": "x"}, "forget.jsonl:1: no column 'x'"),
        ({"forget_file": (str(files / "none.csv"),)}, "none.csv: cannot be read"),
        ({"retain_file": (str(files / "none.csv"),)}, "none.csv: cannot be read"),
    ):
        with pytest.raises(InputError) as error:
            dry_run(dataclasses.replace(args, **changes, dry_run=True))
        assert message in str(error.value)
    away = dry_run(dataclasses.replace(args, forget_file=("nobody/nothing:train",), dry_run=True))
    assert "--forget-file nobody/nothing:train" in away.lengths.why_not
