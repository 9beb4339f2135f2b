"""Whole runs on a GPU, in launches of one process: `pytest -m gpu`, a few minutes. Longer ones: tests/speed/gpu.py."""

import dataclasses

import pytest
import torch
from speed.gpu import Measured, apart, refused, resumed, synchronizations

from dualoptim import EvalArgs, UnlearnArgs, run
from dualoptim.evaluate import evaluate
from dualoptim.memory_plan import plan
from dualoptim.models.launch import start_accelerator

pytestmark = pytest.mark.gpu


@pytest.fixture
def args(bench, sixteen_bits) -> UnlearnArgs:
    """A run of a few steps in this process, in bf16."""
    return UnlearnArgs(**{**bench.fields(), "learning_rates": (1e-4,)})


def losses(args, **changes):
    (task,) = run(dataclasses.replace(args, **{"overwrite": True, **changes})).tasks
    return [record["loss"] for record in task.log]


def check(measured: Measured):
    text, holds = measured
    assert holds, text


@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_a_launch_of_one_process_trains_as_a_plain_one(bench, config):
    (plain,) = bench.runs(bench.fields())
    (one,) = bench.runs(bench.fields(), config=config)
    assert apart(one["losses"], plain["losses"]) < 2e-2
    assert (one["first"]["masters"], one["saved"]) == ("float32", "float32")


def test_a_killed_run_goes_on(bench):
    check(resumed(bench, ("single_gpu",)))


def test_fp16_is_refused_and_a_step_that_is_not_finite_not_taken(bench):
    check(refused(bench, ("single_gpu",)))


def test_four_micro_batches_of_one_row_are_one_of_four(args):
    whole = losses(args, batch_size=4, gradient_accumulation_steps=1)
    assert apart(losses(args, batch_size=1, gradient_accumulation_steps=4), whole) < 2e-2


def test_the_sparse_gradient_of_tied_embeddings_is_the_dense_one(args, monkeypatch):
    sparse = losses(args)
    monkeypatch.setattr("dualoptim.models.launch.is_sharded", lambda _: True)
    assert apart(losses(args), sparse) < 2e-2


def test_a_second_run_finds_the_memory_that_the_first_one_had(args):
    left = []
    for _ in range(3):
        losses(args)
        left.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert left[2][0] <= left[1][0] + 2**20
    assert left[2][1] <= left[1][1] + 2**21


def test_the_plan_is_what_is_allocated(args):
    """Within 10 % and what a tiny model does not fill: CUDA gives memory in blocks."""
    asked = dataclasses.replace(args, max_length=96, dry_run=True)
    planned = max(phase.device.total for phase in plan(asked, start_accelerator(asked)).phases)
    torch.cuda.reset_peak_memory_stats()
    losses(args)
    assert torch.cuda.max_memory_allocated() < 1.1 * planned + 32 * 2**20


def test_a_step_waits_for_the_gpu_at_most_four_times(args):
    with synchronizations() as counts:
        losses(args, max_steps=12)
    assert max(counts[3:]) <= 4, counts


def test_an_adapter_on_a_base_in_four_bits_trains_is_saved_and_merged(args, tmp_path):
    pytest.importorskip("bitsandbytes")
    (task,) = run(dataclasses.replace(args, use_lora=True, load_in_4bit=True)).tasks
    assert (task.model / "adapter_config.json").is_file()
    assert torch.tensor(losses(args, model=str(task.model), output_dir=str(tmp_path / "merged"))).isfinite().all()


def test_weights_in_eight_bits_are_measured(args, tmp_path):
    pytest.importorskip("bitsandbytes")
    asked = {"quantize": (8,), "eval_rows": 4, "max_new_tokens": 4, "template": "qa", "output_dir": str(tmp_path / "eight")}
    summary = evaluate(EvalArgs(model=args.model, data="demo", **asked))
    assert summary.attacks.quantize
