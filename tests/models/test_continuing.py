"""Texts whose neighbours come and go are gone on from as each alone is."""

import pytest
import torch
from accelerate.utils import compare_versions
from support import GROUPED
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dualoptim.models.continuing import Texts

SIZES = GROUPED | {"head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "learned positions": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97)),
    "ALiBi": (BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)),
    "windows": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES | MIXED)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES | MIXED)),
    "chunks": (Llama4ForCausalLM, Llama4TextConfig(
        **SIZES, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
    )),
    "experts": (MixtralForCausalLM, MixtralConfig(**SIZES, **EXPERTS)),
    "sinks": (GptOssForCausalLM, GptOssConfig(**SIZES, **MIXED, **EXPERTS)),
}  # fmt: skip
TEXTS = {
    0: [5, 9, 3, 7, 8, 2, 4, 6, 11, 15],
    1: [7, 3, 12],
    2: [4, 4, 9, 13, 2, 6],
    3: [21] * 13,
    4: [8, 1, 17, 5, 30],
    5: [2],
    6: [3, 5, 7, 3],
}


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def logits_of(texts, model, tokens):
    """Logits of so many tokens more, for each text by its number."""
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        found = texts.go_on(model, settings)
    return dict(zip(texts.numbers, torch.stack(found, 1), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_texts_come_and_go_without_a_trace(name):
    """Short and long ones beside each other, within windows and beyond them."""
    model = made(*KINDS[name])
    parts = {n: [] for n in TEXTS}

    def go_on(texts, tokens):
        for n, logits in logits_of(texts, model, tokens).items():
            parts[n].append(logits)

    def begin(*numbers):
        texts = Texts.of({n: TEXTS[n] for n in numbers}, 0).with_cache(model)
        go_on(texts, 1)
        return texts

    texts = begin(0, 1, 2)
    go_on(texts, 2)
    texts.keep([1])  # narrower than before
    texts.add(begin(3, 4))  # and wider
    go_on(texts, 3)
    texts.keep([2, 0])
    texts.add(begin(5, 6))
    go_on(texts, 6)
    texts.keep([0, 1, 3])
    go_on(texts, 4)
    assert texts.numbers == [4, 1, 6]
    assert texts.lengths == [len(TEXTS[n]) + added for n, added in ((4, 14), (1, 16), (6, 11))]
    for n, found in parts.items():
        (alone,) = logits_of(Texts.of({0: TEXTS[n]}, 0), model, 16).values()
        own = torch.cat(found)
        torch.testing.assert_close(own, alone[: len(own)], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    compare_versions("transformers", "<", "5.24"), reason="older versions are told apart by answers alone (test_decoding)"
)
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MambaForCausalLM, MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=97)),
        (JambaForCausalLM, JambaConfig(**SIZES, num_experts=2, use_mamba_kernels=False, mamba_d_state=8, attn_layer_offset=1)),
    ],
    ids=["mamba", "jamba"],
)
def test_what_is_kept_of_a_text_is_keys_and_values_or_it_is_left_alone(kind, config):
    with pytest.raises(ValueError, match="keeps more than keys and values"):
        Texts.of(TEXTS, 0).with_cache(made(kind, config))
