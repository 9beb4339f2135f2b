"""The arithmetic of memory: by hand, and against what optimizers and a forward pass really keep."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import Moments, kind_of
from dualoptim.memory_plan import shape_of
from dualoptim.method.held import state_size
from dualoptim.models.memory import Division, Parts, Shape, activation_bytes, divide, rounded_up, state_bytes

SHAPE = Shape(quantizable=800, other=200, frozen=100, layers=2, hidden=8, intermediate=16, vocabulary=50)


def shape(quantizable, other):
    return dataclasses.replace(SHAPE, quantizable=quantizable, other=other)


def test_state_by_hand():
    assert state_bytes(shape(800, 200), Moments(2)) == 8000
    assert state_bytes(shape(800, 200), Moments(4)) == 16000
    assert state_bytes(shape(2560, 0), Moments(0, 2)) == 2 * (2560 + 10 * 4)  # ten blocks of 256
    assert state_bytes(shape(2560, 100), Moments(0, 4)) == 2 * (2 * (2560 + 10 * 4) + 800)


@pytest.mark.parametrize(
    ("changes", "wide", "narrow"),
    [
        ({}, 4, 0),
        ({"optim_bits": 8}, 0, 4),
        ({"optim": "adamw"}, 2, 0),
        ({"optim": "adamw-alternate", "optim_bits": 8}, 0, 2),
        ({"decouple": "none"}, 2, 0),
        ({"decouple": "m"}, 3, 0),
        ({"retain_optimizer": "sgd"}, 3, 0),
        ({"forget_optimizer": "adamw-8bit", "retain_optimizer": "signsgd"}, 0, 2),
        ({"forget_optimizer": "torch.optim.Adam"}, 4, 0),
        ({"optim": "dual-adamw-plus"}, 6, 0),
        ({"optim": "dual-adamw-plus", "quantize_delta": True}, 2, 4),
        ({"optim": "dual-adamw-plus", "quantize_base": True}, 4, 2),
        ({"optim": "dual-adamw-plus", "optim_bits": 8}, 0, 6),
    ],
)
def test_the_plan_counts_the_moments_that_the_optimizer_keeps(changes, wide, narrow):
    """Against what one step of the optimizer really leaves, for one tensor that may be quantized and one that may not."""
    args = UnlearnArgs(**changes)
    assert kind_of(args).moments(args) == (wide, narrow)
    large, small = (torch.nn.Parameter(torch.zeros(size)) for size in (8192, 256))
    groups = [{"params": [large], "decayed": True, "bits": args.state_bits, "weight_decay": 0.0}]
    optimizer = kind_of(args).build(args)([*groups, {"params": [small], "decayed": False, "bits": 32, "weight_decay": 0.0}])
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(state_size(optimizer, quantized)[0] for quantized in (False, True))
    counters = 8 * 4 * 2  # steps; each optimizer in bytes also has its tables of 256 values
    planned = state_bytes(shape(8192, 256), Moments(wide, narrow))
    assert planned <= held <= planned + counters + narrow * 1024


def test_activations_by_hand():
    assert activation_bytes(SHAPE, 10, half=False, checkpointing=False) == 10 * 2 * (48 * 8 + 16 * 16)
    assert activation_bytes(SHAPE, 10, half=True, checkpointing=False) == 10 * 2 * (38 * 8 + 8 * 16)
    assert activation_bytes(SHAPE, 10, half=False, checkpointing=True) == 10 * (2 * 4 * 8 + 48 * 8 + 16 * 16)


ZERO = Division(processes=2, deepspeed=True, bucket=30, live=70, sub_group=10**9)
HALF = dataclasses.replace(ZERO, half=True)


@pytest.mark.parametrize(
    ("division", "device", "host"),
    [  # weights, gradients, masters, optimizer, buffers of 1100 parameters, 1000 of which train, with two banks
        (Division(), Parts(4400, 4000, 0, 16000, 0), Parts()),
        (Division(half=True), Parts(4400, 4000, 0, 16000, 2200), Parts()),
        (Division(processes=2), Parts(4400, 8000, 0, 16000, 0), Parts()),
        (dataclasses.replace(ZERO, stage=1), Parts(4400, 6000, 2000, 8000, 120), Parts()),
        (dataclasses.replace(HALF, stage=1), Parts(2200, 6000, 2000, 8000, 60), Parts()),
        (dataclasses.replace(ZERO, stage=2), Parts(4400, 4000, 2000, 8000, 120), Parts()),
        (dataclasses.replace(HALF, stage=2), Parts(2200, 2000, 2000, 8000, 60), Parts()),
        (dataclasses.replace(ZERO, stage=3), Parts(2200, 4000, 2000, 8000, 400), Parts()),
        (dataclasses.replace(HALF, stage=3, sub_group=100), Parts(1100, 2400, 2000, 8000, 200), Parts()),
        (dataclasses.replace(HALF, stage=3, offload=True), Parts(1100, 0, 0, 0, 200), Parts(0, 4000, 2000, 8000)),
        (dataclasses.replace(HALF, stage=2, offload=True), Parts(2200, 2000, 0, 0, 60), Parts(0, 2000, 2000, 8000)),
    ],
)
def test_stages_by_hand(division, device, host):
    assert divide(SHAPE, division, 16000) == (device, host)


def test_activations_of_a_llama_are_those_of_the_plan():
    config = LlamaConfig(vocab_size=100, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(input_ids=torch.arange(100)[None], use_cache=False)
    measured = sum(size for pointer, (size, _) in kept.items() if pointer not in weights)
    assert hidden is not None
    assert activation_bytes(shape_of(model), 100, half=False, checkpointing=False) == pytest.approx(measured, rel=0.1)


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


def test_parts_are_rounded_up():
    assert [rounded_up(value, 4) for value in (0, 7, 8, 9)] == [0, 2, 2, 3]
