"""What a model is found to take: packed rows as long and as full as those of a run, long texts, batches of questions."""

import dataclasses

import pytest
import torch
from accelerate.utils import compare_versions
from support import GROUPED
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XmodConfig,
    XmodForCausalLM,
)

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.data.batches import pack, pad
from dualoptim.data.prompts import Example
from dualoptim.method.scores import score
from dualoptim.models import limits
from dualoptim.models.launch import start_accelerator
from dualoptim.models.limits import answered_at_once, check_padding, keeps_apart, packed_row
from dualoptim.models.load import load_model
from dualoptim.models.loaded import Layout
from dualoptim.models.packing import BLOCKWISE

FALCON = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97, alibi=True)
WINDOW = MistralConfig(**GROUPED, sliding_window=40)
QWEN_WINDOW = Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=40, max_window_layers=1)
CHUNK = Llama4TextConfig(
    **GROUPED, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=48, no_rope_layers=[1, 1]
)
MIXED = [[["global", "local"], 1]]
OLDER = pytest.mark.skipif(
    compare_versions("transformers", "<", "5.24"), reason="older versions mix packed texts of this model, which are then padded"
)
LEARNED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def difference(model, texts, layout):
    """How far apart scores of a batch and of each text alone are."""
    with torch.no_grad():
        together = score(model, layout(texts)).log_prob
        alone = torch.cat([score(model, pad([text])).log_prob for text in texts])
    return float((together - alone).abs().max())


def texts_of(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [Example(torch.randint(97, (length,), generator=generator).tolist(), 1) for length in lengths]


TAKES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "a window": (MistralForCausalLM, WINDOW),
    "a window in some layers": (Qwen2ForCausalLM, QWEN_WINDOW),
    "learned positions": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, **LEARNED)),
}
MIXES = {
    "ALiBi without positions": (BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97)),
    "a short convolution": (Lfm2ForCausalLM, Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])),
    "a state space": (
        JambaForCausalLM,
        JambaConfig(
            **GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_dt_rank=4, use_mamba_kernels=False
        ),
    ),
}


@pytest.mark.parametrize("name", TAKES)
def test_models_that_keep_packed_texts_apart_are_recognized(name):
    assert packed_row(made(*TAKES[name]), UnlearnArgs()) == 2304


@pytest.mark.parametrize("name", MIXES)
def test_models_that_mix_packed_texts_are_recognized(name):
    """However little: an untrained short convolution moves a logit by some 1e-5 of it."""
    assert packed_row(made(*MIXES[name]), UnlearnArgs()) == 0


def test_a_model_without_positions_of_its_own_is_recognized():
    class Mixing(LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    assert packed_row(made(Mixing, LlamaConfig(**GROUPED)), UnlearnArgs()) == 0


@OLDER
def test_positions_that_are_rounded_far_into_a_row_are_seen():
    """Falcon's ALiBi is computed in 16 bits: exact up to position 256, so a row of two short texts would not show it."""
    model = made(FalconForCausalLM, FALCON)
    assert keeps_apart(model, 64, 16)
    assert packed_row(model, UnlearnArgs()) == 0
    assert difference(model, texts_of(*[60] * 10), pack) > 1e-4


@pytest.mark.parametrize("layer", [0, 5])
def test_one_layer_of_another_kind_is_found_wherever_it_is(layer):
    kinds = ["full_attention"] * 6
    kinds[layer] = "conv"
    model = made(Lfm2ForCausalLM, Lfm2Config(**GROUPED | {"num_hidden_layers": 6}, layer_types=kinds))
    assert packed_row(model, UnlearnArgs()) == 0
    assert len(model.model.layers) == 6


def test_equal_layers_are_run_once(monkeypatch):
    """A 7B model would take minutes on a CPU."""
    model = made(LlamaForCausalLM, LlamaConfig(**GROUPED | {"num_hidden_layers": 12}))
    ran = []
    for n, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
    assert packed_row(model, UnlearnArgs()) == 2304
    assert set(ran) == {0, 1}
    ran.clear()
    score(model, pad(texts_of(5)))
    assert ran == [*range(12)]


@pytest.mark.parametrize(
    ("kind", "config", "row"),
    [
        pytest.param(GPTNeoForCausalLM, GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, vocab_size=97, max_position_embeddings=600, attention_types=MIXED
        ), 600, marks=OLDER),
        (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=600, **LEARNED), 2304),
    ],
    ids=["gpt_neo", "gpt2"],
)  # fmt: skip
def test_a_row_ends_where_the_model_does(kind, config, row):
    """Some masks end at the model's positions; texts that are more together get a row each."""
    model = made(kind, config)
    found = packed_row(model, UnlearnArgs())
    assert found == row
    layout = Layout(torch.device("cpu"), True, row=found)
    few, many = texts_of(100, 90, 80), texts_of(*[150] * 16)
    assert layout(few).input_ids.shape == (1, 270)
    assert layout(many).input_ids.shape == ((16, 150) if row < 2400 else (1, 2400))
    assert max(difference(model, texts, layout) for texts in (few, many)) < 1e-5


