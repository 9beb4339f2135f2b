"""Every objective takes real steps on SmolLM2 with TOFU rows: with each kind of optimizer, and under ZeRO-3."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from test_distributed import launch
from test_real_model import part_of_tofu

from dualoptim import UnlearnArgs
from dualoptim.data.tofu import load_refusals, open_source
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.models.load import load_policy, start_accelerator
from dualoptim.models.reference import Frozen
from dualoptim.reporting.log import StepLog
from dualoptim.unlearn import _work, optimizer_of, train

PAIRS = [f"{forget}+{retain}" for forget, retain in zip(FORGET, [*RETAIN] * 3, strict=False)]


@pytest.fixture(scope="module")
def tofu(tmp_path_factory) -> Path:
    rows = list(range(4))
    return part_of_tofu(tmp_path_factory.mktemp("data") / "tofu", {"forget01": rows, "retain90": rows})


@pytest.fixture(scope="module")
def smollm2(gguf, tofu):
    args = UnlearnArgs(model=str(gguf), data=str(tofu), split="forget01")
    accelerator = start_accelerator(args)
    policy = load_policy(args, accelerator)
    return policy, accelerator, {name: weight.clone() for name, weight in policy.model.state_dict().items()}


def test_the_pairs_hold_every_objective():
    assert {pair.split("+")[0] for pair in PAIRS} == set(FORGET)
    assert {pair.split("+")[1] for pair in PAIRS} == set(RETAIN)


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw", "adamw-alternate"])
@pytest.mark.parametrize("losses", PAIRS)
def test_two_real_steps(losses, optim, smollm2, gguf, tofu, tmp_path):
    policy, accelerator, start = smollm2
    args = UnlearnArgs(
        model=str(gguf), data=str(tofu), split="forget01", forget_losses=(losses,), optim=optim, batch_size=1, retain_freq=1,
        max_steps=2, learning_rates=(1e-5,), warmup_epochs=0, output_dir=str(tmp_path),
    )  # fmt: skip
    work = _work(policy, accelerator, open_source(args), load_refusals(None), args, losses, 1e-5, 0)
    objectives = [objective for _, _, objective, _ in work.referring()]
    if objectives:
        frozen = Frozen(policy, accelerator, tmp_path / "reference", objectives, 4)
        for _, _, objective, texts in work.referring():
            frozen.score(policy, objective, texts)
        work = work.with_reference(frozen)
    try:
        with StepLog(None, 2, "test", accelerator) as log:
            train(policy, accelerator, work.phases, work.plan, args, optimizer_of(args), log)
        weights = policy.model.state_dict()
        largest = max(float((weights[name] - start[name]).abs().max()) for name in start)
    finally:
        accelerator.free_memory()
        policy.model.load_state_dict(start)
        policy.model.zero_grad(set_to_none=True)
    kept = losses.endswith("none")
    phases = ["joint"] * 2 if optim == "adamw" else ["forget", "forget" if kept else "retain"]
    assert [record["phase"] for record in log.records] == phases
    for record in log.records:
        assert math.isfinite(record["loss"])
        assert math.isfinite(record["grad_norm"])
    assert log.records[0]["grad_norm"] > 0
    assert 1e-6 < largest < 1e-4  # two steps of Adam at rate 1e-5


def test_one_of_each_family_under_zero3_on_two_processes(gguf, tofu, tmp_path):
    """In one launch, whose pairs leave no training state behind each other."""
    pytest.importorskip("deepspeed")
    families = ("NPO+AP", "RMU+EMBED", "SatImp+GD", "UNDIAL+KL", "LLMU+KLQ")
    args = UnlearnArgs(
        model=str(gguf), data=str(tofu), split="forget01", forget_losses=families, batch_size=1, retain_freq=1, max_steps=2,
        learning_rates=(1e-5,), eval=False, output_dir=str(tmp_path),
    )  # fmt: skip
    done = launch("zero3", {"runs": [dataclasses.asdict(args)]}, timeout=900)
    for losses in families:
        lines = (tmp_path / f"{losses}_lr1e-05" / "task1" / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["phase"] for record in records] == ["forget", "retain"]
        assert all(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]) for record in records)
    left = [int(number) for number in re.findall(r"(\d+) elements of tensors are left", done.stdout)]
    assert len(left) == 2
    assert max(left) < 1e6  # a model has 134.5 million
