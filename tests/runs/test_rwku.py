"""RWKU in one command: two people, each forgotten from the first model, with a table over them."""

import csv
import json
from dataclasses import replace

import pytest
from rwku_layout import write_rwku
from support import state_of

from dualoptim import EvalArgs, UnlearnArgs, memory_plan, run
from dualoptim.data.hub import HubData
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import measure
from dualoptim.evaluation.comparisons import splits_sentences
from dualoptim.report import ReportArgs, report

PEOPLE = ("Marta Quill", "Ostby Lind", "Ada Berg")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Two of three people, unlearned in a folder of the hub's layout."""
    folder = tmp_path_factory.mktemp("rwku")
    data = write_rwku(folder / "RWKU", PEOPLE)
    args = UnlearnArgs(
        model=str(tiny), benchmark="rwku", data=str(data), targets=("Ada Berg", "Marta Quill"), forget_losses=("NPO+none",),
        learning_rates=(1e-3,), max_steps=2, max_new_tokens=4, template="qa", output_dir=str(folder / "out"),
    )  # fmt: skip
    return args, run(args)


def test_two_people_each_from_the_first_model(whole):
    _, result = whole
    third, first = result.tasks
    assert (third.task, first.task) == (3, 1)
    assert third.before.sets != first.before.sets
    scores = {
        "forget_fb",
        "forget_qa",
        "forget_aa",
        "forget_all",
        "neighbor_fb",
        "neighbor_qa",
        "neighbor_all",
        "mia_fm",
        "mia_rm",
    }
    assert scores <= set(first.after.benchmark.scores)
    assert {f"utility_{name}" for name in ("general", "reason", "truthfulness", "factuality")} <= set(
        first.after.benchmark.scores
    )
    assert first.after.rows["forget"] == 5
    assert set(first.after.sets["mmlu"]) == {"right_choice"}  # nothing but what is asked for
    assert {"passage_loss", "passage_min_k"} <= set(first.after.sets["forget_passages"])
    loss = [one.benchmark.scores["mia_fm"] for one in (first.before, first.after)]
    assert loss[1] > loss[0]  # its passages are less known
    rows = [json.loads(line) for line in (first.folder / "eval" / "forget.jsonl").read_text().splitlines()]
    assert rows[2]["group"] == "level3 prefix_injection"
    assert all("Marta Quill" in row["question"] for row in rows)
    (passage,) = (json.loads(line) for line in (first.folder / "eval" / "forget_passages.jsonl").open())
    assert "generated" not in passage
    (own,) = (json.loads(line) for line in (first.folder / "eval" / "fluency.jsonl").open())
    assert "rouge_l_recall" not in own


def test_what_is_the_same_of_two_people_is_measured_once(whole, monkeypatch, tmp_path):
    args, result = whole
    asked = []
    own = measure.set_records
    monkeypatch.setattr(measure, "set_records", lambda scoring, name, rows: asked.append(name) or own(scoring, name, rows))
    args = replace(args, output_dir=str(tmp_path), max_steps=1)
    before = [task.before for task in run(args).tasks]
    assert before == [task.before for task in result.tasks]
    assert asked.count("fluency") == 3  # before once, and after each
    assert asked.count("forget") == 4


def test_the_table_over_people_and_the_report(whole):
    _, result = whole
    lines = list(csv.DictReader((result.tasks[0].folder.parent / "tasks.csv").open()))
    assert [line["task"] for line in lines] == ["before", "3", "1", "mean", "deviation"]
    assert [line["target"] for line in lines] == ["", "Ada Berg", "Marta Quill", "", ""]
    values = [task.after.benchmark.scores["mia_fm"] for task in result.tasks]
    assert float(lines[3]["benchmark_mia_fm"]) == pytest.approx(sum(values) / 2)
    page = (report(ReportArgs(runs=(str(result.folder),))) / "report.md").read_text()
    assert "Llama-3-8B, NPO" in page
    assert "| 3 " in page.partition("tasks side by side")[2]
    assert "Ada Berg" in page.partition("tasks side by side")[2]
    assert "loss of the person's passages (FM)" in page
    assert ("python -m nltk.downloader punkt_tab" in page) != splits_sentences()  # why there is no fluency


def test_it_goes_on_where_it_was_interrupted(whole, tmp_path):
    args, result = whole
    again = run(replace(args, resume="newest"))
    assert [task.after for task in again.tasks] == [task.after for task in result.tasks]
    alone = run(replace(args, targets=("Marta Quill",), output_dir=str(tmp_path / "alone")))
    assert alone.tasks[0].after == result.tasks[1].after
    assert all(value.equal(state_of(result.tasks[1].model)[name]) for name, value in state_of(alone.tasks[0].model).items())


def test_the_same_by_the_other_commands(whole, tmp_path):
    args, result = whole
    same = {"benchmark": "rwku", "data": args.data, "max_new_tokens": 4, "template": "qa"}
    model = str(result.tasks[0].model)
    measured = evaluate(EvalArgs(model=model, targets=("ada_berg",), **same, output_dir=str(tmp_path)))
    assert measured.benchmark == result.tasks[0].after.benchmark
    plan = memory_plan.dry_run(args)
    assert plan.lengths.why_not == ""


def test_pairs_by_dpo_and_refusals_by_idk(tiny, whole, tmp_path):
    args, _ = whole
    for benchmark, pair in (("rwku-pairs", "DPO+none"), ("rwku-refusals", "IDK+none")):
        (task,) = run(
            UnlearnArgs(
                model=str(tiny), benchmark=benchmark, data=args.data, targets=("Ostby Lind",), forget_losses=(pair,),
                max_steps=1, eval=False, template="qa", output_dir=str(tmp_path / benchmark),
            )
        ).tasks  # fmt: skip
        assert len(task.log) == 1


def test_a_data_set_of_the_hub(monkeypatch, whole, tmp_path):
    """Its configurations are asked for by the names that its card gives them."""
    from rwku_layout import CONFIGURATIONS, files_of

    from dualoptim.data.benchmark import Benchmark

    asked = []

    def rows(self, configuration, split):
        asked.append((self.place, configuration))
        name = CONFIGURATIONS[f"{configuration}:{split}"]
        return [row for person in PEOPLE for row in files_of(person)[name]]

    monkeypatch.setattr(HubData, "rows", rows)
    source = Benchmark(UnlearnArgs(model="none", benchmark="rwku"))
    assert source.targets == list(PEOPLE)
    sets, skipped = source.evaluation_sets("", 2)
    assert len(sets["forget"]) == 5
    assert not skipped
    source.evaluation_sets("", 3)
    assert len(asked) == len(set(asked))  # each is loaded once
    assert {place for place, _ in asked} == {"jinzhuoran/RWKU"}
