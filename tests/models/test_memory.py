"""The arithmetic of memory: by hand, and against what optimizers and a forward pass really keep."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import Moments, kind_of
from dualoptim.method.adamw import adamw
from dualoptim.method.dual import DualOptimizer
from dualoptim.method.held import state_size
from dualoptim.method.kernels import LARGE_PIECE, PIECE
from dualoptim.models.memory import Demand, Division, Parts, Shape, divide, frozen_bytes, state_bytes
from dualoptim.models.peaks import activation_bytes, evaluating, first_step, loading, stepping, training
from dualoptim.models.shapes import shape_of

SIZES = {
    "layers": 2,
    "hidden": 8,
    "intermediate": 16,
    "vocabulary": 50,
    "largest": 400,
    "read": 400,
    "layer": 300,
    "looked_up": 100,
}
SHAPE = Shape(quantizable=800, other=200, frozen=100, cached=10, **SIZES)


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
DUAL = Demand(Moments(4), tokens=10, scored=10, tries=True)


@pytest.mark.parametrize(
    ("division", "device", "host"),
    [  # weights, gradients, masters and optimizer of 1100 parameters, 1000 of which train, with two banks
        (Division(), Parts(4400, 0, 0, 16000), Parts()),
        (Division(half=True), Parts(4200, 0, 0, 16000), Parts()),
        (Division(processes=2), Parts(4400, 0, 0, 16000), Parts()),
        (Division(processes=2, fsdp=True), Parts(2200, 0, 0, 8000), Parts()),
        (Division(processes=2, fsdp=True, half=True), Parts(2100, 0, 0, 8000), Parts()),
        (dataclasses.replace(ZERO, stage=1), Parts(4400, 0, 2000, 8000), Parts()),
        (dataclasses.replace(HALF, stage=2), Parts(2200, 0, 2000, 8000), Parts()),
        (dataclasses.replace(HALF, stage=3), Parts(1100, 0, 2000, 8000), Parts()),
        (dataclasses.replace(HALF, stage=3, offload=True), Parts(1100), Parts(0, 4000, 2000, 8000)),
    ],
)
def test_what_lies_there_throughout_by_hand(division, device, host):
    assert divide(SHAPE, division, DUAL) == (device, host)


def test_frozen_weights_in_four_bits_by_hand():
    shape = dataclasses.replace(SHAPE, frozen=20_000, packable=16_384)
    packed = 16_384 // 2 + 16_384 // 64 + 4  # two a byte, a byte of scale for 64 of them, and a float32 for 256 scales
    assert frozen_bytes(shape, Division(half=True), dataclasses.replace(DUAL, in_4bit=True)) == packed + 2 * (20_000 - 16_384)
    assert frozen_bytes(shape, Division(half=True), DUAL) == 2 * 20_000


@pytest.mark.parametrize(
    ("division", "gradients", "buffers"),
    [  # when the backward pass ends; gradients of 1000 parameters, the largest tensor has 400
        (Division(), 4000, 0),
        (Division(processes=2), 4000, 0),
        (Division(processes=2, fsdp=True), 2000, 4 * (500 + 2 * 300) + 8 * 500),
        (dataclasses.replace(ZERO, stage=1), 4000 + 2000, 0),  # in float32 flattened for the step
        (dataclasses.replace(HALF, stage=1), 4000 + 2000, 2 * 30),
        (dataclasses.replace(HALF, stage=2), 2000, 2 * 2 * 30 + 1600),
        (dataclasses.replace(HALF, stage=3, sub_group=100), 2000, 2 * 70 + 2 * 2 * 30 + 1600),
        (dataclasses.replace(HALF, stage=3, offload=True), 0, 2 * 70 + 2 * 2 * 30 + 1600),
    ],
)
def test_the_fullest_moment_of_a_step_by_hand(division, gradients, buffers):
    few = dataclasses.replace(DUAL, tokens=0, scored=0)
    planned = training(SHAPE, division, few)
    assert (planned.gradients, planned.buffers) == (gradients, buffers)


def test_a_step_of_many_tokens_is_fullest_when_its_backward_pass_begins():
    many = dataclasses.replace(DUAL, tokens=1000, scored=1000)
    kept = activation_bytes(SHAPE, 1000, half=False, checkpointing=False) + 1000 * 50 * 4 * 3
    assert training(SHAPE, Division(), many) == Parts(gradients=1600, activations=kept)
    assert training(SHAPE, Division(), dataclasses.replace(many, accumulates=True)) == Parts(gradients=4000, activations=kept)
    assert training(SHAPE, Division(half=True), many).buffers == 2 * (1000 - 100)  # autocast's copies, not of embeddings


def test_the_first_step_makes_states_with_a_zero_gradient_by_hand():
    assert first_step(SHAPE, Division(), DUAL) == (Parts(gradients=4000, buffers=1600), Parts())
    assert first_step(SHAPE, dataclasses.replace(HALF, stage=2), DUAL) == (Parts(gradients=2000, buffers=2000), Parts())
    offload = dataclasses.replace(HALF, stage=3, offload=True)
    assert first_step(SHAPE, offload, DUAL) == (Parts(buffers=2 * 70), Parts(buffers=2000))
    alone = dataclasses.replace(DUAL, tries=False)
    assert first_step(SHAPE, dataclasses.replace(HALF, stage=2), alone) == (Parts(gradients=2000), Parts())


def test_an_update_that_is_written_out_holds_four_values_of_a_piece():
    shape, plus = dataclasses.replace(SHAPE, largest=2**30), dataclasses.replace(DUAL, by_hand=True)
    here, there = (stepping(shape, Division(on_cuda=on_cuda), plus).buffers for on_cuda in (False, True))
    assert (here, there) == (4 * 4 * PIECE, 4 * 4 * LARGE_PIECE)
    divided = stepping(shape, Division(processes=4, fsdp=True), plus)
    assert divided.buffers == 4 * 4 * PIECE + 4 * (500 + 2 * 300)  # and layers stay gathered


def test_a_projection_makes_one_tensor_beside_the_gradients():
    projects = dataclasses.replace(DUAL, projects=True)
    for division, largest in ((Division(), 400), (Division(processes=2), 400), (Division(processes=2, fsdp=True), 200)):
        without, beside = (stepping(SHAPE, division, demand) for demand in (DUAL, projects))
        assert beside == dataclasses.replace(without, buffers=without.buffers + 4 * largest)


def test_a_second_pass_keeps_all_weights_that_train():
    moves = dataclasses.replace(DUAL, tokens=0, scored=0, moves=True)
    assert training(SHAPE, Division(), moves) == Parts(gradients=4000, buffers=4000)
    assert training(SHAPE, Division(), dataclasses.replace(moves, tokens=1000)).buffers == 4000


def test_an_evaluation_by_hand():
    demand = dataclasses.replace(DUAL, rows=(3, 100))
    scored, answered = 300 * (4 * 50 + 4 * (6 * 8 + 3 * 16)), 3 * (100 * 4 * 2 * 10 + 8 * 50)
    assert evaluating(SHAPE, Division(), demand) == Parts(weights=4400, activations=max(scored, answered))
    divided = dataclasses.replace(demand, evaluates_divided=True)
    half = evaluating(SHAPE, dataclasses.replace(HALF, stage=3), divided)
    assert (half.weights, half.buffers) == (1100, 2 * 300 + 2 * 400)  # a layer, and on a CPU a copy of the output head
    with_head = dataclasses.replace(divided, frozen_head=True)
    assert evaluating(SHAPE, dataclasses.replace(HALF, stage=3, on_cuda=True), with_head).weights == 1100 + 400


def test_loading_holds_a_share_where_weights_are_divided():
    assert loading(SHAPE, Division(processes=2), DUAL)[0].weights == 4400
    assert loading(SHAPE, dataclasses.replace(HALF, stage=3), DUAL)[0].weights == 2100
    assert loading(SHAPE, dataclasses.replace(HALF, stage=2), dataclasses.replace(DUAL, stored=2))[0].weights == 2200


def test_making_states_copies_no_weights():
    class Copies(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += function.overloadpacket is torch.ops.aten.clone
            return function(*args, **(kwargs or {}))

    weight = torch.nn.Parameter(torch.randn(8))
    make = adamw(1e-3, (0.9, 0.999))
    optimizer = DualOptimizer([weight], forget=make, retain=make)
    before = weight.detach().clone()
    with Copies() as copies:
        optimizer.materialize()
    assert copies.seen == 0
    assert torch.equal(weight, before)
    assert set(optimizer.state[weight]) == {f"{p}/{k}" for p in ("forget", "retain") for k in ("step", "exp_avg", "exp_avg_sq")}


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


def test_shares_are_rounded_up():
    assert [Division(processes=4).share(value) for value in (0, 7, 8, 9)] == [0, 2, 2, 3]
