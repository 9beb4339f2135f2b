"""Weights that are not the model's are refused with their likely cause, and what is saved is what loads again."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from dualoptim import EvalArgs, InputError
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.weights import check_saved, likely_cause

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def saved(folder, tiny, kind=LlamaForCausalLM, change=None, **settings):
    """A small model with the demo's tokenizer, its tensors changed afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    kind(LlamaConfig(**SIZES, vocab_size=len(tokenizer), **settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if change:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder):
    args = EvalArgs(model=str(folder), data="demo")
    return load_model(args, start_accelerator(args))


def renamed(old, new):
    return lambda state: {re.sub(old, new, name): value for name, value in state.items()}


def without(text):
    return lambda state: {name: value for name, value in state.items() if text not in name}


PREFIX = r"its file lacks 21 tensors \(.*, \.\.\.\); its names have '{}' in them, left by a wrapper"
GONE = "config.json is of another model, or a part of the weights is gone"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed("^", "module."), PREFIX.format("module.")),
        (renamed("^", "_orig_mod."), PREFIX.format("_orig_mod.")),
        (renamed("^", "module._orig_mod."), PREFIX.format("module._orig_mod.")),
        (renamed("^", "base_model.model."), PREFIX.format("base_model.model.")),
        (renamed(r"(layers\.\d\.)", r"\1_fsdp_wrapped_module."), r"lacks 18 tensors .* '_fsdp_wrapped_module\.' in them"),
        (renamed(r"q_proj\.", "q_proj.base_layer."), r"lacks 2 tensors .*q_proj.* its names have 'base_layer\.' in them"),
        (without("layers.1."), rf"lacks 9 tensors \(model\.layers\.1\.input_layernorm\.weight, .*{GONE}"),
        (without("layers.0.mlp.up_proj"), rf"lacks model\.layers\.0\.mlp\.up_proj\.weight; {GONE}"),
        (without("lm_head"), r"lacks lm_head\.weight; it has no output head, as embedding models and classifiers"),
        (without("embed_tokens"), rf"lacks model\.embed_tokens\.weight; {GONE}"),
    ],
)
def test_weights_that_a_file_lacks_are_not_drawn_at_random(change, said, tiny, tmp_path):
    with pytest.raises(InputError, match=said) as refusal:
        load(saved(tmp_path, tiny, change=change))
    assert str(refusal.value).startswith(f"--model {tmp_path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_an_output_head_is_refused_unless_its_embeddings_are_the_head(kind, tiny, tmp_path, caplog):
    with pytest.raises(InputError, match=r"its file lacks lm_head\.weight; it has no output head"):
        load(saved(tmp_path / "own", tiny, kind, tie_word_embeddings=False))
    with caplog.at_level(logging.WARNING):
        model = load(saved(tmp_path / "tied", tiny, kind, tie_word_embeddings=True)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(
        model.lm_head.weight, stored["embed_tokens.weight" if kind is LlamaModel else "model.embed_tokens.weight"]
    )
    assert ("its file also has what the model does not: score.weight" in caplog.text) == (kind is not LlamaModel)


def test_tensors_that_are_no_weights_of_the_model_are_named_in_one_warning(tiny, tmp_path, caplog):
    more = {f"extra.{n}": torch.zeros(2) for n in range(5)}
    with caplog.at_level(logging.WARNING):
        load(saved(tmp_path, tiny, change=lambda state: state | more))
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"--model {tmp_path}: its file also has what the model does not: 5 tensors (extra.0, extra.1, extra.2, ...)"
    ]


def test_weights_of_another_shape_are_named_with_both(tiny, tmp_path):
    folder = saved(tmp_path, tiny, change=lambda state: state | {"model.norm.weight": torch.ones(48)})
    with pytest.raises(
        InputError, match=r"model\.norm\.weight has the shape \(48,\) in its file and \(32,\) by its config\.json"
    ):
        load(folder)


def test_another_architecture_is_checked_as_well(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.1.ln_2.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"its file lacks transformer\.h\.1\.ln_2\.bias; config\.json is of another model"):
        load(tmp_path)


def test_a_cause_needs_a_name_that_fits():
    assert likely_cause({"a.weight"}, {"b.weight", "module.c.weight"}).startswith("config.json is of another model")
    assert "'x.'" in likely_cause({"a.weight"}, {"z.weight", "a.x.weight"})


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=97)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=97, tie_word_embeddings=True)),
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97)),
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=97, **EXPERTS)),  # saved under other names
        lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **LATENT, **GROUPED, num_experts_per_tok=2, vocab_size=97)
        ),
    ],
)
def test_what_was_saved_is_compared_with_what_loads(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    check_saved(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith(("layernorm.weight", "ln_1.weight")))
    for wrong in (
        without(name)(state),
        {f"_orig_mod.{name}": value for name, value in state.items()},
        state | {name: torch.ones(5)},
        state | {"more": torch.ones(1)},
    ):
        save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError, match="what was saved would not load as the model that was trained: "):
            check_saved(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="what was saved would not load"):
        check_saved(model, tmp_path)
