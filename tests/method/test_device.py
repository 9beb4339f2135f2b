"""What a step hands to its device: copies, casts that are kept for a window, and gradients that are clipped or left alone."""

import math

import pytest
import torch
from accelerate import Accelerator
from support import MODELS, Asked, examples
from torch._subclasses import FakeTensorMode

from dualoptim.data.batches import pack
from dualoptim.method.device import added_up, casting_once, clipped, sent
from dualoptim.method.objectives import RETAIN
from dualoptim.method.scores import score

CPU, META = torch.device("cpu"), torch.device("meta")


def test_what_is_sent_are_tensors_also_those_of_a_dictionary():
    given = {"one": torch.ones(2), "inner": {"two": torch.ones(3), "length": 3}, "name": None}
    found = sent(given, META)
    assert (found["one"].device, found["inner"]["two"].device) == (META, META)
    assert (found["inner"]["length"], found["name"]) == (3, None)
    assert sent(given["one"], CPU) is given["one"]


@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
def test_only_a_hosts_memory_is_pinned_for_its_way_to_a_gpu(place, monkeypatch):
    """CUDA refuses another's; without a GPU, its tensors are pretended."""
    pinned, later = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: later.append(non_blocking) or self)
    with FakeTensorMode():
        sent({"ids": torch.zeros(3, device=place), "texts": 3}, torch.device("cuda:0"))
    assert len(pinned) == (place == "cpu")
    assert later == [place == "cpu"]


def test_a_single_process_adds_up_without_asking_its_device():
    with Asked() as asked:
        assert added_up(Accelerator(cpu=True), [3, 0, 2**40]) == [3, 0, 2**40]
    assert not asked.operations
    assert not asked.waits


def gradients_of_a_window(region):
    """The gradients of three micro-batches in 16-bit products, and how many weights were cast."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    casts = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and any(args[0] is one for one in model.parameters()):
                casts.append(kwargs["dtype"])
            return function(*args, **(kwargs or {}))

    with Casts(), region:
        for seed in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                scores = score(model, pack(examples(3, seed=seed)))
            assert not torch.is_autocast_enabled("cpu")  # what a loss is made of keeps its precision
            RETAIN["GD"](scores).backward()
    return [one.grad for one in model.parameters()], casts.count(torch.bfloat16)


def test_weights_are_cast_once_for_all_micro_batches_of_a_window():
    """With the same bits in every gradient."""
    apart, every_time = gradients_of_a_window(casting_once(CPU, 1))
    together, once = gradients_of_a_window(casting_once(CPU, 3))
    assert every_time == 3 * once > 0
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with casting_once(CPU, 3):
        assert (weight @ weight).dtype == torch.float32


@pytest.mark.parametrize(("limit", "multiplied"), [(0.0, 0), (1.0, 1)])
def test_gradients_are_multiplied_only_where_a_limit_is_given(limit, multiplied):
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 3.0)
    with Asked() as asked:
        norm = clipped(Accelerator(cpu=True), [weight, torch.nn.Parameter(torch.ones(1))], limit)
    assert not asked.waits
    assert asked.operations["_foreach_mul_"] == multiplied
    assert norm.tolist() == [6.0]
    assert math.isclose(float(weight.grad.norm()), limit or 6.0, rel_tol=1e-5)
