"""Packed, padded and one by one are the same thing, on real architectures."""

import dataclasses

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dualoptim.data.tofu import Example, pack, pad
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.models.load import takes_packed_rows
from dualoptim.method.scores import score

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}


def examples(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 23, (count,), generator=generator).tolist()
    return [
        Example(
            torch.randint(97, (length,), generator=generator).tolist(), int(torch.randint(1, length, (1,), generator=generator))
        )
        for length in lengths
    ]


def loss_and_gradients(model, batches, objective, beta=0.1):
    model.zero_grad()
    results = [objective.loss(score(model, batch, objective.layer), beta, 0.0) for batch in batches]
    loss = sum(total for total, _ in results) / sum(count for _, count in results)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("objective", ["ME", "GA", "GD", "AP", "SimNPO", "SatImp", "CE-U", "PDU", "RMU"])
@pytest.mark.parametrize("name", list(MODELS))
def test_packed_padded_and_one_by_one_agree(name, objective):
    torch.manual_seed(0)
    model = MODELS[name]()
    chosen = {**FORGET, **RETAIN}[objective].resolved(None, None, 0)
    texts = examples()
    together = len(chosen.reads)  # AP's answer and refusal stay side by side
    singles = [texts[start : start + together] for start in range(0, len(texts), together)]
    shapes = {
        "packed": [pack(texts)],
        "padded": [pad(texts)],
        "one by one": [pack(single) for single in singles],
        "one by one, padded": [pad(single) for single in singles],
    }
    beta = 50.0 if objective == "RMU" else 0.1
    reference, gradient = loss_and_gradients(model, shapes.pop("packed"), chosen, beta)
    assert gradient.norm() > 0.01
    for shape, batches in shapes.items():
        loss, other = loss_and_gradients(model, batches, chosen, beta)
        difference = (gradient - other).abs()
        assert float((loss - reference).abs()) <= 1e-5, shape
        assert float(difference.max()) <= 1e-5, shape
        assert float(difference.mean()) <= 1e-6, shape


def test_packed_rows_do_not_see_each_other():
    """The numbers of an example must not change with its neighbour."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    first, second, other = examples(3)
    with torch.no_grad():
        one, two = (score(model, pack([first, neighbour])) for neighbour in (second, other))
    scored = len(first.ids) - first.start
    assert torch.allclose(one.log_prob[:scored], two.log_prob[:scored], atol=1e-6)


@pytest.mark.parametrize("name", list(MODELS))
def test_models_that_take_packed_rows_are_recognized(name):
    torch.manual_seed(0)
    assert takes_packed_rows(MODELS[name]())


def test_a_model_that_mixes_packed_rows_is_recognized():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97))  # no position_ids at all
    assert not takes_packed_rows(bloom)

    class Mixing(LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):
            return super().forward(*args, **kwargs)

    assert not takes_packed_rows(Mixing(LlamaConfig(**SIZES)))


def test_the_probe_leaves_the_mode_of_the_model_alone():
    model = MODELS["llama"]()
    for training in (True, False):
        model.train(training)
        takes_packed_rows(model)
        assert model.training is training


@pytest.mark.parametrize("collate", [pack, pad])
def test_scores_equal_a_plain_forward(collate):
    torch.manual_seed(0)
    model = MODELS["llama"]()
    texts = examples(5)
    batch = collate(texts)
    with torch.no_grad():
        scores = score(model, batch)
        position = 0
        for index, text in enumerate(texts):
            logits = model(torch.tensor([text.ids])).logits[0, text.start - 1 : -1]
            labels = torch.tensor(text.ids[text.start :])
            own = slice(position, position + len(labels))
            expected = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
            assert torch.allclose(scores.log_prob[own], expected, atol=1e-5)
            assert torch.allclose(scores.mean_logit[own], logits.mean(-1), atol=1e-6)
            assert torch.equal(scores.correct[own], logits.argmax(-1) == labels)
            assert scores.sequence[own].tolist() == [index] * len(labels)
            assert torch.allclose(scores.per_sequence(scores.log_prob)[index], expected.sum(), atol=1e-4)
            position += len(labels)
    assert scores.lengths().tolist() == [len(text.ids) - text.start for text in texts]
    assert batch.num_tokens == sum(len(text.ids) for text in texts)


def test_half_precision_logits_are_widened():
    torch.manual_seed(0)
    model = MODELS["llama"]().to(torch.bfloat16)
    with torch.no_grad():
        assert score(model, pack(examples(2))).log_prob.dtype == torch.float32


def test_a_batch_moves_whole():
    batch = pack(examples(2))
    moved = batch.to(torch.device("cpu"))
    assert [field.name for field in dataclasses.fields(moved)] == list(vars(batch))
    assert moved.attention_mask is None
