"""Where packed texts lie, as flash-attention's kernel is told; on a CPU torch's own attention stands in for it."""

from dataclasses import replace

import pytest
import torch
from accelerate.utils import compare_versions
from support import MODELS, examples, flash_stand_in

from dualoptim.data.batches import pack
from dualoptim.method.scores import score
from dualoptim.models.loaded import Layout
from dualoptim.models.places import places_of, takes_places

CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch):
    return flash_stand_in(monkeypatch)


def flash(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.autocast("cpu", torch.bfloat16)  # the kernels have 16 bits
def test_the_kernel_is_told_and_computes_the_same_bits(name, told):
    if name == "gpt2" and compare_versions("transformers", "<", "5.24"):
        pytest.skip("older versions choose GPT-2's attention where it is built")
    model, texts = flash(name), examples(5)
    assert takes_places(model)
    told.clear()
    whole = score(model, Layout(CPU, packed=True, told=True)(texts))
    assert told == [max(len(text.ids) for text in texts)] * 2
    asked = score(model, Layout(CPU, packed=True)(texts))
    assert len(told) == 4
    if compare_versions("transformers", ">=", "5.24"):  # older ones read the length themselves
        assert all(isinstance(length, torch.Tensor) for length in told[2:])
    assert torch.equal(whole.logits, asked.logits)
    model.config._attn_implementation = "sdpa"
    assert torch.allclose(whole.logits, score(model, pack(texts)).logits, atol=3e-2)


def test_other_kernels_and_models_that_take_nothing_unknown_are_told_nothing(told):
    model = flash("llama")
    forward = model.forward

    def narrow(input_ids, position_ids, attention_mask, logits_to_keep, use_cache):
        return forward(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep
        )

    model.forward = narrow
    assert not takes_places(model)
    model.forward = forward
    assert takes_places(model.train())
    assert model.training
    model.config._attn_implementation = "sdpa"
    assert not takes_places(model)


def test_a_kernel_that_is_told_otherwise_is_not_trusted(told, monkeypatch):
    wrong = {"cu_seq_lens_q": torch.tensor([0, 8], dtype=torch.int32), "cu_seq_lens_k": torch.tensor([0, 8], dtype=torch.int32)}
    monkeypatch.setattr("dualoptim.models.places.places_of", lambda texts: places_of(texts) | wrong)
    assert not takes_places(flash("llama"))


def test_padded_and_shared_texts_are_laid_out_without():
    texts = examples(3)
    assert Layout(CPU, packed=False, told=True)(texts).places == {}
    assert Layout(CPU, packed=True)(texts).places == {}
    batch = replace(pack(texts), places=places_of(texts)).to(torch.device("meta"))
    assert {name: getattr(value, "device", value) for name, value in batch.places.items()} == {
        "cu_seq_lens_q": torch.device("meta"),
        "cu_seq_lens_k": torch.device("meta"),
        "max_length_q": max(len(text.ids) for text in texts),
        "max_length_k": max(len(text.ids) for text in texts),
    }
