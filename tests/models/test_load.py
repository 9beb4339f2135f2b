"""What is loaded from where, in which layout and with which attention."""

import contextlib
import dataclasses
import gc
import logging
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.utils import compare_versions
from support import examples
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    TrOCRConfig,
    TrOCRForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.data import demo
from dualoptim.method.objectives import FORGET
from dualoptim.method.scores import score
from dualoptim.models.adapter import base_of
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import attention_implementation, load_config, load_model, quantization_options
from dualoptim.models.loaded import Loading
from dualoptim.models.packing import BLOCKWISE
from dualoptim.models.reference import Frozen
from dualoptim.reporting.card import model_card


def load(**fields):
    args = UnlearnArgs(**fields)
    return load_model(args, start_accelerator(args))


def test_what_takes_seconds_of_loading_is_shown(tiny, monkeypatch):
    shown = []

    def noting(what, shows):
        shown.append((what, shows))
        return contextlib.nullcontext()

    monkeypatch.setattr("dualoptim.models.load.waiting", noting)
    load(model=str(tiny), data="demo")
    assert shown == [("reading the tokenizer", True), ("trying what the model takes", True)]


def test_the_demo_is_an_untrained_model_drawn_from_the_seed():
    for args, seed in ((UnlearnArgs(), 1001), (UnlearnArgs(seed=3), 3)):
        expected = demo.tiny_model(seed)[0].state_dict()
        found = load_model(args, start_accelerator(args)).model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_is_loaded_in_float32_with_its_tokenizer_and_template(tiny, tmp_path):
    half = demo.tiny_model(0)[0].to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    loaded = load(model=str(tmp_path), data="demo")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert (loaded.template, loaded.layout.packed, loaded.layout.shares) == ("qa", True, True)
    assert loaded.tokenizer.vocab_size == AutoTokenizer.from_pretrained(tiny).vocab_size
    assert loaded.layout.device == loaded.device == torch.device("cpu")


def test_padding_can_be_asked_for(tiny):
    loaded = load(model=str(tiny), data="demo", packing=False)
    assert (loaded.layout.packed, loaded.layout.shares) == (False, False)


def test_a_model_that_mixes_packed_texts_falls_back_to_padding_with_a_warning(tiny, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=len(tokenizer))
    BloomForCausalLM(config).save_pretrained(tmp_path)  # it takes no positions at all
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = load(model=str(tmp_path), data="demo", attn_implementation="eager")
    assert (loaded.layout.packed, loaded.layout.shares) == (False, False)
    assert "BloomForCausalLM mixes packed examples; falling back to padded batches" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(
            model=str(tmp_path), data="demo", attn_implementation="eager", packing=False
        )  # nothing that was asked for is missing
    assert "mixes packed examples" not in caplog.text


@pytest.mark.parametrize(
    ("choice", "kernel", "own"), [("auto", "sdpa", BLOCKWISE), ("sdpa", "sdpa", "sdpa"), ("eager", "eager", "eager")]
)
def test_attention_on_a_cpu(choice, kernel, own, tiny):
    args = UnlearnArgs(model=str(tiny), data="demo", attn_implementation=choice)
    accelerator = start_accelerator(args)
    assert attention_implementation(args, accelerator, load_config(args)[0]) == kernel
    loaded = load_model(args, accelerator)
    assert loaded.model.config._attn_implementation == own
    assert loaded.layout.shares == (choice != "eager")


@pytest.mark.parametrize(
    ("capability", "head", "kernel"), [((8, 0), 64, "flash_attention_2"), ((7, 5), 64, "sdpa"), ((9, 0), 288, "sdpa")]
)
def test_flash_attention_is_chosen_where_its_kernels_run(capability, head, kernel, monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda"), mixed_precision="bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("dualoptim.models.load.is_flash_attn_2_available", lambda: True)
    config = LlamaConfig(hidden_size=4 * head, num_attention_heads=4)
    assert attention_implementation(UnlearnArgs(), gpu, config) == kernel
    if kernel == "sdpa":
        with pytest.raises(InputError, match=r"Ampere GPU or a newer one.*heads of at most 256; choose sdpa"):
            attention_implementation(UnlearnArgs(attn_implementation="flash_attention_2"), gpu, config)


def test_what_needs_cuda_is_refused_without_it(tiny):
    args = UnlearnArgs(model=str(tiny), data="demo", attn_implementation="flash_attention_2")
    accelerator = start_accelerator(args)
    if accelerator.device.type == "cuda":
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match=r"flash_attention_2 needs CUDA .*pip install flash-attn.* choose sdpa"):
        attention_implementation(args, accelerator, load_config(args)[0])
    for bits in (4, 8):
        with pytest.raises(InputError, match="needs CUDA, and this run has none"):
            quantization_options(accelerator, bits)


