"""Muon for hidden matrices, AdamW for the rest: each is torch's own, and a matrix moves by its gradient without its scale."""

import pytest
import torch
from support import MODELS
from transformers import LlamaConfig, LlamaForCausalLM

from dualoptim import InputError, UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.method.groups import decay_groups
from dualoptim.method.muon import hidden_apart

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
BOTH = UnlearnArgs(forget_optimizer="muon", retain_optimizer="muon")
RATES = {"forget": 1e-2, "retain": 5e-3}
STEPS = ("forget", "retain", "retain", "forget", "retain")


def groups_of(model):
    return hidden_apart(decay_groups(model, 0.01), model)


def optimizer_of(model, args=BOTH):
    return kind_of(args).build(args)(groups_of(model))


def gradients_of(model):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(one.shape, generator=generator) for one in model.parameters()] for _ in STEPS]


@needs_muon
def test_both_phases_are_bitwise_torchs_own_two_optimizers():
    torch.manual_seed(0)
    ours = MODELS["llama"]()
    theirs = LlamaForCausalLM(ours.config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizer_of(ours)
    hidden, *others = (group["params"] for group in groups_of(theirs))
    by_hand = {
        phase: (
            torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [{"params": others[0], "weight_decay": 0.01}, {"params": others[1], "weight_decay": 0}], fused=True
            ),
        )
        for phase in RATES
    }
    for phase, values in zip(STEPS, gradients_of(ours), strict=True):
        for model in (ours, theirs):
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.grad = value.clone()
        optimizer.use(phase, RATES[phase])
        optimizer.step()
        for one in by_hand[phase]:
            for group in one.param_groups:
                group["lr"] = RATES[phase]
            one.step()
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    again = optimizer_of(theirs)
    again.load_state_dict(optimizer.state_dict())
    one, other = (list(each.state.values()) for each in (optimizer, again))
    assert [state.keys() for state in one] == [state.keys() for state in other]
    assert all(torch.equal(state[key], same[key]) for state, same in zip(one, other, strict=True) for key in state)


@needs_muon
def test_a_matrix_moves_along_the_singular_vectors_of_its_gradient_and_as_far_as_adamw():
    """Whatever the gradient's scale: singular values that differ by a factor of 300 come out at 0.6 to 1.3 times one."""
    model, scale = torch.nn.Linear(24, 64, bias=False), 0.2 * 64**0.5
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 24, generator=generator))[0] for size in (64, 24))
    gradient = left @ torch.diag(torch.logspace(0, 2.5, 24)) @ right.T
    for factor in (1e-3, 1e3):
        optimizer, before = optimizer_of(model), model.weight.detach().clone()
        optimizer.use("forget", 1e-2)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        model.weight.grad = factor * gradient
        optimizer.step()
        moved = (before - model.weight.detach()) / 1e-2
        along = left.T @ moved @ right / scale
        assert float(along.diag().min()) > 0.6
        assert float(along.diag().max()) < 1.3
        assert float((along - along.diag().diag()).abs().max()) < 0.05
        assert 0.1 < float(moved.square().mean().sqrt()) < 0.3, "of AdamW's steps 0.2 is the published mean"


def test_only_matrices_within_layers_are_hidden():
    """Whether the output head is the embeddings or a matrix of its own; vectors and frozen weights are not."""
    for tied in (True, False):
        config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
        config.tie_word_embeddings = tied
        model = LlamaForCausalLM(config)
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = groups_of(model)
        found = sorted(names[id(one)] for group in groups if group["hidden"] for one in group["params"])
        assert [name.split(".", 3)[-1].removesuffix("_proj.weight") for name in found] == [
            *("mlp.down", "mlp.gate"),
            *(f"self_attn.{part}" for part in "koqv"),
        ]
        assert sum(len(group["params"]) for group in groups) == len(names) - 1
        assert all(group["decayed"] for group in groups if group["hidden"])


@pytest.mark.parametrize("flag", ["forget_optimizer", "retain_optimizer"])
def test_a_torch_without_it_is_one_line(flag, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    args = UnlearnArgs(**{flag: "muon"})
    with pytest.raises(InputError) as error:
        kind_of(args).build(args)
    name = "--" + flag.replace("_", "-")
    assert str(error.value) == f"{name} muon needs torch 2.9 or newer; pip install 'torch>=2.9', or give adamw"
