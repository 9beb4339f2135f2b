"""Packed, padded and one by one are the same thing, on real architectures."""

import dataclasses

import pytest
import torch
from support import MODELS, examples

from dualoptim.data.batches import pack, pad
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import score


def loss_and_gradients(model, batches, objective):
    model.zero_grad()
    total = sum(objective(score(model, batch, objective.layer)) for batch in batches)
    loss = total / sum(objective.count(batch) for batch in batches)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("objective", ["ME", "GA", "GD", "AP", "SimNPO", "SatImp", "CE-U", "PDU", "JensUn", "IHL", "RMU"])
@pytest.mark.parametrize("name", list(MODELS))
def test_packed_padded_and_one_by_one_agree(name, objective):
    torch.manual_seed(0)
    model = MODELS[name]()
    beta = {"RMU": 50.0}.get(objective, 0.1)
    chosen = {**FORGET, **RETAIN}[objective].resolved({"beta": beta, "gamma": 0.0}, 0)
    texts = examples()
    together = len(chosen.reads)  # AP's answer and refusal stay side by side
    singles = [texts[start : start + together] for start in range(0, len(texts), together)]
    shapes = {
        "packed": [pack(texts)],
        "padded": [pad(texts)],
        "one by one": [pack(single) for single in singles],
        "one by one, padded": [pad(single) for single in singles],
    }
    reference, gradient = loss_and_gradients(model, shapes.pop("packed"), chosen)
    assert gradient.norm() > 0.01
    for shape, batches in shapes.items():
        loss, other = loss_and_gradients(model, batches, chosen)
        difference = (gradient - other).abs()
        # RMU's loss is 78, of which the last bit of float32 is 8e-6
        assert float(loss) == pytest.approx(float(reference), abs=1e-5, rel=5e-7), shape
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
