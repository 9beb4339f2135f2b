"""What a run may find where it is going to write: nothing, or results of ours; what others wrote is never touched."""

import csv
import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from dualoptim import EvalArgs, FinetuneArgs, InputError, UnlearnArgs
from dualoptim.config.args import SweepArgs
from dualoptim.config.saved import write_config
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.models.current import Current
from dualoptim.models.launch import start_accelerator
from dualoptim.report import ReportArgs, report
from dualoptim.reporting import ours
from dualoptim.reporting.claim import claim
from dualoptim.reporting.methods import SWEEP_FILES
from dualoptim.reporting.results import RESULT_FILES
from dualoptim.sweep import runs_of, sweep
from dualoptim.unlearn import run

PAIR = "ME+GD_lr0.001"
README = Path(ours.__file__).with_name("README.md")


@pytest.fixture
def args(tiny, tmp_path):
    return UnlearnArgs(
        model=str(tiny), data="demo", learning_rates=(1e-3,), eval=False, max_steps=1, output_dir=str(tmp_path / "out")
    )


def test_all_that_a_task_leaves_stands_in_the_readme():
    said = README.read_text().partition("\n`eval_tofu.py`")[0]
    assert not [name for name in ours._TASK if not re.search(rf"[ /]{re.escape(name.rstrip('*'))}\b", said)]


def files_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(action, args, name):
    """The line of a call that must write nothing, and must name what is in its way."""
    before = files_of(Path(args.output_dir).parent)
    with pytest.raises(InputError) as error:
        action(args)
    assert files_of(Path(args.output_dir).parent) == before
    assert re.fullmatch(
        rf"--output-dir: .*{re.escape(name)} was not written by dualoptim; move it away, or give.*", str(error.value)
    )
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- targets


def test_what_is_there_is_kept_unless_told(args, tmp_path):
    accelerator = start_accelerator(args)
    target, beside = tmp_path / "out" / "eval", tmp_path / "out" / "notes.txt"
    target.mkdir(parents=True)
    (target / "summary.json").write_text("{}")
    write_config(target / "config.yaml", {})
    beside.write_text("mine")
    remedy = "give another folder, or --overwrite to replace it; --resume goes on with what it lacks"
    with pytest.raises(InputError, match=f"--output-dir: .*eval is an earlier result; {remedy}$"):
        claim(args, accelerator, [tmp_path / "out" / "new", target])
    assert (target / "summary.json").exists()
    claim(dataclasses.replace(args, overwrite=True), accelerator, [target, tmp_path / "out" / "a" / "b.json"])
    assert not target.exists()
    assert (tmp_path / "out" / "a").is_dir()  # so that the file can be written
    assert beside.read_text() == "mine"


def test_a_target_below_a_file_or_above_the_model_is_refused(args, tmp_path):
    accelerator = start_accelerator(args)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--output-dir: .*file is a file; give another folder"):
        claim(args, accelerator, [tmp_path / "file" / "task1"])
    (tmp_path / "out" / "model").mkdir(parents=True)
    inside = dataclasses.replace(args, model=str(tmp_path / "out" / "model"), overwrite=True)
    with pytest.raises(InputError, match=r"--output-dir: .*out holds the model or the data of this run"):
        claim(inside, accelerator, [tmp_path / "out"])
    assert (tmp_path / "out" / "model").is_dir()


# ------------------------------------------------------------------------------------------------- what others have written


