"""Low-rank adapters: which modules get one, what trains, and a saved one on its base."""

import dataclasses
import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import state_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
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
    plain = load_model(UnlearnArgs(model=str(tiny), data="demo"), accelerator)
    adapted = load_model(args, accelerator)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = plain.model(ids).logits
        assert torch.equal(adapted.model(ids).logits, expected)
        for name, parameter in adapted.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            if "lora_B" in name:
                parameter.fill_(0.05)
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


# ------------------------------------------------------------------------------------------------ adapters made elsewhere


def made(folder, tiny, config=None, tokenizer=False):
    """What PEFT's `save_pretrained` leaves of an adapter that is not zero; the tokenizer lies with the base alone."""
    torch.manual_seed(5)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        config or peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return model


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.arange(11)[None]).logits


def load(model, **fields):
    args = UnlearnArgs(model=str(model), data="demo", **fields)
    return load_model(args, start_accelerator(args))


def rewritten(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["LoRA", "DoRA", "LoHa", "IA3"],
)
def test_an_adapter_without_a_tokenizer_reads_as_its_base(config, tiny, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "prompt.json").write_text('{"template": "chat", "tags": null}')
    expected = logits_of(made(tmp_path / "adapter", base, config))
    loaded = load(tmp_path / "adapter", template="qa")
    assert torch.allclose(logits_of(loaded.model), expected, atol=1e-4)
    assert loaded.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny).get_vocab()
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "prompt_tuning"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "prefix_tuning"),
        (peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "p_tuning"),
    ],
)
def test_an_adapter_that_changes_no_weights_is_refused(config, kind, tiny, tmp_path):
    made(tmp_path, tiny, config, tokenizer=True)
    for changes in ({}, {"use_lora": True}):
        with pytest.raises(
            InputError, match=rf"^--model {tmp_path}: a {kind} adapter is no change of weights.* give one of LoRA"
        ):
            load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "the adapter does not say which model it is of; write that model's folder or hub id into"),
        ("", "the adapter does not say which model it is of"),
        ("/nowhere/base", "the adapter's base /nowhere/base is not there; put it back, or write its new place into"),
        ("~/no such folder", "the adapter's base ~/no such folder is not there"),
        ("gone/with/it", "its base gone/with/it: no such folder"),
        ("nobody/nothing", "its base nobody/nothing: AutoConfig cannot load it"),
    ],
)
def test_an_adapter_whose_base_is_gone_says_so(base, said, tiny, tmp_path):
    made(tmp_path, tiny)
    rewritten(tmp_path, base_model_name_or_path=base)
    with pytest.raises(InputError, match=f"^--model {tmp_path}: {said}") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {}, "its file lacks 6 tensors (base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, "),
        (lambda state: {f"_orig_mod.{name}": value for name, value in state.items()}, "its names have '_orig_mod.' in them"),
        (lambda state: dict(list(state.items())[1:]), "its file lacks base_model.model.model.layers.0"),
    ],
    ids=["empty", "prefixed", "one"],
)
def test_an_adapter_that_lacks_weights_is_refused(change, said, tiny, tmp_path):
    made(tmp_path, tiny)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    for changes in ({}, {"use_lora": True}):
        with pytest.raises(InputError, match=f"^--model {tmp_path}: .*{re.escape(said)}"):
            load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": 64}, "--lora-rank 64 has no effect on the adapter in .*, which has 4; drop it"),
        ({"lora_alpha": 16}, "--lora-alpha 16 has no effect on the adapter in .*, which has 8"),
        ({"lora_dropout": 0.5}, "--lora-dropout 0.5 has no effect on the adapter in .*, which has 0.0"),
        ({"lora_target_modules": ("v_proj",)}, "--lora-target-modules v_proj has no effect on .*, which is on q_proj; drop it"),
        ({"lora_target_modules": ("q_proj", "v_proj")}, "--lora-target-modules q_proj v_proj has no effect"),
    ],
)
def test_an_adapter_that_exists_is_as_it_is(changes, said, tiny, tmp_path):
    made(tmp_path, tiny, tokenizer=True)
    with pytest.raises(InputError, match=said):
        load(tmp_path, use_lora=True, **changes)
    same = {"lora_rank": 4, "lora_alpha": 8, "lora_target_modules": ("q_proj",)}
    for own in ({}, same):
        assert load(tmp_path, use_lora=True, **own).model.peft_config["default"].r == 4