def test_a_row_is_as_long_as_the_run_packs():
    model = made(*TAKES["llama"])
    train = UnlearnArgs(eval=True, batch_size=2, eval_batch_size=3, max_length=50)
    assert packed_row(model, train) == 200  # two texts of each row
    assert packed_row(model, dataclasses.replace(train, eval_batch_size=7)) == 350
    assert packed_row(model, EvalArgs(model="x", eval_batch_size=1, max_length=40)) == 80


SHARED = {"llama": (*TAKES["llama"], True)} | {
    name: (kind, config, False)
    for name, kind, config in (
        ("a window", MistralForCausalLM, WINDOW),
        ("a window in some layers", Qwen2ForCausalLM, QWEN_WINDOW),
        ("chunks", Llama4ForCausalLM, CHUNK),
    )
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=OLDER if name == "chunks" else ()) for name in SHARED])
def test_a_mask_of_whole_texts_is_not_given_where_attention_is_narrower(name):
    """It would let tokens see what the window or the chunk hides; shorter texts lose nothing."""
    kind, config, shares = SHARED[name]
    model = made(kind, config)
    for kernel in ("sdpa", BLOCKWISE):
        model.set_attn_implementation(kernel)
        assert keeps_apart(model, 400, 100)
        assert keeps_apart(model, 400, 100, share=True) is shares
        assert keeps_apart(model, 400, 30, share=True)


def test_a_kernel_of_16_bits_is_compared_with_itself(monkeypatch):
    """A leak of a thousandth hides behind rounding, but not from other neighbours in the same shape."""
    monkeypatch.setattr(limits, "is_coarse", lambda model: True)
    for kind, config in TAKES.values():
        assert keeps_apart(made(kind, config).bfloat16(), 200, 60)
    leaking, offs = made(*TAKES["llama"]).bfloat16(), []
    attention = leaking.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, inputs, out: (out[0] + 0.1 * out[0].roll(1, 1), *out[1:]))
    measured = limits._off
    monkeypatch.setattr(limits, "_off", lambda *both: offs.append(measured(*both)) or offs[-1])
    assert not keeps_apart(leaking, 200, 60)
    assert max(offs) < 5e-2  # what two shapes of one text may differ by


def test_the_mode_of_the_model_stays():
    model = made(*TAKES["llama"])
    for training in (True, False):
        model.train(training)
        keeps_apart(model, 64, 16)
        assert model.training is training


# ------------------------------------------------------------------------------------------------------------- positions


