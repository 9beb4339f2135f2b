"""Which parameters decay, and which may be kept in 8 bits."""

import torch

from dualoptim.data import demo
from dualoptim.method.groups import decay_groups


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decayed, free = decay_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01
    assert free["weight_decay"] == 0.0
    assert [p is q for p, q in zip(decayed["params"], [model[0].weight, model[1].weight], strict=True)] == [True, True]
    assert len(free["params"]) == 3


def test_what_may_be_kept_in_bytes_is_a_group_of_its_own():
    """Not biases, norms and small tensors, and embeddings only if that is asked for."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(80, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 8), torch.nn.LayerNorm(64)
    )
    for with_embeddings, in_bytes in ((False, [model[1].weight]), (True, [model[0].weight, model[1].weight])):
        groups = decay_groups(model, 0.01, bits=8, quantize_embeddings=with_embeddings)
        found = [parameter for group in groups if group["bits"] == 8 for parameter in group["params"]]
        assert [p is q for p, q in zip(found, in_bytes, strict=True)] == [True] * len(in_bytes)
        assert all(group["decayed"] for group in groups if group["bits"] == 8)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_frozen_parameters_belong_to_no_group():
    model, _ = demo.tiny_model(0)
    model.get_input_embeddings().weight.requires_grad_(False)
    grouped = {id(parameter) for group in decay_groups(model, 0.01) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