def test_a_run_stores_what_the_adapter_has_and_not_the_defaults(tiny, tmp_path):
    made(tmp_path / "adapter", tiny)
    done = run(
        UnlearnArgs(
            model=str(tmp_path / "adapter"),
            data="demo",
            use_lora=True,
            eval=False,
            max_steps=1,
            output_dir=str(tmp_path / "out"),
        )
    )
    folder = done.tasks[0].folder
    for text in ((folder / "config.yaml").read_text(), (folder / "model" / "README.md").read_text()):
        assert re.search(r"lora_rank: 4\nlora_alpha: 8\n", text)
    assert json.loads((folder / "model" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    ],
    ids=["head", "embeddings", "both", "a head of its own"],
)
def test_an_adapter_on_tied_embeddings_is_the_same_beside_the_weights_and_merged(config, tiny, tmp_path):
    expected = logits_of(made(tmp_path / "adapter", tiny, config))
    merged = load(tmp_path / "adapter")
    assert torch.allclose(logits_of(merged.model), expected, atol=1e-4)
    assert torch.allclose(logits_of(load(tmp_path / "adapter", use_lora=True).model), expected, atol=1e-4)
    export_model(merged, tmp_path / "merged", "a card")
    assert torch.allclose(logits_of(load(tmp_path / "merged").model), expected, atol=1e-4)


def test_merging_leaves_tied_embeddings_tied_where_the_adapter_is_elsewhere(tiny, tmp_path):
    made(tmp_path / "adapter", tiny)
    merged = load(tmp_path / "adapter")
    assert merged.model.get_output_embeddings().weight is merged.model.get_input_embeddings().weight
    assert merged.model.config.tie_word_embeddings
    export_model(merged, tmp_path / "merged", "a card")
    assert "lm_head.weight" not in state_of(tmp_path / "merged")


# --------------------------------------------------------------------------------------------------- what takes an adapter

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LATENT = {"head_dim": 16, "qk_rope_head_dim": 8, "o_groups": 2, "q_lora_rank": 16, "o_lora_rank": 16}
SMALL = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 8}
ODD = {
    "phimoe": lambda n: PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=4, vocab_size=n)),
    "llama4": lambda n: Llama4ForCausalLM(
        Llama4TextConfig(**SIZES, head_dim=8, intermediate_size_mlp=64, num_local_experts=4, vocab_size=n)
    ),
    "deepseek_v4": lambda n: transformers.DeepseekV4ForCausalLM(
        transformers.DeepseekV4Config(**SIZES, **LATENT, **SMALL, vocab_size=n)
    ),
    "falcon": lambda n: FalconForCausalLM(FalconConfig(**SIZES, vocab_size=n)),
    "mamba": lambda n: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=n)),
}


def odd(kind, tiny, folder):
    if kind == "deepseek_v4" and not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip(f"transformers {transformers.__version__} has no DeepSeek-V4")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ODD[kind](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "left_out"), [("phimoe", "router"), ("llama4", "router"), ("deepseek_v4", "o_a_proj"), ("falcon", "lm_head")]
)
def test_all_linear_means_layers_that_do_what_a_linear_layer_does(kind, left_out, tiny, tmp_path):
    odd(kind, tiny, tmp_path)
    loaded = load(tmp_path, use_lora=True)
    leaves = {name.split(".")[-4] for name, weight in loaded.model.named_parameters() if "lora_A" in name}
    assert left_out not in leaves
    assert leaves
    out = loaded.model(torch.arange(12)[None], use_cache=False).logits
    out.logsumexp(-1).sum().backward()
    if left_out != "lm_head":
        with pytest.raises(
            InputError, match=f"--lora-target-modules {left_out}: .* takes no adapter; choose from .*q.* or all-linear"
        ):
            load(tmp_path, use_lora=True, lora_target_modules=("k_proj" if kind != "deepseek_v4" else "kv_proj", left_out))


def test_what_peft_says_of_a_model_is_passed_on(tiny, tmp_path):
    odd("mamba", tiny, tmp_path)
    said = r"all-linear: PEFT says: .*'out_proj' is incompatible with Mamba.*; choose from dt_proj, in_proj, lm_head or x_proj$"
    with pytest.raises(InputError, match=said):
        load(tmp_path, use_lora=True)
    load(tmp_path, use_lora=True, lora_target_modules=("in_proj", "x_proj"))


def test_each_of_several_modules_has_to_be_there(tiny):
    with pytest.raises(InputError, match="--lora-target-modules query: not in this model"):
        load(tiny, use_lora=True, lora_target_modules=("q_proj", "query"))
    load(tiny, use_lora=True, lora_target_modules=("layers.0.self_attn.q_proj", "embed_tokens"))
