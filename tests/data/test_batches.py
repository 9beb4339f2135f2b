"""Examples as tensors: packed, packed with shared tokens, padded, and in order of their length."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from dualoptim.data.batches import in_length_order, own_texts, pack, pad
from dualoptim.data.prompts import Example

ONE, TWO = Example([5, 6, 7, 8], 2), Example([9, 1, 2], 1)
SAME_QUESTION = (Example([5, 6, 7, 8], 2), Example([5, 6, 7, 3, 4], 2))


def scored(batch):
    """The scored tokens of each example, found by their place, and the positions of the tokens that predict them."""
    positions = batch.position_ids[batch.row, batch.keep[batch.column]].tolist()
    found = zip(batch.sequence.tolist(), batch.labels.tolist(), positions, strict=True)
    assert torch.equal(batch.labels, batch.input_ids[batch.row, batch.position])
    return list(found)


EXPECTED = [(0, 7, 1), (0, 8, 2), (1, 1, 0), (1, 2, 1)]


def test_packed_examples_lie_end_to_end_and_start_anew():
    batch = pack([ONE, TWO])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.attention_mask is None
    assert batch.keep.tolist() == [1, 2, 4, 5]
    assert scored(batch) == EXPECTED
    assert (batch.num_sequences, batch.num_tokens) == (2, 7)


def test_padded_examples_have_a_row_each():
    batch = pad([ONE, TWO])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 1, 2, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.keep.tolist() == [0, 1, 2]
    assert scored(batch) == EXPECTED
    assert (batch.num_sequences, batch.num_tokens) == (2, 7)


def test_answers_to_one_question_share_the_tokens_that_they_begin_with():
    batch = pack(SAME_QUESTION, share=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert batch.keep.tolist() == [1, 2, 4]  # what predicts the first two scored tokens is the same for both
    assert scored(batch) == [(0, 7, 1), (0, 8, 2), (1, 7, 1), (1, 3, 2), (1, 4, 3)]
    assert (batch.num_sequences, batch.num_tokens) == (2, 9)


@pytest.mark.parametrize("texts", [[ONE], [ONE, TWO], [TWO, ONE, TWO]])
def test_the_mask_of_a_packed_row_is_the_one_that_transformers_makes(texts):
    batch, config = pack(texts), LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation="eager")
    embeddings = torch.zeros(1, batch.input_ids.shape[1], 8)
    theirs = create_causal_mask(config, embeddings, None, past_key_values=None, position_ids=batch.position_ids)
    assert torch.equal(own_texts(batch.position_ids), theirs == 0)


def test_texts_of_different_questions_share_nothing_and_have_no_mask():
    other_start = Example(SAME_QUESTION[1].ids, 3)
    other_question = Example([5, 1, 7, 3, 4], 2)
    whole = [Example(example.ids, 1) for example in SAME_QUESTION]
    for texts in ([ONE, TWO], [ONE, other_start], [ONE, other_question], whole):
        assert pack(texts, share=True).attention_mask is None
    assert pack(SAME_QUESTION).attention_mask is None


def test_the_longest_come_first_and_ties_keep_their_order():
    assert list(in_length_order([3, 9, 3, 4, 9], 2)) == [[1, 4], [3, 0], [2]]
    assert list(in_length_order([], 2)) == []
