"""A run that is interrupted and resumed ends where an uninterrupted one does, bit for bit. `test_kills.py` kills processes."""

import dataclasses
import re
import shutil

import pytest
import torch
from support import FOLDER, RATE, arguments, launch, records, same_end, state_of, stop_and_resume

from dualoptim import InputError, run


@pytest.fixture(scope="module")
def whole_runs(tiny, tmp_path_factory):
    """The folder of a run with one optimizer in one call, once for all its stops."""
    folders = {}

    def of(optim):
        if optim not in folders:
            folders[optim] = tmp_path_factory.mktemp("whole")
            run(arguments(tiny, folders[optim], optim, save_every=2, max_steps=8))
        return folders[optim]

    return of


OPTIMIZERS = ("dual-adamw", "dual-adamw-plus", "adamw-alternate", "adamw")
STOPS = [(optim, 3) for optim in OPTIMIZERS] + [("dual-adamw", stop) for stop in (4, 7)]  # between checkpoints, and at them
STOPS += [
    pytest.param(optim, stop, marks=pytest.mark.launch, id=f"{optim}-{stop}") for optim in OPTIMIZERS[1:] for stop in (4, 7)
]


@pytest.mark.parametrize(("optim", "stop"), STOPS)
def test_resume_is_exact(tiny, tmp_path, optim, stop, whole_runs):
    stop_and_resume(arguments(tiny, tmp_path, optim, save_every=2, max_steps=8), tmp_path, stop)
    same_end(whole_runs(optim), tmp_path / "parts")


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_every_schedule_goes_on_where_it_stopped(tiny, tmp_path, schedule):
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", lr_schedule=schedule, warmup_steps=4, max_steps=7)
    args = dataclasses.replace(args, save_every=3, forget_strength=2.0)
    run(args)
    stop_and_resume(args, tmp_path, 5)
    same_end(tmp_path / "whole", tmp_path / "parts")
    log = records(tmp_path / "whole")
    base = [2 * RATE if one["phase"] == "forget" else RATE for one in log]  # both phases follow it, each from its own rate
    assert [one["lr"] / rate for one, rate in zip(log, base, strict=True)][:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(("over", "optim"), [("global", "dual-adamw"), ("tensor", "dual-adamw-plus")])
def test_a_projection_goes_on_where_it_stopped(tiny, tmp_path, over, optim):
    """The first step after the stop is a forget step, which reads what retain steps have left in the checkpoint."""
    args = arguments(tiny, tmp_path / "whole", optim, project_forget=over, max_steps=7)
    args = dataclasses.replace(args, save_every=3)
    run(args)
    stop_and_resume(args, tmp_path, 3)
    same_end(tmp_path / "whole", tmp_path / "parts")
    run(dataclasses.replace(args, project_forget="none", output_dir=str(tmp_path / "plain")))
    first, second = records(tmp_path / "whole"), records(tmp_path / "plain")
    assert [one["loss"] for one in first[:4]] == [one["loss"] for one in second[:4]]
    assert first[3]["grad_norm"] < second[3]["grad_norm"], "what went against the retain steps is gone"
    assert first[4]["loss"] != second[4]["loss"]


def test_forget_steps_of_two_passes_go_on_where_they_stopped(tiny, tmp_path):
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", sam_rho=0.05, max_steps=5)
    args = dataclasses.replace(args, save_every=1)
    run(args)
    stop_and_resume(args, tmp_path, 2)
    same_end(tmp_path / "whole", tmp_path / "parts")
    run(dataclasses.replace(args, sam_rho=0.0, output_dir=str(tmp_path / "plain")))
    first, second = records(tmp_path / "whole"), records(tmp_path / "plain")
    assert first[0]["loss"] == second[0]["loss"], "the first pass is that of a plain step"
    assert first[0]["grad_norm"] != second[0]["grad_norm"]


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw-alternate"])
def test_a_mean_of_cycles_goes_on_where_it_stopped(tiny, tmp_path, optim):
    """One cycle has been taken into it, and its weights are not those that train."""
    args = arguments(tiny, tmp_path / "whole", optim, average_cycles=0.5, max_steps=7)
    args = dataclasses.replace(args, save_every=2)
    run(args)
    stop_and_resume(args, tmp_path, 5)
    same_end(tmp_path / "whole", tmp_path / "parts")
    run(dataclasses.replace(args, average_cycles=0.0, output_dir=str(tmp_path / "plain")))
    assert [one["loss"] for one in records(tmp_path / "whole")] == [one["loss"] for one in records(tmp_path / "plain")]
    first, second = (state_of(tmp_path / name / FOLDER / "model") for name in ("whole", "plain"))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_checkpoints_are_pruned_and_unfinished_ones_ignored(tiny, tmp_path):
    args = arguments(tiny, tmp_path, "dual-adamw", save_every=2, keep_checkpoints=2, max_steps=9)
    run(args)
    folder = tmp_path / FOLDER / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["step-6", "step-8"]
    (folder / "unfinished").mkdir()
    trained = run(dataclasses.replace(args, resume="newest")).tasks[0]
    assert len(trained.log) == 9  # finished: nothing is trained again
    further = run(dataclasses.replace(args, resume="newest", max_steps=13)).tasks[0]
    assert further.log[:8] == trained.log[:8]
    whole = run(dataclasses.replace(args, output_dir=str(tmp_path / "whole"), max_steps=13)).tasks[0]
    one, other = state_of(whole.model), state_of(further.model)
    assert all(torch.equal(one[name], other[name]) for name in one)  # more steps of the same run, from its newest checkpoint
    with pytest.raises(InputError, match=r"has taken 12 steps, more than this run would; raise --max-steps"):
        run(dataclasses.replace(args, resume="newest", max_steps=5))


def test_a_run_takes_more_steps_than_its_epochs_have_and_resuming_says_what_that_changes(tiny, tmp_path, capsys):
    few = {"num_epochs": 1, "warmup_epochs": 0, "threads": 1}  # 9 steps an epoch
    whole = run(arguments(tiny, tmp_path / "whole", "dual-adamw", max_steps=11, **few)).tasks[0]
    assert [record["lr"] / RATE for record in whole.log] == pytest.approx([(11 - step) / 11 for step in range(11)])
    assert whole.log[-1]["epoch"] == pytest.approx(11 / 9, abs=1e-4)
    args = arguments(tiny, tmp_path / "parts", "dual-adamw", max_steps=4, save_every=2, **few)
    run(args)
    capsys.readouterr()
    run(dataclasses.replace(args, resume="newest", max_steps=6))
    line = "--resume: 6 steps with this --max-steps, 4 with the one before"
    out = capsys.readouterr().out
    assert f"{line}; the rate goes on over 9 steps as it was\n" in out
    assert "going on after step 4 of 6, from " in out
    longer = run(dataclasses.replace(args, resume="newest", max_steps=11)).tasks[0]
    assert "the rate of steps to come decays over 11 instead of 9, which a run of 11" in capsys.readouterr().out
    assert [record["lr"] for record in longer.log[6:]] == [record["lr"] for record in whole.log[6:]]
    assert longer.log[5]["lr"] < whole.log[5]["lr"]


def test_a_given_checkpoint_is_taken(tiny, tmp_path):
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", save_every=3, keep_checkpoints=9, max_steps=12)
    whole = run(args)
    before = state_of(whole.tasks[0].model)
    (tmp_path / "whole" / FOLDER / "trained.json").unlink()
    again = run(dataclasses.replace(args, resume=str(tmp_path / "whole" / FOLDER / "checkpoint" / "step-3")))
    after = state_of(again.tasks[0].model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_mathematics_is_refused_and_another_place_is_not(tiny, tmp_path):
    args = arguments(tiny, tmp_path, "dual-adamw", save_every=2, max_steps=4)
    run(args)
    resumed = dataclasses.replace(args, resume="newest")
    changed = {"seed": 7, "batch_size": 2, "retain_freq": 3, "forget_coeff": 0.5, "adam_betas": (0.9, 0.99)}
    for field, value in {**changed, "lr_schedule": "cosine", "warmup_steps": 1}.items():
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')} was .* and is .*; give the same value"):
            run(dataclasses.replace(resumed, **{field: value}))
    state = tmp_path / FOLDER / "checkpoint" / "step-4" / "state.json"
    run(dataclasses.replace(resumed, save_every=5, threads=1, eval_batch_size=9))
    state.unlink()
    with pytest.raises(InputError, match="no checkpoint there"):
        run(resumed)


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero1", "zero3", "fsdp2"])
def test_two_processes_in_16_bits_go_on_at_the_same_bits(tiny, tmp_path, config, sixteen_bits):
    """Masters, DualOptim+ with its base, an adapter with dropout, and (ZeRO) states in bytes, which no other launch takes."""
    pytest.importorskip("deepspeed")
    kinds = {
        "plus": {"optim": "dual-adamw-plus"},
        "lora": {"optim": "dual-adamw", "use_lora": True, "lora_dropout": 0.1},
        **({} if config == "fsdp2" else {"bytes": {"optim": "dual-adamw", "optim_bits": 8, "quantize_embeddings": True}}),
    }
    changes = {"max_steps": 5, "save_every": 2, "keep_checkpoints": 2, "batch_size": 2, "gradient_accumulation_steps": 1}
    runs = {name: arguments(tiny, tmp_path / name, **changes, threads=1, **kind) for name, kind in kinds.items()}
    launch(config, {"runs": [dataclasses.asdict(args) for args in runs.values()]}, precision="bf16")

    def left_at_three(name, place):
        """What a run that ends after its third step leaves, and the arguments with which it goes on."""
        task = shutil.copytree(tmp_path / name, tmp_path / place) / FOLDER
        (task / "trained.json").unlink()
        for later in ("checkpoint/step-4", "model"):
            shutil.rmtree(task / later)
        lines = (task / "log.jsonl").read_text().splitlines(keepends=True)
        (task / "log.jsonl").write_text("".join(lines[:3]))
        return dataclasses.replace(runs[name], output_dir=str(tmp_path / place), resume="newest")

    again = [left_at_three(name, f"{name}-parts") for name in kinds]
    launch(config, {"runs": [dataclasses.asdict(args) for args in again]}, precision="bf16")
    for name in kinds:
        same_end(tmp_path / name, tmp_path / f"{name}-parts")
    saved = sum(path.stat().st_size for path in (tmp_path / "lora" / FOLDER / "checkpoint" / "step-4").rglob("*.*"))
    assert saved < (tiny / "model.safetensors").stat().st_size / 2, "a checkpoint holds the frozen weights"
    run(left_at_three("plus", "alone"))
    for one, other in zip(records(tmp_path / "plus"), records(tmp_path / "alone"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)  # of 16 bits, not all of whose sums are alike
    if "bytes" in kinds:
        launches = f"2 processes of ZeRO-{config.removeprefix('zero')}"
        said = f"has optimizer states in bytes, as {launches} cut them, and not one process, or DDP; start {launches}"
        with pytest.raises(InputError, match=re.escape(said)):
            run(left_at_three("bytes", "alone in bytes"))
