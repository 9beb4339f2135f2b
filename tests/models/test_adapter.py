"""Low-rank adapters: which modules get one, what trains, and a saved one on its base."""

import dataclasses

import pytest
import torch
from support import state_of

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.models.adapter import base_of
from dualoptim.models.export import export_model
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def test_modules_that_are_not_there_and_4_bit_without_cuda(tiny, tmp_path):
    args = UnlearnArgs(model=str(tiny), data="demo", use_lora=True, output_dir=str(tmp_path))
    accelerator = start_accelerator(args)
    with pytest.raises(InputError, match=r"--lora-target-modules query: not in this model; choose from .*q_proj"):
        load_model(dataclasses.replace(args, lora_target_modules=("query",)), accelerator)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--load-in-4bit needs CUDA"):
            load_model(dataclasses.replace(args, load_in_4bit=True), accelerator)
    loaded = load_model(dataclasses.replace(args, lora_target_modules=("q_proj", "v_proj")), accelerator)
    trained = {name.split(".")[-4] for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert trained == {"q_proj", "v_proj"}


def test_an_adapter_changes_nothing_at_first_and_is_merged_or_trained_on(tiny, tmp_path):
    args = UnlearnArgs(model=str(tiny), data="demo", use_lora=True, lora_rank=2)
    accelerator = start_accelerator(args)
    plain = load_model(dataclasses.replace(args, use_lora=False), accelerator)
    adapted = load_model(args, accelerator)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = plain.model(ids).logits
        assert torch.equal(adapted.model(ids).logits, expected)
        for name, parameter in adapted.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_B" in name:
                parameter.fill_(0.1)
        moved = adapted.model(ids).logits
    assert not torch.allclose(moved, expected, atol=1e-3)
    export_model(adapted, tmp_path / "model", "a card")
    assert base_of(str(tmp_path / "model")) == str(tiny)
    assert base_of(str(tiny)) == str(tiny)
    assert all("lora_" in name for name in state_of(tmp_path / "model"))

    saved = dataclasses.replace(args, model=str(tmp_path / "model"))
    trained_on = load_model(saved, accelerator)
    merged = load_model(EvalArgs(model=saved.model, data="demo"), accelerator)
    with torch.no_grad():
        for loaded in (trained_on, merged):
            assert torch.allclose(loaded.model(ids).logits, moved, atol=1e-5)
    assert {name for name, p in trained_on.model.named_parameters() if p.requires_grad} == {
        name for name, p in adapted.model.named_parameters() if p.requires_grad
    }
    assert not any("lora_" in name for name, _ in merged.model.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.model.parameters())


def test_an_adapter_is_drawn_from_the_seed(tiny):
    args = UnlearnArgs(model=str(tiny), data="demo", use_lora=True)
    drawn = [
        {name: p.clone() for name, p in load_model(one, start_accelerator(one)).model.named_parameters() if "lora_A" in name}
        for one in (args, args, dataclasses.replace(args, seed=2))
    ]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
