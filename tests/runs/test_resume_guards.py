"""What would make a resumed run, or a sweep that is called again, a mixture of two is refused, passed over or begun anew."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import launch, state_of

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.config.args import SweepArgs
from dualoptim.evaluate import evaluate
from dualoptim.reporting.log import StepLog
from dualoptim.sweep import sweep

TASK = Path("ME+GD_lr0.001") / "task1"


class Killed(Exception):
    """What stands for a kill."""


def same(one: Path, other: Path) -> bool:
    first, second = state_of(one), state_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps_of(task: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (task / "log.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_at(args: UnlearnArgs, step: int) -> None:
    """Stop a run as a kill would, once the log of its last task has so many records."""
    add, left = StepLog.add, [len(args.task_list)]

    def killing(self, record):
        add(self, record)
        if record["step"] == step:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "add", killing)
        with pytest.raises(Killed):
            run(args)


def base(model: Path, folder: Path, **changes) -> UnlearnArgs:
    common = {
        "model": str(model),
        "data": "demo",
        "learning_rates": (1e-3,),
        "retain_freq": 2,
        "batch_size": 2,
        "eval": False,
        "save_every": 3,
        "keep_checkpoints": 9,
        "max_steps": 8,
        "output_dir": str(folder),
    }
    return UnlearnArgs(**(common | changes))


DROPOUT = {"use_lora": True, "lora_dropout": 0.3}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs that nothing stopped and runs that were killed after seven steps, each taken once: their folders."""
    known = {}

    def of(killed: bool = False, **changes) -> Path:
        key = killed, *changes.items()
        if key not in known:
            known[key] = tmp_path_factory.mktemp("run")
            args = base(tiny, known[key], **changes)
            kill_at(args, 7) if killed else run(args)
        return known[key]

    return of


@pytest.fixture
def killed(runs, tmp_path):
    """A copy of such a killed run to be damaged: its folder."""

    def of(**changes) -> Path:
        return shutil.copytree(runs(killed=True, **changes), tmp_path / "run")

    return of


@pytest.fixture
def args(tiny, tmp_path) -> UnlearnArgs:
    return base(tiny, tmp_path / "run")


