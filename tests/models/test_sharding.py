"""What dividing a model needs, on one process; launches of several are in `runs/test_shares.py`."""

import pytest
import torch
from support import MODELS

from dualoptim.models.sharding import Share, bare, is_divided, layer_lists, own_share, whole_shape, whole_tensors


class Launch:
    """What `Share` asks of a launch of three processes."""

    num_processes, process_index = 3, 0


def test_a_tensor_is_cut_into_equal_parts_that_are_the_whole_again(monkeypatch):
    whole = torch.randn(5, 2)
    shares = []
    for index in range(3):
        monkeypatch.setattr(Launch, "process_index", index)
        shares.append(Share.of(whole, Launch))
    assert [share.part.shape for share in shares] == [(4,)] * 3

    def gather(result, _):
        result.copy_(torch.cat([share.part for share in shares]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    assert all(torch.equal(share.gathered(), whole) for share in shares)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_whatever_a_model_calls_them(name):
    model = MODELS[name]()
    (layers,) = layer_lists(model).values()
    assert len(layers) == 2
    assert all(sum(weight.numel() for weight in layer.parameters()) > 5_000 for layer in layers)


def test_a_whole_model_is_its_own_share():
    model = MODELS["llama"]()
    assert not is_divided(model)
    state = model.state_dict()
    found = {name: tensor.clone() for name, tensor in whole_tensors(model)}
    assert list(found) == sorted(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert [name for name, _ in whole_tensors(model, ["lm_head.weight", "model.norm.weight"])] == [
        "lm_head.weight",
        "model.norm.weight",
    ]
    assert all(own_share(one) is one and whole_shape(one) == one.shape for one in model.parameters())


def test_a_bare_copy_computes_the_same_without_hooks():
    head = torch.nn.Linear(4, 3, bias=False)
    called = []
    head.register_forward_pre_hook(lambda *_: called.append(1))
    copied = bare(head)
    values = torch.randn(2, 4)
    assert torch.equal(copied(values), head(values))
    assert len(called) == 1
    head.weight.data.zero_()
    assert copied(values).abs().sum() > 0, "its weights are its own"
