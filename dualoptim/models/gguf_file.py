"""Write a model and its tokenizer as one .gguf file, which llama.cpp and what is built on it serve.

The package gguf knows the names of keys and tensors and the file's layout; which of them a model has is said here, for those
whose numbers are the same there: Llama and Qwen2 with a byte-level tokenizer. The order of the rows of queries and keys
follows from how llama.cpp rotates: pairs of neighbors, where transformers rotates one half by the other.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualoptim.atomic import beside
from dualoptim.errors import InputError
from dualoptim.models.loaded import LoadedModel

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: dict[str, Any] = {"type": "ByteLevel", "use_regex": True}
_BYTES_ALONE: dict[str, Any] = {"type": "ByteLevel", "use_regex": False}
_WORDS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": _SPLIT.format(digits=r"\p{N}{1,3}")}}, _BYTES_ALONE],
    "qwen2": [{"type": "Split", "pattern": {"Regex": _SPLIT.format(digits=r"\p{N}")}}, _BYTES_ALONE],
}
"""How a text is cut into words before these become tokens, by llama.cpp's names."""


def write_gguf(loaded: LoadedModel, file: Path, dtype: str) -> None:
    """Write the file, with matrices in `dtype` (float32, float16 or bfloat16) and the rest in float32.

    Raises:
        InputError: if the package gguf is missing, or if the model or its tokenizer is of a kind that is not known here.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("--to gguf needs the package gguf, which is missing; pip install gguf") from None
    model, config = loaded.model, loaded.model.config
    words = _words(loaded)
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    quantization, file_type = (
        gguf.GGMLQuantizationType[kind],
        gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"],
    )
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with beside(file) as place:
        writer = gguf.GGUFWriter(place, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
        writer.add_type("model")
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_settings(writer, config)
        _add_tokenizer(writer, loaded, words)
        for name, tensor in _tensors(model):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise InputError(_by_llama_cpp(f"its weight {name} has no name there"))
            array = tensor.float().cpu().numpy()
            own = quantization if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(known, gguf.quants.quantize(array, own), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _by_llama_cpp(why: str) -> str:
    """Say what to do with a model that is not written here."""
    return (
        f"--to gguf: {why}; write it with --to merged, and then, in a checkout of github.com/ggml-org/llama.cpp: "
        "python convert_hf_to_gguf.py FOLDER/model --outfile model.gguf"
    )


def _words(loaded: LoadedModel) -> str:
    """Name how the tokenizer cuts words, once model and tokenizer have proved to be of a kind that is written here.

    Raises:
        InputError: if they are not.
    """
    config = loaded.model.config
    if config.model_type not in ("llama", "qwen2"):
        raise InputError(_by_llama_cpp(f"{config.model_type} is not among what is written here, llama and qwen2"))
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    allowed = ("default", "linear", "llama3") if config.model_type == "llama" else ("default",)
    if scaling not in allowed or getattr(config, "use_sliding_window", False) or config.hidden_act != "silu":
        raise InputError(_by_llama_cpp(f"its config.json has rope_type {scaling}, a sliding window or {config.hidden_act}"))
    state = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    cut = state["pre_tokenizer"] or {}
    parts = cut.get("pretokenizers", [cut])
    plain = not any(part.get("add_prefix_space") or part.get("invert") for part in parts)
    normal = state["normalizer"] is None or state["normalizer"] == {"type": "NFC"}
    for name, known in _WORDS.items():
        same = len(parts) == len(known) and all({**part, **one} == part for part, one in zip(parts, known, strict=True))
        if state["model"]["type"] == "BPE" and same and plain and normal:
            return name
    raise InputError(_by_llama_cpp("its tokenizer is not one of the byte-level ones that are known here"))


def _add_settings(writer: Any, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head)
    if head != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head)
        writer.add_value_length(head)


def _add_tokenizer(writer: Any, loaded: LoadedModel, words: str) -> None:
    import gguf

    tokenizer, config = loaded.tokenizer, loaded.model.config
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = {number: gguf.TokenType.CONTROL if one.special else gguf.TokenType.USER_DEFINED for number, one in added.items()}
    numbers = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in numbers])
    otherwise = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    writer.add_token_types([kinds.get(n, otherwise.get(n, gguf.TokenType.UNUSED)) for n in numbers])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config.vocab_size)
        special.add_special_token["bos"] = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # unsaid, Llama 3's has one
        special.add_to_gguf(writer, quiet=True)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Give every weight as llama.cpp has it, under the model's own name, tied ones once."""
    config, tied = model.config, getattr(model, "all_tied_weights_keys", None) or {}
    rotary = model.model.rotary_emb
    head = 2 * len(rotary.inv_freq)
    base = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2, device=rotary.inv_freq.device) / head)
    if not torch.allclose(rotary.inv_freq, base):  # scaled; llama.cpp divides each frequency by a factor
        yield "rope_freqs.weight", base / rotary.inv_freq
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if config.model_type == "llama" and ("q_proj." in name or "k_proj." in name):
            tensor = tensor.reshape(-1, 2, head // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        yield name, tensor