def text(path, content="mine\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


FOREIGN = {
    "a table of results": lambda out: text(out / "results.csv", "run,score\na,1\n"),
    "a table with a column less": lambda out: text(out / "results.csv", "losses,learning_rate,task\nME+GD,1,1\n"),
    "scores that are none": lambda out: text(
        out / "results.csv", "losses,learning_rate,task,folder,model_utility\na,b,1,c,high\n"
    ),
    "a row too long": lambda out: text(out / "results.csv", "losses,learning_rate,task,folder\na,b,1,c,d\n"),
    "no text": lambda out: (out.mkdir(), (out / "results.csv").write_bytes(b"\xff\xfe\x00losses"))[0],
    "a folder of that name": lambda out: (out / "results.csv").mkdir(parents=True),
    "a text": lambda out: text(out / "results.md", "# What I found\n"),
    "a link to nowhere": lambda out: (out.mkdir(), (out / "results.md").symlink_to("/nowhere"))[0],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_table_of_others_is_found_before_anything_is_computed(args, tmp_path, what):
    FOREIGN[what](tmp_path / "out")
    (name,) = (path.name for path in (tmp_path / "out").iterdir())
    refused(run, dataclasses.replace(args, overwrite=what != "a text"), name)


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": "newest"}])
@pytest.mark.parametrize("file", ["log.jsonl", "notes.txt", "model/weights.bin"])
def test_a_task_folder_of_others_is_neither_replaced_nor_written_to(args, tmp_path, file, flags):
    text(tmp_path / "out" / PAIR / "task1" / file)
    refused(run, dataclasses.replace(args, **flags), "notes.txt" if file == "notes.txt" and "overwrite" in flags else "task1")


def test_an_earlier_result_is_refused_before_a_model_is_loaded(args, tmp_path, monkeypatch):
    (tmp_path / "out" / PAIR / "task1").mkdir(parents=True)
    text(tmp_path / "out" / PAIR / "task1" / "log.jsonl")
    monkeypatch.setattr(Current, "get", lambda *_: pytest.fail("it was loaded"))
    refused(run, args, "task1")


def test_notes_in_a_task_folder_of_ours_are_not_removed_with_it(args, tmp_path):
    run(args)
    notes = tmp_path / "out" / PAIR / "task1" / "notes.txt"
    text(notes)
    refused(run, dataclasses.replace(args, overwrite=True), "notes.txt")
    run(dataclasses.replace(args, resume="newest"))  # which removes nothing
    assert notes.read_text() == "mine\n"
    notes.rename(tmp_path / "notes.txt")
    run(dataclasses.replace(args, overwrite=True))


def test_a_link_in_place_of_a_task_is_not_followed(args, tmp_path):
    run(args)
    task = tmp_path / "out" / PAIR / "task1"
    task.rename(tmp_path / "elsewhere")
    task.symlink_to(tmp_path / "elsewhere")
    refused(run, dataclasses.replace(args, overwrite=True), "task1")


@pytest.mark.parametrize("file", ["tasks.csv", "tasks.md", "tasks.png"])
def test_the_tables_of_a_sequence_are_known(args, tmp_path, file):
    text(tmp_path / "out" / PAIR / file)
    changes = {"eval": True, "eval_rows": 1, "max_new_tokens": 1, "task_list": (1, 2), "overwrite": True}
    refused(run, dataclasses.replace(args, **changes), file)


@pytest.mark.parametrize("file", ["config.yaml", "log.jsonl", "model/config.json", "trackers/mine.txt"])
def test_a_fine_tuning_knows_its_own(tiny, tmp_path, file):
    args = FinetuneArgs(model=str(tiny), data="demo", splits=("forget05",), max_steps=1, output_dir=str(tmp_path / "out"))
    text(tmp_path / "out" / file)
    refused(finetune, dataclasses.replace(args, overwrite=file != "config.yaml"), file.partition("/")[0])
    if file == "config.yaml":
        shutil.rmtree(tmp_path / "out")
        finetune(args)
        finetune(dataclasses.replace(args, overwrite=True))


@pytest.mark.parametrize("file", ["summary.json", "thesis.pdf", "config.yaml"])
def test_an_evaluation_knows_its_own(tiny, tmp_path, file):
    args = EvalArgs(model=str(tiny), data="demo", eval_rows=1, max_new_tokens=1, output_dir=str(tmp_path / "out"))
    text(tmp_path / "out" / "eval" / file, "learning_rate: 1\n")
    overwrite = dataclasses.replace(args, overwrite=True)
    refused(evaluate, overwrite, "eval" if file != "thesis.pdf" else file)
    if file == "config.yaml":
        before = files_of(tmp_path)
        with pytest.raises(
            InputError, match=r"config.yaml is not whole: .*; put back what the run wrote, or move \S+eval away$"
        ):
            evaluate(args)
        assert files_of(tmp_path) == before
        shutil.rmtree(tmp_path / "out")
        evaluate(args)
        evaluate(overwrite)


@pytest.mark.parametrize("file", ["report.md", "report.html", "report/mine.png"])
def test_a_report_knows_its_own(evaluated, tmp_path, file):
    folder, _ = evaluated
    args = ReportArgs(runs=(str(folder),), output_dir=str(tmp_path / "out"))
    text(tmp_path / "out" / file)
    refused(report, args, file.partition("/")[0])
    shutil.rmtree(tmp_path / "out")
    report(args)
    report(args)


# ------------------------------------------------------------------------------------------------------ tables that stay


def test_lines_of_earlier_runs_of_a_folder_stay(args, tmp_path):
    run(args)
    run(dataclasses.replace(args, learning_rates=(2e-3,)))
    # as a spreadsheet saves it
    table = tmp_path / "out" / "results.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    run(dataclasses.replace(args, learning_rates=(3e-3,)))
    assert [line["learning_rate"] for line in csv.DictReader(table.open())] == ["0.001", "0.002", "0.003"]


def test_a_sweep_keeps_the_lines_of_runs_that_are_not_its_own(args, tmp_path):
    run(args)
    swept = SweepArgs(**(dataclasses.asdict(args) | {"seeds": (1, 2)}))
    sweep(swept)
    sweep(dataclasses.replace(swept, seeds=(2, 3)))
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert sorted(line["seed"] for line in lines) == ["", "1", "2", "3"]


# -------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("file", SWEEP_FILES)
def test_a_sweep_over_tables_of_others_is_refused_at_once(args, tmp_path, file):
    text(tmp_path / "out" / file)
    refused(sweep, SweepArgs(**dataclasses.asdict(args)), file)


@pytest.mark.parametrize("file", [*RESULT_FILES, f"{PAIR}/task1/notes.txt"])
def test_what_others_have_in_the_folder_of_a_sweeps_run_stays(args, tmp_path, file):
    swept = SweepArgs(**dataclasses.asdict(args))
    (name,) = runs_of(swept)
    text(tmp_path / "out" / name / file)
    refused(sweep, swept, Path(file).name)


def test_a_sweep_replaces_no_run_that_it_has_not_begun(args, tmp_path):
    swept = SweepArgs(**dataclasses.asdict(args))
    (name,) = runs_of(swept)
    folder = tmp_path / "out" / name
    run(dataclasses.replace(args, output_dir=str(folder)))
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=r"_seed1001 was not begun by a sweep; give another, or --overwrite to replace it"):
        sweep(swept)
    assert files_of(tmp_path) == before
    sweep(dataclasses.replace(swept, overwrite=True))
    (folder / "finished.json").unlink()  # as if it had been interrupted
    sweep(swept)


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', "mine"])
def test_a_finished_json_of_others_is_refused(args, tmp_path, content):
    swept = SweepArgs(**dataclasses.asdict(args))
    (name,) = runs_of(swept)
    text(tmp_path / "out" / name / "finished.json", content)
    with pytest.raises(InputError, match=r"finished.json.*; move it away, and the run is taken again"):
        sweep(swept)
    assert (tmp_path / "out" / name / "finished.json").read_text() == content


def test_a_run_within_a_sweeps_folder_ends_what_the_sweep_has_said_of_it(args, tmp_path):
    swept = SweepArgs(**dataclasses.asdict(args))
    (name,) = runs_of(swept)
    sweep(swept)
    run(dataclasses.replace(args, output_dir=str(tmp_path / "out" / name), overwrite=True, max_steps=2))
    assert not (tmp_path / "out" / name / "finished.json").exists()
