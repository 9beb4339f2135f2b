"""A run that is interrupted and resumed ends where an uninterrupted one does, bit for bit. `test_kills.py` kills processes."""

import dataclasses
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
            run(arguments(tiny, folders[optim], optim, save_every=3, max_steps=15))
        return folders[optim]

    return of


OPTIMIZERS = ("dual-adamw", "dual-adamw-plus", "adamw-alternate", "adamw")
STOPS = [(optim, 5) for optim in OPTIMIZERS] + [("dual-adamw", stop) for stop in (6, 11)]  # between checkpoints, and at them
STOPS += [
    pytest.param(optim, stop, marks=pytest.mark.launch, id=f"{optim}-{stop}") for optim in OPTIMIZERS[1:] for stop in (6, 11)
]


@pytest.mark.parametrize(("optim", "stop"), STOPS)
def test_resume_is_exact(tiny, tmp_path, optim, stop, whole_runs):
    stop_and_resume(arguments(tiny, tmp_path, optim, save_every=3, max_steps=15), tmp_path, stop)
    same_end(whole_runs(optim), tmp_path / "parts")


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_every_schedule_goes_on_where_it_stopped(tiny, tmp_path, schedule):
    args = arguments(tiny, tmp_path / "whole", "dual-adamw", lr_schedule=schedule, warmup_steps=4, max_steps=7)
    args = dataclasses.replace(args, save_every=3, forget_lr=2 * RATE)
    run(args)
    stop_and_resume(args, tmp_path, 5)
    same_end(tmp_path / "whole", tmp_path / "parts")
    log = records(tmp_path / "whole")
    base = [2 * RATE if one["phase"] == "forget" else RATE for one in log]  # both phases follow it, each from its own rate
    assert [one["lr"] / rate for one, rate in zip(log, base, strict=True)][:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


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
def test_two_processes_in_16_bits_go_on_at_the_same_bits(tiny, tmp_path, config):
    """Masters, DualOptim+ with its base, an adapter with dropout, and (ZeRO) states in bytes, which no other launch takes."""
    pytest.importorskip("deepspeed")
    kinds = {
        "plus": {"optim": "dual-adamw-plus"},
        "lora": {"optim": "dual-adamw", "use_lora": True, "lora_dropout": 0.1},
        **({} if config == "fsdp2" else {"bytes": {"optim": "dual-adamw", "optim_bits": 8, "quantize_embeddings": True}}),
    }
    changes = {"max_steps": 5, "save_every": 2, "batch_size": 2, "gradient_accumulation_steps": 1, "threads": 1}
    runs = {
        (name, part): arguments(tiny, tmp_path / f"{name}-{part}", **{**changes, **kind, **more})
        for name, kind in kinds.items()
        for part, more in (("whole", {}), ("parts", {"max_steps": 3}))
    }
    launch(config, {"runs": [dataclasses.asdict(args) for args in runs.values()]}, precision="bf16")
    again = {}
    for name in kinds:
        (tmp_path / f"{name}-parts" / FOLDER / "trained.json").unlink()
        again[name] = dataclasses.replace(runs[name, "parts"], max_steps=5, resume="newest")
    shutil.copytree(tmp_path / "plus-parts", tmp_path / "alone")
    launch(config, {"runs": [dataclasses.asdict(args) for args in again.values()]}, precision="bf16")
    for name in kinds:
        same_end(tmp_path / f"{name}-whole", tmp_path / f"{name}-parts")
    alone = dataclasses.replace(again["plus"], output_dir=str(tmp_path / "alone"))
    launch("cpu", {"runs": [dataclasses.asdict(alone)]}, 1, precision="bf16")
    for one, other in zip(records(tmp_path / "plus-whole"), records(tmp_path / "alone"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)  # of 16 bits, not all of whose sums are alike
    if "bytes" in again:
        (tmp_path / "bytes-parts" / FOLDER / "trained.json").unlink()
        done = launch("cpu", {"runs": [dataclasses.asdict(again["bytes"])], "refused": True}, 1, precision="bf16")
        launches = f"2 processes of ZeRO-{config.removeprefix('zero')}"
        said = f"has optimizer states in bytes, as {launches} cut them, and not one process, or DDP; start {launches}"
        assert said in done.stdout