def saved(folder, tiny, kind, config, change=None):
    """A model of the demo's vocabulary, beside the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if change:
        change(tokenizer)
    made(kind, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(model, **changes):
    args = UnlearnArgs(model=model, data="demo", **changes)
    return load_model(args, start_accelerator(args))


BOUND = {
    "learned": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=2000, n_positions=100)),
    "learned, from the third on": (
        OPTForCausalLM,
        OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=2000,
                  max_position_embeddings=100, word_embed_proj_dim=32),
    ),
    "a table of rotations": (
        GPTJForCausalLM, GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=2000, n_positions=100)
    ),
}  # fmt: skip
FREE = {
    "rotations": (LlamaForCausalLM, LlamaConfig(**GROUPED | {"vocab_size": 2000}, max_position_embeddings=100)),
    "ALiBi": (BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=2000)),
}


@pytest.mark.parametrize("name", BOUND)
def test_texts_beyond_the_positions_are_refused_and_answers_stop_there(name, tiny, tmp_path):
    model = saved(tmp_path, tiny, *BOUND[name])
    kernel = {"attn_implementation": "eager"} if name.startswith("a table") else {}
    with pytest.raises(InputError, match=r"^--max-length 500: the model has 100 positions; give --max-length 100$"):
        load(model, **kernel)
    loaded = load(model, max_length=100, **kernel)
    assert (loaded.answering.positions, loaded.answering.together) == (100, "equally long")
    assert load(model, max_length=60, max_new_tokens=40, **kernel).answering.positions is None


@pytest.mark.parametrize("name", FREE)
def test_positions_that_do_not_end_bind_nothing(name, tiny, tmp_path):
    kernel = {"attn_implementation": "eager"} if name == "ALiBi" else {}
    loaded = load(saved(tmp_path, tiny, *FREE[name]), max_length=300, **kernel)
    assert (loaded.answering.positions, loaded.answering.together) == (None, "refilled")


def test_a_model_that_fails_on_any_text_is_refused(tiny, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = saved(tmp_path, tiny, XmodForCausalLM, XmodConfig(**sizes, vocab_size=2000, is_decoder=True))
    with pytest.raises(InputError, match=r"XmodForCausalLM fails on a plain text \(Input language unknown.*choose another"):
        load(model)


# ----------------------------------------------------------------------------------------------------------- vocabularies


def test_a_token_without_an_embedding_is_refused(tiny, tmp_path):
    """Whatever it is: the end of a text, or of the question in a template."""
    known = len(AutoTokenizer.from_pretrained(tiny))
    config = LlamaConfig(**GROUPED | {"vocab_size": known})

    def end(tokenizer):
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})

    def turn(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})

    for change, flags in ((end, {}), (turn, {"question_end_tag": "<turn>"})):
        loaded = load(saved(tmp_path / change.__name__, tiny, LlamaForCausalLM, config, change), **flags)
        token = "<|im_end|>" if change is end else "<turn>"
        with pytest.raises(InputError) as error:
            loaded.formatter.example("Who?", "Nobody.")
        assert f"{tmp_path / change.__name__}: its tokenizer writes {token!r}, token {known}" in str(error.value)
        assert f"has embeddings of {known} tokens; call resize_token_embeddings({known + 1})" in str(error.value)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ batches


class Deaf(LlamaForCausalLM):
    """Takes padding for text."""

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class Mixed(LlamaForCausalLM):
    """Adds the rows of a batch up."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.sum(0, keepdim=True)
        return output


@pytest.mark.parametrize(
    ("kind", "config", "together"),
    [
        (*TAKES["llama"], "refilled"),
        (*TAKES["learned positions"], "refilled"),
        (*MIXES["ALiBi without positions"], "refilled"),
        (BartForCausalLM, BartConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=97
        ), "equally long"),
        (Deaf, LlamaConfig(**GROUPED), "equally long"),
        (RwkvForCausalLM, RwkvConfig(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, vocab_size=97), "none"),
        (Mixed, LlamaConfig(**GROUPED), "none"),
    ],
    ids=["llama", "gpt2", "bloom", "bart", "deaf", "rwkv", "mixed"],
)  # fmt: skip
def test_what_a_model_answers_in_one_batch(kind, config, together):
    """RWKV of transformers 5 mixes up the rows of a batch after the first token."""
    assert answered_at_once(made(kind, config), "x") == together


def test_a_model_that_reads_padding_as_text_is_refused(tiny, tmp_path):
    """Whether it comes before or after a text: there is no batch in which its scores are right."""
    check_padding(made(*MIXES["a state space"]), "x")

    class TwoWay(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + (input_ids == 0).sum(-1)[:, None, None]
            return output

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64}
    for model in (made(TwoWay, LlamaConfig(**GROUPED)), made(CpmAntForCausalLM, CpmAntConfig(**sizes, vocab_size=97))):
        with pytest.raises(
            InputError, match=r"^--model x: .* scores a text differently beside a longer one, .* choose another"
        ):
            check_padding(model, "x")
    folder = saved(tmp_path, tiny, CpmAntForCausalLM, CpmAntConfig(**sizes, vocab_size=2000))
    for packing in (True, False):
        with pytest.raises(InputError, match=r"beside a longer one|cannot generate answers"):  # in transformers 5.1
            load(folder, packing=packing, attn_implementation="eager")


def test_a_model_that_cannot_generate_is_refused():
    class Silent(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            raise ValueError("no cache")

    with pytest.raises(InputError, match=r"--model x: Silent cannot generate answers \(no cache\); .* train with --no-eval"):
        answered_at_once(made(Silent, LlamaConfig(**GROUPED)), "x")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: device-side assert")]
)
def test_what_fails_on_the_device_says_nothing_of_the_model(error, monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**GROUPED)).eval()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(model, "forward", fail)
    args = UnlearnArgs()
    for probe in (
        lambda: keeps_apart(model, 64, 32),
        lambda: answered_at_once(model, "m"),
        lambda: limits.last_position(args, model),
    ):
        with pytest.raises(type(error), match=str(error)):
            probe()
