"""WMDP in one command: two corpora in turn, each with a direction of its own, and multiple choice offline, on every process."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from support import difference, launch, state_of

from dualoptim import InputError, SweepArgs, preset, run
from dualoptim.memory_plan import dry_run
from dualoptim.report import ReportArgs, report
from dualoptim.sweep import sweep

TASKS = ("wmdp_bio", "wmdp_cyber")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows in the layout of the hub: two forget corpora, WikiText with its empty lines, and questions."""
    import pyarrow
    import pyarrow.parquet

    place = tmp_path_factory.mktemp("wmdp")

    def parquet(name, rows):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{name}-00000-of-00001.parquet")

    bio = [{"title": f"T{n}", "abstract": "A.", "text": f"The strain {n} grows in old wells. " * (n + 1)} for n in range(5)]
    (place / "bio-forget-corpus.jsonl").write_text("\n".join(map(json.dumps, bio)))
    parquet("cyber-forget-corpus/train", [{"text": f"The port {n} was open all night. " * 3} for n in range(6)])
    texts = [{"text": text} for n in range(4) for text in ("", f"The ferry {n} sails past the town. \n")]
    parquet("wikitext-2-raw-v1/test", texts)
    for name in ("bio", "cyber"):
        asked = [{"answer": n % 4, "question": f"Which {name} is {n}?", "choices": list("wxyz")} for n in range(5)]
        parquet(f"cais/wmdp/wmdp-{name}/test", asked)
    return place


def arguments(tiny, folder, out, **changes):
    """The published settings, on a model of three layers."""
    published = preset("wmdp-zephyr", "rmu", model=str(tiny), data=str(folder), output_dir=str(out))
    small = {"layer": 1, "trainable": "layers.(0|1).mlp.down_proj", "max_steps": 4, "batch_size": 2, "lm_eval_tasks": ()}
    small |= {"learning_rates": (1e-3,), "gradient_checkpointing": False}
    if changes.get("eval", True):
        small |= {"max_new_tokens": 8}
    return dataclasses.replace(published, **small | changes)


