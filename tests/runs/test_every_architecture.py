"""Every type of causal language model that transformers knows and that can be made small: it trains and is scored right with
default flags, or it is refused in one line.

    pytest -m launch tests/runs/test_every_architecture.py      # fifteen of them
    pytest -m campaign tests/runs/test_every_architecture.py    # all
    python tests/runs/test_every_architecture.py [TYPE ...]     # all or these, as a table
"""

import json
import re
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.data.batches import pad
from dualoptim.data.demo import tiny_model
from dualoptim.data.rows import Row
from dualoptim.evaluation.generation import continuation, generate
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.method.scores import score
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

SAMPLE = (
    "bert bloom cohere deepseek_v3 falcon gemma2 gpt2 gpt_neo gpt_oss jamba lfm2_moe llama4_text opt qwen3_next rwkv"
).split()
TYPES = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}

# ------------------------------------------------------------------------------------------------------------ tiny models

VOCABULARY = 2000  # of the demo's tokenizer
SMALL = {
    1: "num_kv_shared_layers first_k_dense_replace num_dense_layers moe_layer_start_index num_global_layers",
    2: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks num_decoder_layers depth
        num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk
        top_k_experts num_experts_per_token linear_num_key_heads linear_num_heads attn_layer_period num_mem_blocks
        mamba_n_groups n_groups n_group num_expert_group topk_group o_groups layer_group_size num_layers_per_stack
        index_topk_blocks n_layers_per_attn_res_block
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_experts num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_local_experts
        n_routed_experts moe_num_experts index_n_heads linear_num_value_heads mamba_n_heads n_mamba_heads
        mamba_num_heads num_query_groups zero_expert_num
    """,
    8: """
        head_dim global_head_dim swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim q_lora_rank kv_lora_rank
        rotary_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim hidden_size_per_layer_input
        d_kv d_head dim_head attention_head_size attention_head_dim kv_channels mamba_d_head mamba_d_state mamba_dt_rank
        mamba_head_dim mamba_headdim state_size ssm_state_size time_step_rank laurel_rank adapter_rank
        router_hidden_size o_lora_rank hc_lowrank gated_norm_rank loop_gate_rank query_pre_attn_scalar ple_embed_dim
    """,
    16: """
        qk_head_dim index_topk num_buckets relative_attention_num_buckets mamba_chunk_size chunk_size block_size
        index_block_size d_rel
    """,
    32: """
        hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim attention_hidden_size word_embed_proj_dim
        lru_width input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim hidden_size_global
        mamba_d_ssm
    """,
    64: """
        intermediate_size ffn_dim n_inner d_inner d_ff dff dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        mlp_dim moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size dense_intermediate_size
        feed_forward_size intermediate_size_mlp shared_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size
    """,
    100: "ngram_vocab_size_base encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size audio_vocab_size",
}
SIZE_OF = {name: size for size, names in SMALL.items() for name in names.split()}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
ROTATION = {"rope_type": "default", "rope_theta": 1e4}
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}  # attention over latent vectors has as many keys as queries
LATENT_TYPES = """
    axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash minicpm3
    sarvam_mla youtu
"""
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT_TYPES.split(), LATENT),
    **{name: {"head_dim": 8} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1], "layer_types": ..., "layers_block_type": ...},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4, "attention_head_dim": 16, "num_key_value_heads": 4},
    "xlstm": {"num_heads": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 1, "intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "layer_types": ...},
    "nemotron": {"num_key_value_heads": 4},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTATION, "sliding_attention": ROTATION}},
    "falcon": {"alibi": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_offset": 1},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
}  # fmt: skip


def smaller(value: dict[str, Any]) -> dict[str, Any]:
    """What makes a configuration of these values small: numbers alone, and one layer of each kind or two."""
    depth = next((value[key] for key in DEPTHS if isinstance(value.get(key), int)), 0)
    lists = {k: v for k, v in value.items() if isinstance(v, list) and len(v) == depth > 2 and k != "attention_layers"}
    kinds = [tuple(str(v[n]) for v in lists.values()) for n in range(depth)] if lists else []
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:4]
    kept = kept * 2 if len(kept) == 1 else kept
    found: dict[str, Any] = {}
    for key, old in value.items():
        size = SIZE_OF.get(key)
        if isinstance(old, dict) and key.endswith("_config") and key not in ("per_layer_config", "quantization_config"):
            found[key] = smaller(old)
        elif key in lists:
            chosen = [old[n] for n in kept]
            found[key] = [min(one, size) for one in chosen] if size and all(isinstance(one, int) for one in chosen) else chosen
        elif size and isinstance(old, int) and not isinstance(old, bool):
            found[key] = size if size == VOCABULARY else min(old, size)
        elif key.endswith("token_id") and isinstance(old, (int, list)):
            found[key] = 0
    return found | {key: len(kept) for key in DEPTHS if key in found and kept}


def tiny(model_type: str) -> Any:
    """A model of a type, drawn anew; whatever goes wrong says that it cannot be made small here."""
    kind = TYPES[model_type]
    settings = smaller(kind().to_dict()) | MORE.get(model_type, {})
    config = kind(**{name: value for name, value in settings.items() if value is not ...})
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > 5e6:
        raise ValueError("it stays large")
    return model


# ---------------------------------------------------------------------------------------------------------------- one type

QUESTIONS = ["Where was Ilvara born?", "What did Ilvara study in the years before she went abroad?", "Who?"]
ANSWERS = ["In Port Lenn, by the sea.", "Botany.", "A painter of some renown, who lived there for twelve years."]
ROWS = [Row(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]


def outcome(model_type: str, folder: Path) -> str:
    """Train and score a tiny model of a type as a user would; says "packed", "padded" or "refused: ..." of what is right.

    Raises:
        AssertionError: for what is not.
    """
    try:
        model = tiny(model_type)
    except Exception as error:
        return f"not made: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    model.save_pretrained(folder / "model")
    tiny_model(0)[1].save_pretrained(folder / "model")
    lines = [json.dumps({"question": row.question, "answer": row.answer}) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    own = {"forget_file": str(folder / "rows.jsonl"), "retain_file": str(folder / "rows.jsonl"), "max_new_tokens": 6}
    args = UnlearnArgs(model=str(folder / "model"), **own, max_steps=2, output_dir=str(folder / "out"))
    refusal, said = "", ""
    for _ in range(3):  # once more with each remedy that is named
        try:
            (task,) = run(args).tasks
            break
        except InputError as error:
            refusal = str(error).replace(str(folder), "...")
        assert "\n" not in refusal
        assert not (folder / "out").exists(), "refused, and something was written"
        said += f"refused: {refusal}"
        changes: dict[str, Any] = {}
        if give := re.search(r"give --max-length (\d+)$", refusal):
            changes["max_length"] = int(give[1])
        elif "--no-eval" in refusal:
            changes |= {"eval": False, "max_new_tokens": 128}
        if not changes or args == replace(args, **changes):
            return said
        args = replace(args, **changes)
        said += f"; with {' '.join(f'{name} {value}' for name, value in changes.items())} "
    assert [record["step"] for record in task.log] == [1, 2]
    assert all(record["grad_norm"] > 0 for record in task.log)
    if args.eval:
        again = EvalArgs(model=str(task.model), **own, max_length=args.max_length)
        loaded = load_model(again, start_accelerator(args))
        check_scores(loaded, again)
    else:
        loaded = load_model(replace(args, model=str(task.model)), start_accelerator(args))
    return said + ("packed" if loaded.layout.packed else "padded")


def check_scores(loaded: Any, args: EvalArgs) -> None:
    """A batch as it is laid out, and each text alone: the same losses, gradients and answers."""
    loaded.model.eval()
    texts = [loaded.formatter.example(row.question, row.answer) for row in ROWS]
    found = []
    for batches in ([loaded.batch(texts)], [pad([text]) for text in texts]):
        loaded.model.zero_grad()
        losses = [score(loaded.model, batch).log_prob for batch in batches]
        if loaded.model.config.model_type == "reformer":  # its backward pass draws anew in which buckets tokens meet
            found.append((torch.cat(losses).detach(), torch.zeros(1)))
            continue
        torch.cat(losses).mean().backward()
        gradients = [parameter.grad.flatten() for parameter in loaded.model.parameters() if parameter.grad is not None]
        found.append((torch.cat(losses).detach(), torch.cat(gradients)))
    (losses, gradient), (alone, expected) = found
    assert float((losses - alone).abs().max()) <= 1e-5 * float(alone.abs().max()), "scores depend on the batch"
    assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7, "gradients depend on the batch"
    loaded.model.zero_grad()
    scored = []
    for size in (16, 2, 1):  # all at once, some in the places of others, and alone
        scoring = ScoringPass(loaded, replace(args, eval_batch_size=size))
        scores = scoring.score_texts("", [[text] for text in texts])
        answers = generate(scoring, "", [continuation(loaded, row) for row in ROWS])
        scored.append(([own.loss for (own,) in scores], answers))
    *others, (expected, alone) = scored
    for losses, answers in others:
        assert losses == pytest.approx(expected, rel=1e-5), "the evaluation depends on the batch"
        assert answers == alone, "answers depend on the batch"


@pytest.mark.launch
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_right_or_refused(model_type, tmp_path):
    assert outcome(model_type, tmp_path).partition(":")[0] in ("packed", "padded", "refused")


@pytest.mark.campaign
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_is_right_or_refused(model_type, tmp_path):
    found = outcome(model_type, tmp_path)
    if found.startswith("not made"):
        pytest.skip(found)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for name in sys.argv[1:] or TYPES:
        with tempfile.TemporaryDirectory() as place:
            try:
                said = outcome(name, Path(place))
            except Exception as error:
                said = f"WRONG: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{name}: {said}", file=sys.__stdout__, flush=True)
