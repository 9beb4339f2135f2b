"""Weights rounded to what others store: how far, which of them, and in what layout."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dualoptim.models.rounding import round_weights, row_by_row

NF4 = (  # arXiv 2305.14314, appendix E, without its negative half
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
)  # fmt: skip


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


def rounded(model, kind):
    """What changes of a model: weights by name, before and after, and how it was done."""
    other = copy.deepcopy(model)
    how = round_weights(other, kind)
    before, after = model.state_dict(), other.state_dict()
    return {name: (before[name], after[name]) for name in before if not torch.equal(before[name], after[name])}, how


def test_eight_bits_of_llama_cpp_are_blocks_of_32_with_a_scale_in_16_bits(model):
    changed, how = rounded(model, "q8_0")
    assert "q8_0" in how
    assert set(changed) == {name for name, weight in model.state_dict().items() if weight.dim() > 1}  # the embeddings as well
    for old, new in changed.values():
        blocks, stored = old.reshape(-1, 32), new.reshape(-1, 32)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
        assert torch.allclose(stored, (stored / scale.clamp(min=1e-9)).round() * scale, atol=1e-6)
        assert ((blocks - stored).abs() <= scale * 0.6).all()


def test_four_bits_of_llama_cpp_put_the_largest_weight_at_an_end(model):
    changed, _ = rounded(model, "q4_0")
    for name, (old, new) in changed.items():
        blocks, stored = old.reshape(-1, 32), new.reshape(-1, 32)
        values = [len(one.unique()) for one in stored]
        if "proj" not in name:  # tied embeddings and head have more bits there
            assert max(values) > 16
            continue
        assert max(values) <= 16
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (largest / -8).half().float()
        levels = stored / scale
        assert torch.allclose(levels, levels.round(), atol=1e-3)
        assert (levels.round().amin(1) == -8).all()
        assert levels.amax() < 7.01
        assert ((blocks - stored).abs() <= scale.abs() * 1.01).all()


def test_finer_types_change_weights_less(model):
    def far(kind):
        return sum(((old - new) ** 2).sum() for name, (old, new) in rounded(model, kind)[0].items() if "proj" in name)

    errors = [float(far(kind)) for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_nf4_has_its_sixteen_levels_in_blocks_of_64(model):
    changed, how = rounded(model, "nf4")
    assert "NF4" in how
    assert set(changed) == {name for name in model.state_dict() if "proj" in name}
    for old, new in changed.values():
        blocks, stored = old.reshape(-1, 64), new.reshape(-1, 64)
        scale = stored.abs().amax(1, keepdim=True)  # itself in 8 bits
        assert torch.allclose(scale, blocks.abs().amax(1, keepdim=True), rtol=0.05)
        positive = (stored / scale)[stored > 0]
        assert ((positive[:, None] - torch.tensor(NF4)).abs().amin(1) < 1e-3).all()
        assert max(len(one.unique()) for one in stored) <= 16


def test_rows_that_no_blocks_fill_have_16_bits_and_turned_matrices_their_inputs_in_a_row():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=48, n_layer=1, n_head=2, n_positions=16, n_inner=64))
    changed, _ = rounded(model, "q4_0")
    old, new = changed["transformer.h.0.mlp.c_fc.weight"]  # [inputs, outputs], of 48 inputs
    assert torch.equal(new, old.half().float())
    old, new = changed["transformer.h.0.mlp.c_proj.weight"]  # of 64
    assert max(len(one.unique()) for one in new.T.reshape(-1, 32)) <= 16


def test_thresholds_of_llm_int8_are_what_they_were_after_a_model_was_asked():
    """What they do is CUDA's: tests/gpu."""
    layer = torch.nn.Linear(2, 2)
    layer.state = SimpleNamespace(threshold=6.0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)
    with row_by_row(model):
        assert layer.state.threshold == 0.0
    assert layer.state.threshold == 6.0