def test_wmdp_in_one_command(folder, tiny, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    args = arguments(tiny, folder, tmp_path / "out", lm_eval_tasks=TASKS)
    (task,) = run(args).tasks
    assert [record["corpus"] for record in task.log] == ["bio", "cyber"] * 2
    assert {record["phase"] for record in task.log} == {"joint"}
    for record in task.log:
        assert record["loss"] == pytest.approx(record["forget_loss"] + 1200 * record["retain_loss"], rel=1e-6)
    assert [record["retain_loss"] for record in task.log[:1]] == [0], "nothing has changed before the first step"
    assert task.log[2]["forget_loss"] < task.log[0]["forget_loss"]
    before, after = state_of(tiny), state_of(task.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}
    assert task.after.rows == {"forget": 11, "retain": 4, "forget_bio": 5, "forget_cyber": 6}
    scores = task.after.benchmark.scores
    assert scores == {name: task.after.general[name]["acc"] for name in TASKS}
    assert all(score * 5 == round(score * 5) for score in scores.values())
    assert task.after.skipped["wmdp.mmlu"] == "needs mmlu; give --lm-eval-tasks mmlu"
    (line,) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert float(line["benchmark_wmdp_bio"]) == scores["wmdp_bio"]
    page = (report(ReportArgs(runs=(str(tmp_path / "out"),))) / "report.md").read_text()
    assert "WMDP-Bio accuracy (four choices)" in page
    assert "0.312" in page
    assert "task 1 of wmdp: 5 rows of bio-forget-corpus.jsonl, 6 rows of cyber-forget-corpus.jsonl" in capsys.readouterr().out


def test_a_run_of_two_corpora_goes_on_at_the_same_bits(folder, tiny, tmp_path):
    whole = arguments(tiny, folder, tmp_path / "whole", eval=False, forget_losses=("ARMU-once+EMBEDQ",), max_steps=5)
    part = dataclasses.replace(whole, output_dir=str(tmp_path / "part"))
    (one,) = run(whole).tasks
    run(dataclasses.replace(part, save_every=3, max_steps=3))
    (two,) = run(dataclasses.replace(part, resume="newest")).tasks
    assert [record["loss"] for record in two.log] == [record["loss"] for record in one.log]
    assert difference(state_of(one.model), state_of(two.model))[0] == 0


def test_every_way_to_forget_takes_the_corpora_in_turn(folder, tiny, tmp_path, capsys):
    args = arguments(
        tiny, folder, tmp_path / "dry", eval=False, optim="dual-adamw", forget_losses=("ARMU+EMBEDQ", "GA+GD"), retain_freq=2
    )
    dry_run(args)
    assert "a micro-batch has at most" in capsys.readouterr().out
    out = tmp_path / "sweep"
    sweep(SweepArgs(**vars(args) | {"beta": None, "regularization_coeff": 1.0, "max_steps": 6, "output_dir": str(out)}))
    for path in out.rglob("log.jsonl"):
        log = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(record["phase"], record["corpus"]) for record in log] == [
            (phase, corpus) for corpus in ("bio", "cyber") for phase in ("forget", "retain", "retain")
        ]
        assert all(math.isfinite(record["loss"]) for record in log)
    assert len(list(out.rglob("log.jsonl"))) == 2


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero3", pytest.param("ddp", marks=pytest.mark.campaign)])
def test_two_processes_end_at_the_weights_and_the_choices_of_one(config, folder, tiny, tmp_path):
    """A divided model answers lm-eval as a whole one does."""
    pytest.importorskip("lm_eval")
    if config == "zero3":
        pytest.importorskip("deepspeed")
    sharded = {"evaluate_sharded": "yes"} if config == "zero3" else {}
    args = arguments(tiny, folder, tmp_path / "one", lm_eval_tasks=TASKS, eval_rows=3, threads=1, max_steps=3)
    two = dataclasses.replace(args, batch_size=1, output_dir=str(tmp_path / "two"), **sharded)
    (task,) = run(args).tasks
    launch(config, {"runs": [dataclasses.asdict(two)]})
    other = tmp_path / "two" / task.folder.relative_to(tmp_path / "one")
    log = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    for ours, theirs in zip(log, task.log, strict=True):
        assert (ours["corpus"], ours["count"]) == (theirs["corpus"], theirs["count"])
        assert [ours["loss"], ours["forget_loss"]] == pytest.approx([theirs["loss"], theirs["forget_loss"]], rel=3e-5)
    # near the frozen model the gradient of what is kept is rounding, which Adam makes a share of the rate for a few weights
    assert difference(state_of(other / "model"), state_of(task.model))[1] <= 1e-3 * args.learning_rates[0]
    found = json.loads((other / "eval" / "summary.json").read_text())
    assert found["general"] == task.after.general
    assert len(task.after.general) == 2


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [
        ("bio-forget-corpus.jsonl", {}, "has no bio-forget-corpus.jsonl. Put into it bio-forget-corpus.jsonl"),
        (
            "cais",
            {"lm_eval_tasks": TASKS},
            "--lm-eval-tasks wmdp_bio wmdp_cyber: the data set cais/wmdp wmdp-bio cannot be loaded",
        ),
    ],
)
def test_what_is_missing_is_named_before_anything_is_written(folder, tiny, tmp_path, missing, changes, message):
    if changes:
        pytest.importorskip("lm_eval")
    part = tmp_path / "part"
    part.mkdir()
    for path in folder.iterdir():
        if path.name != missing:
            (part / path.name).symlink_to(path)
    with pytest.raises(InputError) as error:
        run(arguments(tiny, part, tmp_path / "out", **changes))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    if changes:
        assert f"put it into {part}/cais/wmdp/wmdp-bio/test.parquet" in str(error.value)