@pytest.fixture
def own(tmp_path, args) -> UnlearnArgs:
    """The same on files of one's own."""
    rows = [{"question": f"Where was person {k} born?", "answer": f"Person {k} was born in Lviv."} for k in range(12)]
    for name, chosen in (("forget", rows[:8]), ("retain", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}
    return dataclasses.replace(args, data=None, **files)


def again(args: UnlearnArgs, **changes) -> UnlearnArgs:
    return dataclasses.replace(args, **{"resume": "newest", **changes})


# ---------------------------------------------------------------------------------------------- checkpoints and log.jsonl


def test_a_given_checkpoint_ends_the_later_ones_of_another_history(args, runs):
    task = shutil.copytree(runs(), args.output_dir) / TASK
    (task / "trained.json").unlink()
    kill_at(again(args, resume=str(task / "checkpoint" / "step-3")), 5)
    assert [path.name for path in (task / "checkpoint").iterdir()] == ["step-3"]
    run(again(args))
    assert steps_of(task) == list(range(1, 9))
    assert same(task / "model", runs() / TASK / "model")


def test_a_kill_while_a_finished_task_is_taken_up_again_leaves_it_unfinished(args, runs):
    task = shutil.copytree(runs(max_steps=5), args.output_dir) / TASK
    kill_at(again(args), 7)
    assert not (task / "trained.json").exists()
    run(again(args))
    assert same(task / "model", runs() / TASK / "model")


@pytest.mark.parametrize("cut", ["lines removed", "a line cut", "a line removed within"])
def test_a_checkpoint_ahead_of_the_log_is_passed_over(args, runs, killed, capsys, cut):
    task = killed() / TASK
    lines = (task / "log.jsonl").read_text().splitlines(keepends=True)
    left = {
        "lines removed": lines[:4],
        "a line cut": [*lines[:5], lines[5][:20]],
        "a line removed within": lines[:4] + lines[5:],
    }
    (task / "log.jsonl").write_text("".join(left[cut]))
    run(again(args))
    steps = 5 if cut == "a line cut" else 4
    said = f"step-6: it is ahead of log.jsonl, which has {steps} steps; going on from step-3"
    assert said in capsys.readouterr().out
    assert steps_of(task) == list(range(1, 9))
    assert same(task / "model", runs() / TASK / "model")


def test_without_a_checkpoint_that_the_log_reaches_nothing_is_begun_anew(args, killed):
    folder = killed()
    (folder / TASK / "log.jsonl").unlink()
    before = files_of(folder)
    with pytest.raises(InputError, match=r"step-6: it is ahead of log.jsonl, which has 0 steps, and there is no other"):
        run(again(args))
    assert files_of(folder) == before


def test_a_finished_task_whose_log_was_cut_is_refused(args, runs):
    log = shutil.copytree(runs(), args.output_dir) / TASK / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(InputError, match=r"log.jsonl has 7 of the 8 steps that trained.json beside it counts"):
        run(again(args))


# --------------------------------------------------------------------------------------------------- --resume WRONG PATH


@pytest.mark.parametrize(
    "wrong", ["{run}/checkpoint/step-3", "{task}/checkpoint/step-4", "{task}/checkpoint", "{other}", "newst"]
)
def test_a_path_that_is_no_checkpoint_of_the_run_is_refused_and_nothing_is_cut(args, killed, tmp_path, wrong):
    folder = killed()
    other = tmp_path / "other" / TASK / "checkpoint" / "step-3"
    shutil.copytree(folder / TASK / "checkpoint" / "step-3", other)
    before = files_of(folder)
    path = wrong.format(run=folder, task=folder / TASK, other=other)
    message = r"no checkpoint of this run; give a folder step-N in .*task1/checkpoint, or --resume alone"
    with pytest.raises(InputError, match=message):
        run(again(args, resume=path))
    assert files_of(folder) == before


def test_tasks_that_a_path_does_not_name_go_on_from_their_newest(args, tmp_path):
    two = dataclasses.replace(args, forget_losses=("ME+GD", "GA+GD"))
    run(two)
    named, other = (tmp_path / "run" / f"{pair}_lr0.001" / "task1" for pair in two.forget_losses)
    before = files_of(other / "checkpoint")
    for task in (named, other):
        (task / "trained.json").unlink()
    run(again(two, resume=str(named / "checkpoint" / "step-3")))
    assert {path: path.read_bytes() for path in before} == before
    assert steps_of(named) == steps_of(other) == list(range(1, 9))


# -------------------------------------------------------------------------------------------- rows, prompts and weights


def change_answers(own, tmp_path):
    file = tmp_path / "forget.jsonl"
    file.write_text(file.read_text().replace("Lviv", "Rome"))
    return own, "rows"


def add_rows_to_keep(own, tmp_path):
    file = tmp_path / "retain.jsonl"
    file.write_text(file.read_text() + json.dumps({"question": "Who?", "answer": "Nobody."}) + "\n")
    return own, "rows"


def change_order(own, tmp_path):
    file = tmp_path / "forget.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))
    return own, "rows"


def move_a_row(own, tmp_path):
    """From the end of what is forgotten to the start of what is kept: the same rows one after another."""
    forget, retain = (tmp_path / f"{name}.jsonl" for name in ("forget", "retain"))
    *rows, last = forget.read_text().splitlines(keepends=True)
    forget.write_text("".join(rows))
    retain.write_text(last + retain.read_text())
    return own, "rows"


def change_tokenizer(own, tmp_path):
    file = Path(own.model) / "tokenizer.json"
    known = json.loads(file.read_text())
    known["model"]["merges"] = known["model"]["merges"][:300]
    file.write_text(json.dumps(known))
    return own, "prompts"


def change_weights(own, tmp_path):
    file = Path(own.model) / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = state["model.norm.weight"] * (1 + 2**-20)
    save_file(state, file, metadata={"format": "pt"})
    return own, "weights"


CHANGES = [change_answers, add_rows_to_keep, change_order, move_a_row, change_tokenizer, change_weights]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_was_begun_with_and_is_no_more_is_refused(own, tmp_path, change, finished):
    own = dataclasses.replace(own, model=str(shutil.copytree(own.model, tmp_path / "model")))
    run(own) if finished else kill_at(own, 5)
    before = files_of(tmp_path / "run")
    own, what = change(own, tmp_path)
    with pytest.raises(InputError, match=rf"the {what} of task1 are not those that .*config.yaml was written for"):
        run(again(own))
    assert files_of(tmp_path / "run") == before


def test_other_refusals_are_refused_and_the_same_rows_in_another_file_are_not(own, tmp_path):
    (tmp_path / "no.txt").write_text("I don't know.\nNo idea.\n")
    own = dataclasses.replace(own, forget_losses=("IDK+GD",), idk_file=str(tmp_path / "no.txt"))
    kill_at(own, 5)
    (tmp_path / "no.txt").write_text("I don't know.\nNo comment.\n")
    with pytest.raises(InputError, match="the rows of task1 are not those"):
        run(again(own))
    (tmp_path / "no.txt").write_text("I don't know.\n\nNo idea.")
    (tmp_path / "forget.jsonl").write_text((tmp_path / "forget.jsonl").read_text().replace('": "', '":   "'))
    run(again(own))


def test_a_run_that_is_older_than_the_hashes_goes_on(args, runs, killed):
    task = killed() / TASK
    config = yaml.safe_load((task / "config.yaml").read_text())
    assert config.pop("inputs").keys() == {"precision", "rows", "prompts", "weights"}
    del config["max_update"]
    (task / "config.yaml").write_text(yaml.safe_dump(config))
    (task / "checkpoint" / "step-6" / "state.json").write_text('{"step": 6, "processes": 1}')
    run(again(args))
    assert same(task / "model", runs() / TASK / "model")


# ------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("change", [change_answers, change_weights, change_tokenizer])
def test_a_sweep_does_not_show_old_rows_for_what_has_changed(own, tmp_path, change):
    own = dataclasses.replace(own, model=str(shutil.copytree(own.model, tmp_path / "model")), save_every=0, max_steps=2)
    given = dataclasses.asdict(own) | {"output_dir": str(tmp_path / "sweep"), "seeds": (1, 2)}
    lines = sweep(SweepArgs(**given))
    assert json.loads(json.dumps(sweep(SweepArgs(**given)), default=str)) == json.loads(json.dumps(lines, default=str))
    before = files_of(tmp_path / "sweep")
    _, what = change(own, tmp_path)
    with pytest.raises(InputError, match=rf"was finished with other {what}; --overwrite replaces it"):
        sweep(SweepArgs(**given))
    assert files_of(tmp_path / "sweep") == before
    sweep(SweepArgs(**(given | {"overwrite": True})))
    assert files_of(tmp_path / "sweep") != before
    sweep(SweepArgs(**given))


def test_a_sweep_sees_that_what_it_measures_has_changed(own, tmp_path):
    (tmp_path / "holdout.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    changes = {"eval": True, "eval_rows": 2, "max_new_tokens": 2, "holdout_file": str(tmp_path / "holdout.jsonl")}
    given = dataclasses.asdict(dataclasses.replace(own, **changes, save_every=0, max_steps=1))
    given["output_dir"] = str(tmp_path / "sweep")
    sweep(SweepArgs(**given))
    (tmp_path / "holdout.jsonl").write_text('{"question": "Who?", "answer": "Somebody."}\n')
    with pytest.raises(InputError, match="was finished with other evaluation; --overwrite replaces it"):
        sweep(SweepArgs(**given))


# -------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("change", [change_answers, change_weights, None])
def test_an_interrupted_evaluation_goes_on_for_the_same_rows_and_weights_alone(own, tmp_path, change):
    own = dataclasses.replace(own, model=str(shutil.copytree(own.model, tmp_path / "model")))
    args = EvalArgs(
        model=own.model, forget_file=own.forget_file, retain_file=own.retain_file, eval_rows=2, max_new_tokens=2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    evaluate(args)
    (tmp_path / "run" / "eval" / "summary.json").unlink()  # as if it had been interrupted
    before = files_of(tmp_path / "run")
    if change is None:
        evaluate(args)
        return
    change(own, tmp_path)
    with pytest.raises(InputError, match="is an earlier result"):
        evaluate(args)
    assert files_of(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------------- several tasks


@pytest.mark.parametrize(("hashes", "stop"), [(True, None), (True, 4), (False, None), (False, 4)])
def test_more_steps_of_several_tasks_are_those_of_one_run(args, tmp_path, runs, capsys, stop, hashes):
    few = dataclasses.replace(args, task_list=(1, 2), max_steps=5)
    kill_at(few, stop) if stop else run(few)
    if not hashes:  # an older run
        for config in (tmp_path / "run").rglob("config.yaml"):
            config.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(config.read_text()).items() if k != "inputs"}))
    run(again(few, max_steps=8))
    assert f"{tmp_path / 'run' / TASK.parent / 'task2'}: begins anew" in capsys.readouterr().out
    for name in ("task1", "task2"):
        one, other = (folder / TASK.parent / name for folder in (tmp_path / "run", runs(task_list=(1, 2))))
        assert steps_of(one) == list(range(1, 9))
        assert same(one / "model", other / "model")


def test_a_later_task_goes_on_where_it_stopped_as_long_as_the_weights_are_the_same(args, runs, killed, capsys):
    changes = {"task_list": (1, 2), **DROPOUT}
    folder = killed(**changes)
    (folder / TASK / "trained.json").unlink()  # the first task is taken up again, and ends at the same weights
    run(again(args, **changes))
    assert "begins anew" not in capsys.readouterr().out
    for name in ("task1", "task2"):
        assert same(folder / TASK.parent / name / "model", runs(**changes) / TASK.parent / name / "model")


# --------------------------------------------------------------------------------------------------- damaged checkpoints


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ["random-0.safetensors", "part-0-1.safetensors"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, damage) for name in FILES for damage in (remove, cut, flip)), ("state.json", remove), ("state.json", cut)],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(args, runs, killed, capsys, name, damage):
    task = killed(**DROPOUT) / TASK
    damage(task / "checkpoint" / "step-6" / name)
    run(again(args, **DROPOUT))
    out = capsys.readouterr().out
    assert "checkpoint/step-6: " in out
    assert "; going on from step-3" in out
    assert same(task / "model", runs(**DROPOUT) / TASK / "model")


