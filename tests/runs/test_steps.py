"""The steps of a whole run: against the same steps written out, and what must not change them."""

import dataclasses
import json

import pytest
import torch
from support import state_of

from dualoptim import NonFiniteError, UnlearnArgs, run
from dualoptim.data.stream import ExampleBuilder, Stream
from dualoptim.data.tofu import tofu_source
from dualoptim.method.objectives import FORGET
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def weights_after(args):
    result = run(args)
    return state_of(result.tasks[0].model), result


def test_a_seed_makes_a_run_reproducible_bit_for_bit(small_args, tmp_path):
    first, result = weights_after(small_args)
    again, result_again = weights_after(dataclasses.replace(small_args, output_dir=str(tmp_path / "again")))
    assert all(torch.equal(first[name], again[name]) for name in first)
    without_time = lambda log: [{k: v for k, v in r.items() if k != "seconds"} for r in log]  # noqa: E731
    assert without_time(result.tasks[0].log) == without_time(result_again.tasks[0].log)
    other, _ = weights_after(dataclasses.replace(small_args, seed=2, output_dir=str(tmp_path / "other")))
    assert any(not torch.equal(first[name], other[name]) for name in first)


def by_hand(small_args, optimizers):
    """The run of `small_args`, written out: alternating steps of ordinary optimizers over unclipped whole batches."""
    loaded = load_model(small_args, start_accelerator(small_args))
    source = tofu_source("demo")
    rows = {"forget": source.task_rows("forget05", 1), "retain": source.retain_rows("forget05", [1])}
    streams = {
        name: Stream(name, len(rows[name]), ExampleBuilder(rows[name], loaded.formatter, ("answer",), 1001), 1001, 4, 1)
        for name in rows
    }
    made = optimizers(loaded.model.parameters())
    total, warmup = 5 * 5 * 6, 5 * 6  # 20 rows / 4 a step = 5 forget steps an epoch, 6 steps a cycle
    served = {"forget": 0, "retain": 0}
    for step in range(small_args.max_steps):
        name = "forget" if step % 6 == 0 else "retain"
        (examples,) = streams[name].window(served[name])
        served[name] += 1
        logits = [loaded.model(torch.tensor([e.ids])).logits[0, e.start - 1 : -1] for e in examples]
        logits = torch.cat(logits).log_softmax(-1)
        if name == "forget":  # KL(uniform || p), from its definition
            loss = (-logits.mean(-1) - torch.log(torch.tensor(float(logits.shape[-1])))).mean()
        else:
            loss = torch.nn.functional.nll_loss(logits, torch.tensor([t for e in examples for t in e.ids[e.start :]]))
        made[name].zero_grad()
        loss.backward()
        for group in made[name].param_groups:
            group["lr"] = 5e-4 * (step + 1) / warmup if step < warmup else 5e-4 * (total - step) / (total - warmup)
        made[name].step()
    return {name: value.detach() for name, value in loaded.model.named_parameters()}


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw-alternate"])
def test_a_run_equals_the_same_steps_written_out(small_args, tiny, optim):
    # an untrained model: where gradients are near zero, Adam turns the rounding of another order of sums into whole steps
    args = dataclasses.replace(small_args, model=str(tiny), optim=optim, forget_lr=5e-4, weight_decay=0.0, max_grad_norm=0.0)

    def two_banks(parameters):
        parameters = list(parameters)
        return {name: torch.optim.AdamW(parameters, weight_decay=0.0) for name in ("forget", "retain")}

    def one_bank(parameters):
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        return {"forget": optimizer, "retain": optimizer}

    ours, _ = weights_after(args)
    largest = {}
    for kind, optimizers in (("dual-adamw", two_banks), ("adamw-alternate", one_bank)):
        expected = by_hand(args, optimizers)
        largest[kind] = max(float((ours[name] - expected[name]).abs().max()) for name in ours)
    wrong = next(kind for kind in largest if kind != optim)
    assert largest[optim] <= 0.02 * 5e-4
    assert largest[wrong] > 10 * largest[optim], "the wrong optimizer would pass as well"


def test_three_optimizers_differ_in_nothing_but_the_optimizer(small_args, tmp_path):
    logs = {}
    for optim in ("dual-adamw", "adamw-alternate", "adamw"):
        rate = {} if optim == "adamw" else {"forget_lr": 5e-4}
        args = dataclasses.replace(small_args, optim=optim, output_dir=str(tmp_path / optim), **rate)
        logs[optim] = run(args).tasks[0].log
    keys = ("step", "epoch", "phase", "lr", "count", "tokens")
    alternating = [[{k: r[k] for k in keys} for r in logs[optim]] for optim in ("dual-adamw", "adamw-alternate")]
    assert alternating[0] == alternating[1]
    assert logs["dual-adamw"][0]["loss"] == logs["adamw-alternate"][0]["loss"]
    assert logs["dual-adamw"][6]["loss"] != logs["adamw-alternate"][6]["loss"]  # the second forget step feels its moments
    joint = logs["adamw"][0]
    assert joint["phase"] == "joint"
    assert joint["forget_loss"] == pytest.approx(logs["dual-adamw"][0]["loss"], rel=1e-6)  # the same first forget rows
    assert joint["loss"] == pytest.approx(joint["forget_loss"] + joint["retain_loss"], rel=1e-6)


