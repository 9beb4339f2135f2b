"""What a device is asked to do and what is asked of it: operations, and what a host would wait for, as a CPU can count them.

No figure here is a time. Whether fewer of them are faster is for a benchmark on the device to say.
"""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from support import Asked, examples, flash_stand_in
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim import EvalArgs, UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.data.tofu import tofu_source
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.method.engine import prepare
from dualoptim.method.groups import decay_groups
from dualoptim.method.kernels import LOGITS, AgainstTargets, Statistics, rows_at_once
from dualoptim.method.loop import steps
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.schedule import Plan
from dualoptim.method.scores import Reference
from dualoptim.method.window import Phase, Term
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.loaded import Layout

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", [512, 600])  # one for each row, or texts that share some
def test_statistics_of_logits_take_at_most_30_operations(dtype, labels):
    """In the form that GPUs take. The device is one that has no numbers at all, so none can be asked for."""
    logits = torch.empty(512, 2**17, dtype=dtype, device="meta", requires_grad=True)
    places = torch.zeros(2, labels, dtype=torch.long, device="meta")
    gradients = [torch.empty(labels, device="meta") for _ in range(3)]
    with Asked() as asked:
        *found, _ = Statistics.apply(logits, *places)
        torch.autograd.backward(found, gradients)
    assert logits.grad.shape == logits.shape
    assert asked.operations.total() <= 30
    assert not asked.waits


def test_comparing_with_targets_takes_as_many_rows_at_once():
    logits = torch.empty(512, 2**17, device="meta", requires_grad=True)
    with Asked() as asked:
        AgainstTargets.apply(logits, lambda part: logits[part].detach(), True).sum().backward()
    assert asked.operations.total() <= 16
    assert not asked.waits


def test_a_device_works_on_a_quarter_of_a_gigabyte_at_once_and_a_cpu_on_what_its_caches_hold():
    assert rows_at_once("cpu", 2**17, 32) == 32
    assert rows_at_once("cuda", 2**17, 32) == 512
    assert rows_at_once("cuda", 2 * LOGITS, 32) == 1


def with_reference(batch):
    """The same batch, with a frozen model that says zero of everything."""
    zeros = torch.zeros(len(batch.labels))
    frozen = Reference(zeros, lambda part: torch.zeros(len(zeros[part]), 97), zeros[:, None].expand(-1, 32))
    return dataclasses.replace(batch, reference=lambda: frozen)


def waits_of_a_step(optim="dual-adamw", objectives=("ME", "GD"), size=(2, 2, 1), flash=False, clip=1.0):
    """What the third of four steps waits for. `size`: layers, texts a micro-batch, and micro-batches."""
    layers, texts, micro_batches = size
    args = UnlearnArgs(model="x", data="demo", optim=optim)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers))
    model.config._attn_implementation = "flash_attention_2" if flash else "sdpa"
    optimizer = kind_of(args).build(args)(decay_groups(model, 0.1, 32, False))
    engine = prepare(Accelerator(cpu=True), model, optimizer)
    layout = Layout(CPU, packed=True, shares=not flash, told=flash)
    drawn = [[examples(texts, seed=step + n) for n in range(micro_batches)] for step in range(4)]

    def batches(step):
        return (with_reference(layout(own)) for own in drawn[step])

    constants = {"beta": None, "gamma": None}
    terms = [Term({**FORGET, **RETAIN}[name].resolved(constants, 0), batches) for name in objectives]
    if kind_of(args).alternates:
        phases = {name: Phase({name: term}, 1e-3, clip) for name, term in zip(("forget", "retain"), terms, strict=True)}
    else:
        phases = {"joint": Phase(dict(zip(("forget", "retain"), terms, strict=True)), 1e-3, clip)}
    records = steps(engine, phases, Plan(tuple((name, 1) for name in phases), 4, 1))
    next(records), next(records)
    with Asked() as asked:
        next(records)
    return asked.waits


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_waits_once_for_its_numbers(optim, clip):
    """However many micro-batches there are, of several texts: transformers gets the mask for which it asks otherwise."""
    assert waits_of_a_step(optim, clip=clip, size=(2, 2, 1)) == {"tolist": 1}
    assert waits_of_a_step(optim, clip=clip, size=(2, 2, 6)) == {"tolist": 1}


@pytest.mark.parametrize("flash", [False, True])
def test_what_a_step_waits_for_does_not_grow_with_layers_and_texts(flash, monkeypatch):
    flash_stand_in(monkeypatch)
    small, large = (waits_of_a_step(size=size, flash=flash) for size in ((2, 2, 1), (5, 9, 1)))
    assert small == large
    assert large.total() <= 2


def test_a_kernel_that_takes_no_mask_waits_once_a_forward_pass_as_does_a_single_text(monkeypatch):
    """Where transformers asks whether the row holds several texts; a mask for one would cost its attention a faster kernel."""
    assert waits_of_a_step(size=(2, 1, 3)) == {"_local_scalar_dense": 3, "tolist": 1}
    flash_stand_in(monkeypatch)
    assert waits_of_a_step(size=(2, 2, 3), flash=True) == {"_local_scalar_dense": 3, "tolist": 1}


@pytest.mark.parametrize("name", FORGET)
def test_no_forget_objective_waits_for_anything(name):
    assert waits_of_a_step(objectives=(name, "GD")).total() <= 1


@pytest.mark.parametrize("name", [name for name in RETAIN if name != "none"])
def test_no_retain_objective_waits_for_anything(name):
    assert waits_of_a_step("adamw", ("GA", name)).total() <= 1


@pytest.mark.parametrize("size", [2, 16])
def test_a_scored_batch_waits_once_for_its_numbers(size, taught):
    """However many texts there are in it, and whether they are attacked or not."""
    args = EvalArgs(model=str(taught), data="demo", eval_batch_size=size, attn_implementation="sdpa")
    loaded = load_model(args, start_accelerator(args), "measure")
    scoring = ScoringPass(loaded, args)
    rows = [scoring.examples(row)[:1] for row in tofu_source("demo").task_rows("forget05", 1)[:size]]
    with Asked() as asked:
        scores = dataclasses.replace(scoring, loaded=loaded).score_texts("score", rows, least=0.4)
    assert asked.waits == {"tolist": 1}
    assert all(own[0].min_k for own in scores)
    with Asked() as asked:
        scoring.score_texts("score", rows)
    assert asked.waits["tolist"] == 1