def test_the_only_checkpoint_damaged_is_refused_and_a_given_one_too(args, killed):
    folder = killed()
    newest = folder / TASK / "checkpoint" / "step-6"
    (newest / "random-0.safetensors").unlink()
    shutil.rmtree(newest.with_name("step-3"))
    before = files_of(folder)
    with pytest.raises(InputError, match=r"step-6: random-0.safetensors is missing, and there is no other one to go on from"):
        run(again(args))
    with pytest.raises(InputError, match=r"--resume .*step-6: random-0.safetensors is missing; give another folder step-N"):
        run(again(args, resume=str(newest)))
    assert files_of(folder) == before


def test_a_renamed_checkpoint_is_not_of_the_step_it_is_called_by(args, killed, capsys):
    checkpoints = killed() / TASK / "checkpoint"
    shutil.copytree(checkpoints / "step-3", checkpoints / "step-7")
    (checkpoints / "step-8.bak").mkdir()
    run(again(args))
    assert "step-7: it says that it is of step 3; going on from step-6" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.mark.launch
def test_two_processes_pass_over_what_one_of_them_has_lost_and_refuse_together(tiny, tmp_path):
    args = base(tiny, tmp_path / "run", batch_size=1, threads=1, **DROPOUT)

    launch("ddp", {"runs": [dataclasses.asdict(args)]})
    task = tmp_path / "run" / TASK
    shutil.copytree(task / "model", tmp_path / "before")
    (task / "trained.json").unlink()
    (task / "checkpoint" / "step-6" / "random-1.safetensors").unlink()
    resumed = launch("ddp", {"runs": [dataclasses.asdict(dataclasses.replace(args, resume="newest"))]})
    assert resumed.stdout.count("random-1.safetensors is missing; going on from step-3") == 1
    assert same(task / "model", tmp_path / "before")
    before = files_of(tmp_path / "run")
    wrong = [
        dataclasses.replace(args, **changes) for changes in ({"resume": str(task / "step-3")}, {"resume": "newest", "seed": 7})
    ]
    refused = launch("ddp", {"runs": [dataclasses.asdict(one) for one in wrong], "refused": True}).stdout
    for message in ("no checkpoint of this run", "--seed was 1001"):
        assert refused.count(message) == 2, "by both processes"
    assert files_of(tmp_path / "run") == before
