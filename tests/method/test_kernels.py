"""What makes a step cheaper must not move its numbers: losses with and without each, from the same seed."""

import dataclasses

import pytest
import torch
from test_scores import MODELS, examples

from dualoptim.method import loop
from dualoptim.models import load as modeling
from dualoptim import run
from dualoptim.method import scores
from dualoptim.models.packing import BLOCKWISE, diagonal_blocks
from dualoptim.data.tofu import Example, pack
from dualoptim.models.load import takes_packed_rows
from dualoptim.method.scores import score

PAIRS = ("ME+GD", "IDK+AP", "NPO+KL", "DPO+GD", "UNDIAL+KLQ", "CE-U+GD", "PDU+GD")


def plain_statistics(logits, labels, column):
    logits = logits[column]
    logsumexp = logits.logsumexp(-1)
    log_prob = logits.gather(-1, labels[:, None])[:, 0] - logsumexp
    return log_prob, logsumexp, logits.mean(-1), logits.argmax(-1) == labels


def plain_targets(logits, targets, divergence):
    q = targets(slice(None)).softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, q, reduction="none")
    return cross_entropy - torch.special.entr(q).sum(-1) if divergence else cross_entropy


def without(name, monkeypatch):
    """Switch one of them off; the changes to the arguments that this takes."""
    if name == "shared questions":
        monkeypatch.setattr(modeling, "_sees_all", lambda *_: False)
    elif name == "statistics with one gradient tensor":
        monkeypatch.setattr(scores._Statistics, "apply", plain_statistics)
    elif name == "targets some rows at a time":
        monkeypatch.setattr(scores._AgainstTargets, "apply", plain_targets)
    elif name == "sparse gradient of tied embeddings":
        monkeypatch.setattr(loop, "is_sharded", lambda _: True)
    return {"attn_implementation": "sdpa"} if name == "attention block by block" else {}


@pytest.fixture(scope="module")
def fast(taught, tmp_path_factory):
    return run(arguments(taught, tmp_path_factory.mktemp("fast"))).tasks


def arguments(taught, folder, **changes):
    from dualoptim import UnlearnArgs

    common = {"model": str(taught), "data": "demo", "learning_rates": (1e-4,), "retain_freq": 1, "max_steps": 6, "eval": False}
    return UnlearnArgs(**common, forget_losses=PAIRS, output_dir=str(folder), **changes)


@pytest.mark.parametrize(
    "name",
    [
        "attention block by block",
        "shared questions",
        "statistics with one gradient tensor",
        "targets some rows at a time",
        "sparse gradient of tied embeddings",
    ],
)
def test_the_losses_are_the_same_without(name, fast, taught, tmp_path, monkeypatch):
    slow = run(arguments(taught, tmp_path, **without(name, monkeypatch))).tasks
    for one, other in zip(fast, slow, strict=True):
        for record, expected in zip(one.log, other.log, strict=True):
            place = f"{one.losses}, step {record['step']}"
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5), place
            assert (record["count"], record["tokens"]) == (expected["count"], expected["tokens"]), place


def answers(shared, lengths, seed=0, alike=0):
    """Texts with `shared` tokens in common, and answers of these lengths, whose first `alike` tokens agree as well."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.randint(97, (shared + alike,), generator=generator).tolist()
    return [Example([*question, n, *torch.randint(97, (n - 1,), generator=generator).tolist()], shared) for n in lengths]


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("attention", ["sdpa", BLOCKWISE])
def test_shared_questions_change_no_score_and_no_gradient(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    assert takes_packed_rows(model, share=True)
    alike = sorted(answers(6, (2, 3, 5), seed=2, alike=4) + answers(6, (4,), seed=2), key=lambda text: text.ids)
    texts = [*answers(5, (3, 1, 4)), *examples(2), *answers(4, (2, 6), seed=1), *alike, alike[-1]]
    found = []
    for share in (False, True):
        model.zero_grad()
        batch = pack(texts, share)
        result = score(model, batch, layer=0)
        (result.log_prob.sum() + result.hidden.square().sum()).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((batch, result.log_prob.detach(), result.hidden.detach(), gradient))
    (long, *expected), (short, *values) = found
    same = len({tuple(text.ids[:n]) for text in alike for n in range(1, len(text.ids) + 1)})  # the nodes of their tree
    assert long.input_ids.shape[1] - short.input_ids.shape[1] == 5 + 5 + 4 + sum(len(t.ids) for t in [*alike, alike[-1]]) - same
    assert len(short.keep) < len(short.labels) == len(long.keep)
    assert long.num_tokens == short.num_tokens
    assert torch.equal(long.labels, short.labels)
    assert torch.equal(short.input_ids[0, short.position], short.labels)
    for value, other in zip(values, expected, strict=True):
        assert torch.allclose(value, other, atol=1e-4, rtol=1e-5)


def test_texts_that_share_nothing_have_no_mask():
    assert pack(examples(3), share=True).attention_mask is None
    first, second = answers(4, (2, 2))
    other_start = Example(second.ids, 3)
    assert pack([first, other_start], share=True).attention_mask is None
    other_question = Example([*first.ids[:3], first.ids[3] + 1, *first.ids[4:]], 4)
    assert pack([first, other_question], share=True).attention_mask is None
    assert pack([first, second]).attention_mask is None
    whole_texts = [Example(text.ids, 1) for text in (first, second)]  # the question scored as well, as KLQ does
    assert pack(whole_texts, share=True).attention_mask is None


def test_a_model_that_adds_its_mask_shares_nothing():
    """Eager attention adds what sdpa takes as true and false."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    model.set_attn_implementation("eager")
    assert takes_packed_rows(model)
    assert not takes_packed_rows(model, share=True)


