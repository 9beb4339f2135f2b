"""The product as a user meets it: the demo, the command lines, the folder that is left, and `run` from Python."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs, FinetuneArgs, UnlearnArgs, run
from dualoptim.config.saved import load_yaml
from dualoptim.data.prompts import TEMPLATES, Tags, choose_template
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune

# ------------------------------------------------------------------------------------------------------------- the demo


def test_the_demo_forgets_one_author_and_keeps_the_rest(demo_run):
    (task,) = demo_run.tasks
    before, after = task.before["sets"], task.after["sets"]
    assert before["forget"]["probability"] > 0.9
    assert before["forget"]["rouge_l_recall"] > 0.9
    assert after["forget"]["probability"] < 0.1
    assert after["forget"]["rouge_l_recall"] < 0.3
    assert after["retain"]["probability"] > before["retain"]["probability"] - 0.05
    assert after["retain"]["rouge_l_recall"] > before["retain"]["rouge_l_recall"] - 0.05
    for name in ("real_authors", "world_facts"):
        assert after[name]["rouge_l_recall"] > before[name]["rouge_l_recall"] - 0.2
    assert task.after["model_utility"] > task.before["model_utility"] - 0.1
    assert task.after["untargeted_forget_efficacy"] > task.before["untargeted_forget_efficacy"] + 0.4


def test_the_demo_leaves_the_folder_that_the_readme_describes(demo_run):
    files = {str(path.relative_to(demo_run.folder)) for path in demo_run.folder.rglob("*") if path.is_file()}
    task = "ME+GD_lr0.00015/task1"
    sets = ("forget", "retain", "real_authors", "world_facts", "holdout")
    expected = {"results.csv", "results.md", f"{task}/config.yaml", f"{task}/log.jsonl", f"{task}/trained.json"}
    expected |= {f"{task}/{folder}/{name}.jsonl" for folder in ("eval_before", "eval") for name in sets}
    expected |= {f"{task}/{folder}/{name}.json" for folder in ("eval_before", "eval") for name in ("summary", "finished")}
    expected |= {f"{task}/{folder}/TOFU_{name}.json" for folder in ("eval_before", "eval") for name in ("EVAL", "SUMMARY")}
    models = (
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "prompt.json",
    )
    expected |= {f"{folder}/{name}" for folder in (f"{task}/model", "demo_model") for name in models}
    assert files == expected


def test_the_result_and_the_files_agree(demo_run):
    (task,) = demo_run.tasks
    assert json.loads((task.folder / "eval" / "summary.json").read_text()) == task.after
    assert json.loads((task.folder / "eval_before" / "summary.json").read_text()) == task.before
    assert [json.loads(line) for line in (task.folder / "log.jsonl").read_text().splitlines()] == task.log
    assert len(task.log) == 5 * 5 * 6  # epochs x forget steps x cycle
    (row,) = csv.DictReader((demo_run.folder / "results.csv").open())
    assert (row["losses"], row["learning_rate"], row["task"]) == ("ME+GD", "0.00015", "1")
    assert float(row["forget_probability"]) == task.after["sets"]["forget"]["probability"]
    assert float(row["before_model_utility"]) == task.before["model_utility"]
    assert "ME+GD" in (demo_run.folder / "results.md").read_text()


def test_the_saved_model_loads_and_answers(demo_run):
    (task,) = demo_run.tasks
    model, tokenizer = AutoModelForCausalLM.from_pretrained(task.model), AutoTokenizer.from_pretrained(task.model)
    row = json.loads((task.folder / "eval" / "retain.jsonl").read_text().splitlines()[0])
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(generated, skip_special_tokens=True).strip() == row["generated"]
    card = (task.model / "README.md").read_text()
    assert "task 1 of forget05" in card
    assert "learning_rates" in card


def test_config_yaml_repeats_the_run(demo_run, tmp_path):
    """It names the taught model, so a second run starts from the same weights and ends at the same."""
    (task,) = demo_run.tasks
    args = load_yaml(task.folder / "config.yaml", UnlearnArgs)
    assert args.model == str(demo_run.folder / "demo_model")
    again = run(dataclasses.replace(args, output_dir=str(tmp_path), eval=False))
    first, second = state_of(task.model), state_of(again.tasks[0].model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_eval_tofu_repeats_the_evaluation_of_the_run(demo_run, tmp_path):
    (task,) = demo_run.tasks
    summary = evaluate(EvalArgs(model=str(task.model), data="demo", output_dir=str(tmp_path)))
    assert summary == task.after


# ------------------------------------------------------------------------------------------------------ several in one call


def test_losses_rates_and_tasks(taught, tmp_path):
    args = UnlearnArgs(
        model=str(taught),
        data="demo",
        forget_losses=("GA+GD", "IDK+AP"),
        learning_rates=(1e-4, 2e-4),
        task_list=(2, 1),
        max_steps=3,
        eval_rows=1,
        max_new_tokens=2,
        output_dir=str(tmp_path),
    )
    result = run(args)
    order = [(t.losses, t.learning_rate, t.task) for t in result.tasks]
    assert order == [(loss, rate, task) for loss in args.forget_losses for rate in args.learning_rates for task in (2, 1)]
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 8
    # pairs and rates start from the given weights, tasks from the weights that the last one left
    assert len({json.dumps(dict(t.before)) for t in result.tasks if t.task == 2}) == 1
    assert len({json.dumps(dict(t.before)) for t in result.tasks if t.task == 1}) == 4
    for t in result.tasks:
        assert json.loads((t.folder / "eval_before" / "summary.json").read_text()) == t.before
    # a later call into the same folder adds its rows to the table
    run(dataclasses.replace(args, forget_losses=("ME+AP",), learning_rates=(1e-4,), task_list=(3,)))
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["losses"] for row in table] == ["GA+GD"] * 4 + ["IDK+AP"] * 4 + ["ME+AP"]
    alone = run(
        dataclasses.replace(args, forget_losses=("IDK+AP",), learning_rates=(2e-4,), output_dir=str(tmp_path / "alone"))
    )
    first, second = state_of(result.tasks[-1].model), state_of(alone.tasks[-1].model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_earlier_result_is_kept_unless_told(small_args):
    from dualoptim import InputError

    result = run(small_args)
    with pytest.raises(InputError, match="is an earlier result"):
        run(small_args)
    stale = result.tasks[0].folder / "model" / "stale"
    stale.write_text("x")
    run(dataclasses.replace(small_args, overwrite=True))
    assert not stale.exists()


def test_without_a_place_a_run_is_named_by_its_time(small_args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(dataclasses.replace(small_args, output_dir=None, max_steps=1))
    assert result.folder.parent == Path("runs")
    assert (tmp_path / result.folder / "results.md").is_file()


def test_a_model_remembers_its_template(taught, tmp_path):
    """Saved under another name, a model is asked as it was taught, whatever `auto` would say of the name."""
    args = UnlearnArgs(
        model=str(taught), data="demo", template="llama2", answer_tag="=", eval=False, max_steps=1, output_dir=str(tmp_path)
    )
    saved = run(args).tasks[0].model
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert choose_template(EvalArgs(model=str(saved), data="demo"), tokenizer) == ("llama2", Tags("[INST] ", " [/INST]", "="))
    assert choose_template(EvalArgs(model=str(saved), data="demo", template="qa"), tokenizer) == ("qa", TEMPLATES["qa"])
    written = load_yaml(tmp_path / "ME+GD_lr1e-05" / "task1" / "config.yaml", UnlearnArgs)
    assert (written.template, written.question_start_tag, written.answer_tag) == ("llama2", "[INST] ", "=")
    assert (written.forget_lr, written.learning_rates) == (pytest.approx(3e-5), (1e-5,))


# ------------------------------------------------------------------------------------------------------- command lines


def launch(*command, cwd):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_accelerate_launch_prints_the_table(taught, tmp_path):
    flags = f"--model {taught} --data demo --max-steps 2 --eval-rows 3 --learning-rates 5e-4 --output-dir out".split()
    done = launch("accelerate", "launch", ROOT / "train_unlearn.py", *flags, cwd=tmp_path)
    assert "| forget set (should fall): probability of the true answer" in done.stdout
    assert "before:" in done.stdout
    assert (tmp_path / "out" / "ME+GD_lr0.0005" / "task1" / "eval" / "summary.json").is_file()


@pytest.mark.launch
def test_accelerate_launch_evaluates(taught, tmp_path):
    flags = f"--model {taught} --data demo --eval-rows 3 --output-dir out".split()
    done = launch("accelerate", "launch", ROOT / "eval_tofu.py", *flags, cwd=tmp_path)
    assert "model utility" in done.stdout
    assert json.loads((tmp_path / "out" / "eval" / "summary.json").read_text())["rows"]["forget"] == 3


def test_finetune_from_the_command_line(tiny, tmp_path):
    flags = f"--model {tiny} --data demo --splits retain50 --max-steps 2 --output-dir out".split()
    done = launch(sys.executable, "-m", "dualoptim.finetune", *flags, cwd=tmp_path)
    assert "RuntimeWarning" not in done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_finetune_teaches_and_stops_when_it_knows(tiny, tmp_path, capsys):
    args = FinetuneArgs(
        model=str(tiny),
        data="demo",
        splits=("forget05",),
        tasks=(1, 2),
        learning_rate=3e-3,
        num_epochs=60,
        batch_size=20,
        target_loss=0.3,
        output_dir=str(tmp_path),
    )
    result = finetune(args)
    last_epoch = result.log[-2:]  # 40 rows, 20 a step
    mean = sum(r["loss"] * r["count"] for r in last_epoch) / sum(r["count"] for r in last_epoch)
    assert mean < 0.3 < result.log[-4]["loss"] + 0.1
    assert len(result.log) % 2 == 0
    assert len(result.log) < 120
    assert {record["phase"] for record in result.log} == {"learn"}
    *_, begins, ends = capsys.readouterr().out.splitlines()
    assert begins == f"loading {tiny}"
    assert (
        ends
        == f"{len(result.log)} steps, loss {result.log[0]['loss']:.3g} → {result.log[-1]['loss']:.3g}; model: {result.model}"
    )


def test_trackers_follow_every_step_and_score(small_args, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = dataclasses.replace(
        small_args, log_with=("tensorboard",), eval=True, eval_rows=2, max_new_tokens=4, task_list=(1, 2)
    )
    for task in run(args).tasks:
        events = EventAccumulator(str(task.folder / "trackers" / "dualoptim"))
        events.Reload()
        for phase in ("forget", "retain"):
            steps = [record for record in task.log if record["phase"] == phase]
            for name in ("loss", "lr", "grad_norm"):
                points = [(event.step, event.value) for event in events.Scalars(f"{phase}/{name}")]
                assert points == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in steps]
        points = [(event.step, event.value) for event in events.Scalars("eval/forget/probability")]
        scores = [summary["sets"]["forget"]["probability"] for summary in (task.before, task.after)]
        assert points == [(0, pytest.approx(scores[0])), (len(task.log), pytest.approx(scores[1]))]


def test_nothing_is_tracked_by_default(demo_run):
    assert not list(demo_run.folder.rglob("trackers"))


def test_a_constant_of_one_pair_is_left_out_of_the_others(small_args):
    args = dataclasses.replace(small_args, forget_losses=("NPO+GD", "ME+GD"), beta=0.2, fix_ref_model=True, max_steps=1)
    run(args)
    for losses, beta, fixed in (("NPO+GD", 0.2, True), ("ME+GD", None, False)):
        path = Path(args.output_dir) / f"{losses}_lr0.0005" / "task1" / "config.yaml"
        config = load_yaml(path, UnlearnArgs)  # repeats this pair alone
        assert (config.forget_losses, config.beta, config.fix_ref_model) == ((losses,), beta, fixed)
