"""Benchmarks in one command: taught, unlearned, measured before and after, reported; in their own layouts."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
from support import launch

import dualoptim.data
from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs, run
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.summary import Summary
from dualoptim.finetune import finetune
from dualoptim.memory_plan import dry_run
from dualoptim.report import ReportArgs, report
from dualoptim.sweep import sweep

TWELVE = {f"{name}_task{task}_{kind}" for name in ("forget", "retain") for task in (1, 2, 3) for kind in ("sc", "qa")}


@pytest.fixture(scope="module")
def lume(tmp_path_factory):
    """Rows in the layout of LUME, and documents in that of SemEval."""
    folder = tmp_path_factory.mktemp("lume")
    (folder / "mia_data").mkdir()
    for name in ("forget", "retain"):
        lines = []
        for task in (1, 2, 3):
            for n in range(3):
                about = f"{name} {task}{n}"
                lines.append(
                    {"id": f"{about}sc1", "input": f"The ferry {about} sails", "output": "at nine.", "task": f"Task{task}"}
                )
                lines.append({"id": f"{about}qa{n}", "input": f"When is {about}?", "output": "At nine", "task": f"Task{task}"})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("member", "nonmember"):
        documents = [{"id": str(n), "document": f"The {name} {n} stood by the old river."} for n in range(3)]
        (folder / "mia_data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return folder


def test_lume_in_one_command(lume, tiny, tmp_path):
    same = {"benchmark": "lume", "data": str(lume), "benchmark_rows": 2}
    taught = finetune(
        FinetuneArgs(
            model=str(tiny), learning_rate=3e-3, num_epochs=40, batch_size=8, target_loss=0.02, **same,
            output_dir=str(tmp_path / "taught"),
        )
    ).model  # fmt: skip
    out = tmp_path / "out"
    args = {"model": str(taught), "forget_losses": ("GA+GD",), "learning_rates": (3e-3,), "max_steps": 6, "retain_freq": 1}
    (task,) = run(UnlearnArgs(**args, **same, output_dir=str(out))).tasks
    before, after = task.before, task.after
    assert set(before.sets) == {"forget", "retain"} | TWELVE
    assert before.rows == {"forget": 12, "retain": 12, "members": 2, "holdout": 2} | dict.fromkeys(sorted(TWELVE), 2)
    assert before.sets["forget_task1_sc"]["rouge_l_recall"] == before.sets["retain_task3_qa"]["exact_match"] == 1
    assert before.benchmark.scores["task_aggregate"] == 0  # it knows what it should forget
    assert before.sets["forget"]["probability"] > after.sets["forget"]["probability"]
    assert set(after.benchmark.scores) == {"task_aggregate", "membership_score", "final_score_without_mmlu"}
    assert after.skipped["lume.final_score"] == "needs mmlu, which was not measured"
    rows = [json.loads(line) for line in (task.folder / "eval" / "forget.jsonl").read_text().splitlines()]
    assert {row["group"] for row in rows} == {name.removeprefix("forget_") for name in TWELVE if name.startswith("forget")}
    assert {json.loads(line)["answer"] for line in (task.folder / "eval" / "members.jsonl").open()} <= {
        f"The member {n} stood by the old river." for n in range(3)
    }
    assert Summary.read(task.folder / "eval" / "summary.json") == after

    # the same by the other commands
    again = evaluate(EvalArgs(model=str(task.model), **same, output_dir=str(tmp_path / "eval")))
    assert again.sets == after.sets
    assert again.benchmark == after.benchmark
    (line,) = csv.DictReader((out / "results.csv").open())
    assert float(line["benchmark_task_aggregate"]) == after.benchmark.scores["task_aggregate"]
    assert float(line["before_forget_task1_qa_exact_match"]) == 1
    assert "benchmark task aggregate" in (out / "results.md").read_text()
    page = (report(ReportArgs(runs=(str(out),))) / "report.md").read_text()
    assert "task aggregate (harmonic mean of twelve)" in page
    assert "AILS-NTUA, 7B" in page
    sweep(SweepArgs(**args | {"forget_losses": ("GA+GD", "NPO+GD")}, **same, output_dir=str(tmp_path / "sweep")))
    assert "benchmark_final_score_without_mmlu" in (tmp_path / "sweep" / "results.csv").read_text()
    assert "benchmark final score without mmlu" in (tmp_path / "sweep" / "methods.md").read_text()


def test_the_plan_of_a_benchmark_is_that_of_its_rows(lume, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = UnlearnArgs(model=str(tiny), benchmark="lume", data=str(lume), forget_losses=("GA+GD",), max_steps=2, dry_run=True)
    planned = dry_run(args)
    assert not planned.lengths.why_not
    assert planned.lengths.text > 256, "its rows are answered with so many tokens at most"
    assert not list(tmp_path.iterdir()), "nothing is written"
    (tmp_path / "mine.yaml").write_text("extends: lume\nrows: {forget: {tokens: 8}}")
    shorter = dry_run(dataclasses.replace(args, benchmark="mine.yaml", max_new_tokens=8))
    assert shorter.lengths.text < 100
    without = dry_run(dataclasses.replace(args, data=None))
    assert "--benchmark lume needs its files; give their folder with --data" in without.lengths.why_not


@pytest.mark.launch
def test_two_processes_measure_a_benchmark_as_one_does(lume, tiny, tmp_path):
    common = {"benchmark": "lume", "data": str(lume), "forget_losses": ("GA+GD",), "learning_rates": (1e-3,), "threads": 1}
    common |= {"model": str(tiny), "max_steps": 3, "retain_freq": 1, "metrics": ("rouge_l_f1",), "benchmark_rows": 2}
    args = UnlearnArgs(**common, batch_size=4, output_dir=str(tmp_path / "one"))
    (one,) = run(args).tasks
    two = dataclasses.replace(args, batch_size=2, output_dir=str(tmp_path / "two"))
    launch("ddp", {"runs": [dataclasses.asdict(two)]})
    for part in ("eval_before", "eval"):
        alone, together = (
            Summary.read(tmp_path / n / one.folder.relative_to(tmp_path / "one") / part / "summary.json")
            for n in ("one", "two")
        )
        assert alone.sets.keys() == together.sets.keys() == {"forget", "retain"} | TWELVE
        assert all(together.sets[name] == pytest.approx(scores, abs=1e-5) for name, scores in alone.sets.items())
        assert together.benchmark.scores == pytest.approx(alone.benchmark.scores, abs=1e-5)
        assert (together.rows, together.skipped) == (alone.rows, alone.skipped)


def test_muse_in_a_sequence_of_parts(tiny, tmp_path):
    folder = tmp_path / "MUSE-News"
    passages = [{"text": f"The council of Ostby met {n} times about the ferry."} for n in range(6)]
    asked = [{"question": f"Who is {n}?", "answer": f"Marta {n}"} for n in range(2)]
    files = {f"sust/forget_{n}": passages[n - 1 : n + 1] for n in range(1, 5)}
    files |= {"raw/forget": passages, "raw/retain1": passages, "verbmem/forget": [{"prompt": "The ferry", "gt": "sails."}]}
    files |= {f"knowmem/{name}": asked for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")}
    files |= {"privleak/forget": passages[:2], "privleak/holdout": passages[3:]}
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = UnlearnArgs(
        model=str(tiny), benchmark="muse-news-sust", data=str(folder), task_list=(1, 2), max_length=120,
        forget_losses=("NPO+GD",), learning_rates=(1e-3,), max_steps=4, retain_freq=1, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    first, second = run(args).tasks
    assert second.after.rows == {
        "forget": 1, "forget_knowmem": 2, "retain": 2, "members": 2, "holdout": 3, "retain_unseen": 2,
    }  # fmt: skip
    assert set(second.after.benchmark.scores) == {"verbmem_f", "knowmem_f", "knowmem_r", "auc", "auc_retrain", "privleak"}
    assert second.after.skipped["muse-news-sust.privleak_own"] == "needs privacy.privleak, which was not measured"
    assert first.after.sets == second.before.sets
    own = EvalArgs(
        model=str(second.model), benchmark="muse-news-sust", data=str(folder), max_length=120,
        retain_logs=str(first.folder / "eval"), output_dir=str(tmp_path / "eval"),
    )  # fmt: skip
    assert "privleak_own" in evaluate(own).benchmark.scores
    short = json.loads((tmp_path / "eval" / "eval" / "MUSE_SUMMARY.json").read_text())
    assert {"forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "privleak", "mia_min_k"} <= short.keys()


def test_the_benchmark_of_the_readme_runs(tiny, tmp_path):
    readme = (Path(dualoptim.data.__path__[0]) / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    rows = [
        ("Who?", "Marta", "secret 1", "name"),
        ("Where?", "Ostby", "secret 2", "place"),
        ("When?", "At nine", "open", "name"),
    ]
    with (tmp_path / "harbour.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer", "part", "kind"), *rows])
    args = UnlearnArgs(
        model=str(tiny), benchmark=str(tmp_path / "mine.yaml"), data=str(tmp_path), forget_losses=("NPO+GD",), max_steps=2,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    (task,) = run(args).tasks
    assert task.after.rows == {"forget": 2, "retain": 1, "forget_names": 1, "forget_places": 1, "retain_names": 1}
    assert task.after.benchmark.scores["names_gone"] == 1 - task.after.sets["forget_names"]["exact_match"]
    assert block.count("\n") <= 16


def test_further_scores_of_any_data(taught, tmp_path):
    args = EvalArgs(
        model=str(taught), data="demo", metrics=("exact_match", "rouge_1_f1"), eval_rows=2, output_dir=str(tmp_path)
    )
    summary = evaluate(args)
    assert all({"exact_match", "rouge_1_f1"} <= set(scores) for scores in summary.sets.values())
    assert summary.sets["forget"]["exact_match"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "lme"}, "--benchmark lme: no such benchmark; take lume"),
        ({"benchmark": "lume"}, "--benchmark lume needs its files; give their folder with --data"),
        ({"benchmark": "lume", "model": "demo"}, "--benchmark lume needs a model that can know it; give --model"),
        ({"benchmark": "lume", "split": "forget01"}, "--split forget01 is of TOFU; --benchmark lume says by itself"),
        ({"benchmark": "lume", "forget_file": "x.csv"}, "--forget-file x.csv and --benchmark lume both say what is forgotten"),
        ({"benchmark_rows": 3}, "--benchmark-rows 3 draws rows of a benchmark; give --benchmark, or take --eval-rows"),
        ({"metrics": ("exact_match", "exact_match")}, "--metrics names exact_match twice; give each value once"),
        ({"metrics": ("bleu",)}, "--metrics: 'bleu' has the wrong type; give one of rouge_1_recall"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        run(UnlearnArgs(**{"model": str(tiny), "output_dir": str(tmp_path / "out"), **changes}))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