def test_a_window_shorter_than_a_text_forbids_sharing():
    model = MODELS["qwen2"]()
    assert modeling._sees_all(model, 500)
    model.config.sliding_window = 100
    assert not modeling._sees_all(model, 500)
    assert modeling._sees_all(model, 100)


def test_diagonal_blocks_hold_all_that_a_mask_allows():
    texts = [*answers(5, (3, 1)), *examples(2)]
    mask = pack(texts, share=True).attention_mask
    blocks = diagonal_blocks(mask)
    assert [length for length, _ in blocks] == [5 + 3 + 1, *(len(text.ids) for text in texts[2:])]
    (_, shared), *others = blocks
    assert all(own is None for _, own in others)
    assert int(shared.sum()) + sum(length * (length + 1) // 2 for length, _ in others) == int(mask.sum())
    assert diagonal_blocks(mask) is blocks
    window = torch.tril(torch.ones(6, 6)) - torch.tril(torch.ones(6, 6), -2)  # each sees itself and the one before
    assert len(diagonal_blocks(window.bool()[None, None])) == 1
    assert diagonal_blocks(mask.float()) == []
    assert diagonal_blocks(mask.expand(2, -1, -1, -1)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_the_statistics_is_autograds(dtype):
    torch.manual_seed(0)
    logits = torch.randn(70, 33, dtype=dtype)  # more rows than are taken at once
    column = torch.cat([torch.arange(70), torch.tensor([3, 68, 3])]).flip(0)  # some rows predict several labels
    labels = torch.randint(33, (73,))
    factors = torch.randn(3, 73)
    gradients = []
    for statistics in (
        scores._Statistics.apply,
        lambda z, *places: plain_statistics(z.float() if dtype == torch.bfloat16 else z, *places),
    ):
        z = logits.clone().requires_grad_()
        found = statistics(z, labels, column)
        sum((factor * value).sum() for factor, value in zip(factors, found, strict=False)).backward()
        gradients.append((z.grad, *(value.detach() for value in found)))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [True, False])
def test_the_gradient_against_targets_is_autograds(dtype, divergence, monkeypatch):
    monkeypatch.setattr(scores._AgainstTargets, "rows", 8)
    torch.manual_seed(0)
    logits = torch.randn(21, 33, dtype=dtype)
    wanted = torch.randn(21, 33, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    wanted[:, 5] = -torch.inf  # as CE-U rules out the label
    factors = torch.randn(21)
    found = []
    for function in (scores._AgainstTargets.apply, plain_targets):
        z = logits.clone().requires_grad_()
        values = function(z if function is not plain_targets else scores.widened(z), wanted.__getitem__, divergence)
        (factors * values).sum().backward()
        found.append((values.detach(), z.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 4096.0), (torch.bfloat16, 1 / 499)])
def test_16_bit_gradients_against_targets_take_their_factor_in_32(dtype, factor):
    """A loss is divided by a count, and in fp16 scaled up: neither is rounded first, and small values wait for their scale."""
    torch.manual_seed(0)
    logits = torch.randn(4, 50_000).to(dtype).requires_grad_()
    targets = torch.randn(4, 50_000)
    (factor * scores._AgainstTargets.apply(logits, targets.__getitem__, True)).sum().backward()
    expected = factor * (logits.detach().float().softmax(-1) - targets.softmax(-1))
    found = logits.grad.float()
    assert logits.grad.dtype == dtype
    # what all errors have in common, as a rounded factor would show
    assert float((found * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=5e-4)
    small = (expected.abs() < 1e-3) & (expected.abs() > 1e-4) if dtype == torch.float16 else expected.abs() > 0
    assert small.any()
    assert ((found - expected).abs()[small] / expected.abs()[small]).mean() < (2e-3 if dtype == torch.float16 else 5e-3)


def test_plain_sdpa_stays_a_choice(small_args, tmp_path):
    for choice, expected in (("auto", BLOCKWISE), ("sdpa", "sdpa")):
        args = dataclasses.replace(small_args, attn_implementation=choice)
        policy = modeling.load_policy(args, modeling.start_accelerator(args))
        assert policy.model.config._attn_implementation == expected
        assert policy.shares
        policy.model.save_pretrained(tmp_path / choice)
        assert BLOCKWISE not in (tmp_path / choice / "config.json").read_text()