def test_a_configuration_is_read_without_weights(tiny, gguf, tmp_path):
    config, source, options = load_config(EvalArgs(model=str(tiny), data="demo"))
    assert (config.model_type, source, options) == ("llama", str(tiny), {})
    config.save_pretrained(tmp_path)
    assert load_config(EvalArgs(model=str(tmp_path), data="demo"))[0].hidden_size == config.hidden_size
    config, source, options = load_config(EvalArgs(model=str(gguf), data="demo"))
    assert (config.hidden_size, source, options) == (576, str(gguf.parent), {"gguf_file": gguf.name})


def test_the_same_model_is_the_same_at_every_load(tiny):
    args = UnlearnArgs(model=str(tiny), data="demo")
    one, other = (load_model(dataclasses.replace(args, seed=seed), start_accelerator(args)).model for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------- weights in 16 bits

DEEPSPEED, PLAIN = DistributedType.DEEPSPEED, DistributedType.NO


@pytest.mark.parametrize(
    ("strategy", "use", "stored", "changes", "dtype"),
    [
        (PLAIN, "measure", "float32", {}, torch.bfloat16),
        (PLAIN, "train", "bfloat16", {}, torch.float32),
        (PLAIN, "train", "bfloat16", {"use_lora": True}, torch.bfloat16),
        (DEEPSPEED, "train", "bfloat16", {}, torch.bfloat16),  # its masters are made of these
        (DEEPSPEED, "train", "float32", {}, torch.float32),
        (DEEPSPEED, "train", "float16", {}, torch.float32),  # which bfloat16 would round
    ],
)
def test_how_weights_lie_in_a_launch_in_16_bits(strategy, use, stored, changes, dtype, tiny):
    args = UnlearnArgs(model=str(tiny), data="demo", **changes)
    launched = SimpleNamespace(mixed_precision="bf16", distributed_type=strategy, state=SimpleNamespace())
    assert Loading.of(args, launched, use, stored).dtype == dtype
    launched.mixed_precision = "no"
    assert Loading.of(args, launched, use, stored).dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}], ids=["all weights", "LoRA"])
def test_weights_have_one_name_whatever_they_are_loaded_for(sixteen_bits, tiny, changes):
    args = UnlearnArgs(model=str(tiny), data="demo", **changes)
    accelerator = start_accelerator(args)
    one, other = (load_model(args, accelerator, use) for use in ("train", "measure"))
    assert {weight.dtype for weight in other.model.parameters() if not weight.requires_grad or not changes} == {torch.bfloat16}
    assert {weight.dtype for weight in one.model.parameters() if weight.requires_grad} == {torch.float32}
    assert one.weights_hash() == other.weights_hash()