def test_each_phase_has_its_rate_and_its_clipping(small_args):
    args = dataclasses.replace(small_args, forget_lr=1e-4, forget_max_grad_norm=1e-9, forget_freq=2, retain_freq=1, max_steps=3)
    _, result = weights_after(args)
    assert [record["phase"] for record in result.tasks[0].log] == ["forget", "forget", "retain"]
    first, second, third = (record["lr"] for record in result.tasks[0].log)
    assert second == pytest.approx(2 * first)
    assert third == pytest.approx(3 * first * 5)  # 5e-4 against 1e-4, on the third step of the same warm-up


@pytest.mark.parametrize(("clip", "limit"), [("max_grad_norm", 1e-3), ("forget_max_grad_norm", 2e-3)])
def test_clipping_is_torchs_own(small_args, tiny, clip, limit):
    """One forget step by plain SGD at rate 1 moves the weights by the gradient, so by exactly what clipping leaves of it."""
    changes = {"model": str(tiny), "max_steps": 1, "warmup_epochs": 0, "learning_rates": (1.0,), "forget_lr": 1.0, clip: limit}
    changes |= {"forget_optimizer": "torch.optim.SGD", "forget_weight_decay": 0.0}
    weights, result = weights_after(dataclasses.replace(small_args, **changes))
    start = state_of(tiny)
    moved = torch.cat([(weights[name] - start[name]).double().flatten() for name in start]).norm()
    assert result.tasks[0].log[0]["grad_norm"] > 10 * limit
    assert float(moved) == pytest.approx(limit, rel=1e-3)


def test_coefficients_scale_the_joint_loss(small_args):
    args = dataclasses.replace(small_args, optim="adamw", forget_coeff=0.1, regularization_coeff=3.0, max_steps=1)
    record = run(args).tasks[0].log[0]
    assert record["loss"] == pytest.approx(0.1 * record["forget_loss"] + 3 * record["retain_loss"], rel=1e-6)


def test_a_coefficient_that_is_divided_out_is_told_once_and_the_steps_of_each_rate(small_args, capsys):
    run(dataclasses.replace(small_args, forget_coeff=0.1, max_steps=1, learning_rates=(1e-4, 2e-4)))
    out = capsys.readouterr().out
    assert out.count("--forget-coeff 0.1 changes little, for the forget steps have an optimizer state of their own") == 1
    assert out.count("\n1 step, ") == 2
    assert "1 forget step of 4 rows (4 examples) at rate 0.0006, 0 retain steps of 4 rows (0 examples)" in out


def test_a_loss_that_is_not_finite_stops_before_the_step(taught, tmp_path, monkeypatch):
    calls = []

    def spoiled(scores):
        calls.append(1)
        factor = float("inf") if len(calls) == 2 else 1.0
        return scores.log_prob.sum() * factor

    monkeypatch.setitem(FORGET, "GA", dataclasses.replace(FORGET["GA"], loss=spoiled))
    common = {"model": str(taught), "data": "demo", "learning_rates": (5e-4,), "forget_losses": ("GA+GD",), "eval": False}
    args = UnlearnArgs(**common, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(NonFiniteError, match=r"step 7 \(forget\): loss -?inf.*The weights before this step are in") as error:
        run(args)
    assert "\n" not in str(error.value)
    folder = tmp_path / "stopped" / "GA+GD_lr0.0005" / "task1"
    assert len((folder / "log.jsonl").read_text().splitlines()) == 6
    calls.append(2)  # past the spoiled call: the same six steps, undisturbed
    whole = run(UnlearnArgs(**common, max_steps=6, output_dir=str(tmp_path / "whole")))
    kept, expected = state_of(folder / "model"), state_of(whole.tasks[0].model)
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_gradient_checkpointing_changes_nothing_but_memory(small_args, tmp_path):
    plain, _ = weights_after(small_args)
    args = dataclasses.replace(small_args, gradient_checkpointing=True, output_dir=str(tmp_path / "checkpointed"))
    checkpointed, _ = weights_after(args)
    assert max(float((plain[name] - checkpointed[name]).abs().max()) for name in plain) <= 1e-6


def test_the_question_is_scored_without_the_mask(small_args, tmp_path):
    masked = run(small_args).tasks[0].log
    unmasked = run(dataclasses.replace(small_args, mask=False, output_dir=str(tmp_path / "unmasked"))).tasks[0].log
    forget, retain = 0, 1
    assert unmasked[forget]["count"] == unmasked[forget]["tokens"] - 4  # all but the first token of each of four rows
    assert masked[forget]["count"] < unmasked[forget]["count"]
    assert masked[retain]["count"] == unmasked[retain]["count"]


def test_log_lines_are_what_the_readme_says(small_args):
    result = run(small_args)
    lines = [json.loads(line) for line in (result.tasks[0].folder / "log.jsonl").read_text().splitlines()]
    assert lines == result.tasks[0].log
    assert [line["step"] for line in lines] == list(range(1, 8))
    fields = {"step", "epoch", "phase", "loss", "lr", "grad_norm", "count", "tokens", "seconds"}
    assert set(lines[1]) == fields
    assert set(lines[0]) == fields | {"weights", "masters", "state_bytes_per_parameter"}
    assert "".join(line["phase"][0] for line in lines) == "frrrrrf"
