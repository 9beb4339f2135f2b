"""A .gguf file holds the weights and the tokenizer that were written, whatever their type and kind."""

import sys
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from dualoptim import EvalArgs, InputError
from dualoptim.models.gguf_file import _WORDS, write_gguf
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

TEXT = "Question: Who wrote “Ünï” in 1984?\nAnswer: It's   a 🦙, 12345 of them!\n\n"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def cutting(name):
    """The pre-tokenizer that llama.cpp calls by a name."""
    parts = []
    for one in _WORDS[name]:
        if one["type"] == "Split":
            parts.append(pre_tokenizers.Split(Regex(one["pattern"]["Regex"]), "isolated"))
        elif one["type"] == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=one["use_regex"]))
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def tokenizer(words):
    """A byte-level tokenizer with two special tokens and an added one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = words, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 9, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>", pad_token="</s>")
    wrapped.add_tokens(["<think>"])
    return wrapped


def saved(folder, config, words="gpt-2", change=None):
    """A folder with an untrained model and such a tokenizer, loaded."""
    made = tokenizer(cutting(words))
    if change:
        change(made)
    config.vocab_size = len(made) + 3  # as Qwen's, which has embeddings of tokens that there are not
    config.bos_token_id, config.eos_token_id, config.pad_token_id = made.bos_token_id, made.eos_token_id, None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases and norms too
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    args = EvalArgs(model=str(folder), data="demo", max_length=64)
    return load_model(args, start_accelerator(args), "measure")


KINDS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters={"rope_theta": 500000.0}),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
}


@pytest.mark.parametrize("words", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_back_with_the_same_logits_and_tokens(kind, words, tmp_path):
    loaded = saved(tmp_path / "model", KINDS[kind], words)
    write_gguf(loaded, tmp_path / "model.gguf", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = loaded.tokenizer(TEXT + "<think></s>")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids])).logits, loaded.model(torch.tensor([ids])).logits, rtol=0, atol=1e-5
        )
    if words == "gpt-2" or find_spec(
        "transformers.integrations.gguf"
    ):  # older ones read every file as if its words were GPT-2's
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert read(TEXT + "<think></s>")["input_ids"] == ids
        assert (read.eos_token, read.bos_token) == ("</s>", "<s>")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_are_rounded_and_norms_are_not(dtype, tmp_path):
    loaded = saved(tmp_path / "model", KINDS["llama"])
    write_gguf(loaded, tmp_path / "model.gguf", dtype)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(read[name], tensor.to(getattr(torch, dtype)).float() if tensor.dim() > 1 else tensor), name


def test_frequencies_that_are_scaled_are_written_as_factors(tmp_path):
    """Those of Llama 3.1, by the formula of its paper: a wave longer than the first context is slowed by the whole factor."""
    from gguf import GGUFReader

    loaded = saved(tmp_path / "model", LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)), "llama-bpe")
    write_gguf(loaded, tmp_path / "model.gguf", "float32")
    (factors,) = [one.data for one in GGUFReader(tmp_path / "model.gguf").tensors if one.name == "rope_freqs.weight"]
    waves = [2 * torch.pi * 500000.0 ** (n / 4) for n in range(4)]
    assert [float(one) for one in factors] == pytest.approx([(1 / ((1 - s) / 8 + s)) for s in smooth(waves)], rel=1e-4)


def smooth(waves):
    """Where between slowed (0) and as it was (1) a wave lies."""
    return [min(1.0, max(0.0, (16 / wave - 1) / 3)) for wave in waves]


def spaced(made):
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowered(made):
    made.backend_tokenizer.normalizer = normalizers.Lowercase()


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "change", "why"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64), None, "gpt2 is not among what is written here"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), None, "its config.json has"),
        (LlamaConfig(**SIZES, rope_parameters=DYNAMIC), None, "its config.json has rope_type dynamic"),
        (LlamaConfig(**SIZES), spaced, "its tokenizer is not one of the byte-level ones"),
        (LlamaConfig(**SIZES), lowered, "its tokenizer is not one of the byte-level ones"),
    ],
    ids=["gpt2", "gelu", "dynamic", "a space before", "lowercase"],
)
def test_what_is_not_written_here_is_told_how_llama_cpp_does(config, change, why, tmp_path):
    loaded = saved(tmp_path / "model", config, change=change)
    with pytest.raises(InputError, match=f"--to gguf: {why}.*; write it with --to merged, and then.*convert_hf_to_gguf.py"):
        write_gguf(loaded, tmp_path / "model.gguf", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_package_it_is_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="--to gguf needs the package gguf, which is missing; pip install gguf"):
        write_gguf(None, tmp_path / "model.gguf", "float32")