@pytest.mark.parametrize("strategy", [PLAIN, DEEPSPEED])
def test_a_checkpoint_in_16_bits_takes_no_more_to_load(strategy, tiny, tmp_path):
    """Memory of this process that no file stands behind, at its highest while the model is loaded."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).bfloat16()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    half = 2 * sum(weight.numel() for weight in whole.parameters())
    del whole
    gc.collect()
    use = "measure" if strategy == PLAIN else "train"
    args = UnlearnArgs(model=str(tmp_path), data="demo", eval=False, max_length=64)
    launched = SimpleNamespace(
        mixed_precision="bf16",
        is_main_process=False,
        distributed_type=strategy,
        device=torch.device("cpu"),
        state=SimpleNamespace(),
    )
    with highest() as seen:
        loaded = load_model(args, launched, use)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    assert seen[1] - seen[0] < 1.3 * half, f"{(seen[1] - seen[0]) / half:.2f} times its weights"


@contextlib.contextmanager
def highest():
    """Anonymous memory of this process in bytes: before, and at its highest since."""

    def now():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

    seen, ended = [now(), now()], threading.Event()

    def watch():
        while not ended.wait(0.002):
            seen[1] = max(seen[1], now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


# ---------------------------------------------------------------------------------------------- models that are not as most are

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "d_model": 32}
MODELS = {
    "xlstm": lambda n: xLSTMForCausalLM(xLSTMConfig(vocab_size=n, hidden_size=32, num_blocks=2, num_heads=4)),
    "trocr": lambda n: TrOCRForCausalLM(TrOCRConfig(vocab_size=n, **DECODER)),
    "gemma2": lambda n: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=n, **SIZES, head_dim=8, num_key_value_heads=2, query_pre_attn_scalar=8)
    ),
    "mamba": lambda n: MambaForCausalLM(MambaConfig(vocab_size=n, hidden_size=32, num_hidden_layers=2)),
    "bloom": lambda n: BloomForCausalLM(BloomConfig(vocab_size=n, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda n: MptForCausalLM(MptConfig(vocab_size=n, d_model=32, n_heads=4, n_layers=2)),
    "openai": lambda n: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=n, n_embd=32, n_layer=2, n_head=4)),
}


def saved(kind, tiny, folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    MODELS[kind](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["gemma2", "mamba", "bloom", "mpt", "openai", "trocr"])
def test_a_model_without_sdpa_takes_eager(kind, tiny, tmp_path):
    saved(kind, tiny, tmp_path)
    assert load(model=str(tmp_path), data="demo").model.config._attn_implementation == "eager"
    args = UnlearnArgs(model=str(tmp_path), data="demo", attn_implementation="sdpa")
    with pytest.raises(InputError, match=r"--attn-implementation sdpa: \w+ has no such kernel; choose eager$"):
        load_model(args, start_accelerator(args))


BROKEN = pytest.mark.skipif(compare_versions("transformers", "<", "5.24"), reason="older xLSTM fails on texts of 64 tokens")


@pytest.mark.parametrize("kind", [pytest.param("xlstm", marks=BROKEN), "trocr", "gemma2"])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_those_of_one_text_at_a_time_whatever_the_model_ignores(kind, packing, tiny, tmp_path):
    """xLSTM and TrOCR give logits of every position, though they were asked for some."""
    saved(kind, tiny, tmp_path)
    loaded = load(model=str(tmp_path), data="demo", packing=packing, eval=False)
    texts = examples(5)
    with torch.no_grad():
        model = loaded.model.eval()
        found = score(model, loaded.batch(texts)).log_prob
        head = model.get_output_embeddings()
        expected, seen = [], []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for text in texts:
            every = model(torch.tensor(text.ids)[None], use_cache=False).logits[0].log_softmax(-1)
            expected += [every[place - 1, text.ids[place]] for place in range(text.start, len(text.ids))]
        handle.remove()
    assert torch.allclose(found, torch.stack(expected), atol=2e-5)

    if kind == "gemma2":  # it caps its logits after the head
        return
    undial = FORGET["UNDIAL"]
    frozen = Frozen(loaded, tmp_path / "reference", [undial], 3)
    frozen.score(loaded, undial, texts)
    logits = frozen.reader(undial)(texts, torch.device("cpu")).logits
    wanted = [head(x[0, text.start - 1 : len(text.ids) - 1]) for x, text in zip(seen, texts, strict=True)]
    assert torch.allclose(logits(slice(None)), torch.cat(wanted), atol=2e-5)


def on_the_hub(folder, cache, revision):
    """Put a model's folder into a cache of the hub as the revision `revision` of me/tiny."""
    place = cache / "models--me--tiny"
    commit = revision.ljust(40, "0").encode().hex()[:40]
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / revision).write_text(commit)


def test_a_revision_of_the_hub_is_taken(tiny, taught, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    on_the_hub(tiny, tmp_path, "main")
    on_the_hub(taught, tmp_path, "v1")
    args = UnlearnArgs(model="me/tiny", data="demo", eval=False)
    accelerator, hashes = start_accelerator(args), {}
    for name in ("me/tiny", "me/tiny@main", "me/tiny@v1", str(tiny), str(taught)):
        hashes[name] = load_model(dataclasses.replace(args, model=name), accelerator).weights_hash()
    assert hashes["me/tiny"] == hashes["me/tiny@main"] == hashes[str(tiny)]
    assert hashes["me/tiny@v1"] == hashes[str(taught)] != hashes[str(tiny)]
    for name, why in (
        ("me/tiny@v2", "AutoConfig cannot load it"),
        ("me/tiny@", "no revision after the @; give a branch, a tag"),
    ):
        with pytest.raises(InputError, match=f"^--model {name}: .*{why}"):
            load_model(dataclasses.replace(args, model=name), accelerator)
    asked = dataclasses.replace(args, model="me/tiny@v1", use_lora=True)
    load_model(asked, accelerator).model.save_pretrained(tmp_path / "adapter")
    assert base_of(str(tmp_path / "adapter")) == "me/tiny@v1"
    assert "\nbase_model: me/tiny\n" in model_card(asked, "unlearned")
    (tmp_path / "a@b").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_config(dataclasses.replace(args, model=str(tmp_path / "a@b")))
