"""Questions that packed texts share, and attention over packed texts block by block."""

import gc
import weakref

import pytest
import torch
from support import MODELS, answers, examples

from dualoptim import UnlearnArgs
from dualoptim.data.batches import pack
from dualoptim.data.prompts import Example
from dualoptim.method.scores import score
from dualoptim.models.launch import start_accelerator
from dualoptim.models.limits import keeps_apart
from dualoptim.models.load import load_model
from dualoptim.models.packing import BLOCKWISE, diagonal_blocks


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("attention", ["sdpa", BLOCKWISE])
def test_shared_questions_change_no_score_and_no_gradient(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    assert keeps_apart(model, 200, 60, share=True)
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
    assert keeps_apart(model, 200, 60)
    assert not keeps_apart(model, 200, 60, share=True)


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


def test_plain_sdpa_stays_a_choice(tiny, tmp_path):
    for choice, expected in (("auto", BLOCKWISE), ("sdpa", "sdpa")):
        args = UnlearnArgs(model=str(tiny), data="demo", attn_implementation=choice)
        loaded = load_model(args, start_accelerator(args))
        assert loaded.model.config._attn_implementation == expected
        assert loaded.layout.shares
        loaded.model.save_pretrained(tmp_path / choice)
        assert BLOCKWISE not in (tmp_path / choice / "config.json").read_text()


@pytest.mark.parametrize("lengths", [(8,), (3, 5)])
def test_a_mask_goes_with_its_blocks(lengths):
    """Nothing holds it after its forward pass: the blocks that are kept with it are no views of it."""
    mask = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()[None, None].clone()
    mask[..., -1, -2] = False
    assert [length for length, _ in diagonal_blocks(mask)] == list(lengths)
    left = weakref.ref(mask)
    del mask
    gc.collect()
    assert left() is None
