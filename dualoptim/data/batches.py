"""Examples to one batch of tensors: packed end to end, or padded where a model's attention cannot tell texts apart."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dualoptim.data.prompts import Example
from dualoptim.method.scores import Batch


def pack(examples: Sequence[Example], share: bool = False) -> Batch:
    """Lay examples end to end in one row, positions restarting at each: no padding and no attention mask.

    With `share`, an example that has its question in common with the one before it brings only the tokens in which they
    differ, and a mask hides the rest of one from the other: the same numbers from fewer tokens. In the order of their tokens
    answers to a question share the most.
    """
    paths: list[np.ndarray] = []  # where in the row the tokens of each example lie
    brought: list[int] = []  # how many of them lie there already
    length = 0
    for index, example in enumerate(examples):
        before = _common(examples[index - 1], example) if share and index else 0
        own = np.arange(length, length + len(example.ids) - before)
        paths.append(np.concatenate([paths[-1][:before], own]) if before else own)
        brought.append(before)
        length += len(own)
    parts = [example.ids[before:] for example, before in zip(examples, brought, strict=True)]
    ids = np.array(list(itertools.chain.from_iterable(parts)))
    mask = None
    if any(brought):
        mask = np.zeros((length, length), dtype=bool)
        for path, before in zip(paths, brought, strict=True):
            mask[np.ix_(path[before:], path)] = np.tri(len(path), dtype=bool)[before:]
    scored = np.concatenate([path[example.start :] for path, example in zip(paths, examples, strict=True)])
    predicting = np.concatenate([path[_before(example)] for path, example in zip(paths, examples, strict=True)])
    keep, column = np.unique(predicting, return_inverse=True)
    sequence = np.repeat(np.arange(len(examples)), [len(example.ids) - example.start for example in examples])
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(
            np.concatenate([np.arange(before, len(path)) for path, before in zip(paths, brought, strict=True)])
        )[None],
        attention_mask=None if mask is None else torch.from_numpy(mask)[None, None],
        keep=torch.from_numpy(keep),
        row=torch.zeros(len(scored), dtype=torch.long),
        column=torch.from_numpy(column),
        position=torch.from_numpy(scored),
        labels=torch.from_numpy(_labels(examples)),
        sequence=torch.from_numpy(sequence),
        num_sequences=len(examples),
        num_tokens=sum(len(example.ids) for example in examples),
    )


def own_texts(position_ids: Tensor) -> Tensor:
    """Say what the tokens of a packed row [1, L] see: those before them in their own text. A mask bool [1, 1, L, L]."""
    text = (position_ids == 0).cumsum(-1)
    return (text[:, None, :, None] == text[:, None, None, :]).tril()


def _before(example: Example) -> np.ndarray:
    """Say at which place of a text each scored token is predicted; the first one, which nothing predicts, at its own."""
    return np.arange(example.start - 1, len(example.ids) - 1).clip(0)


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.concatenate([example.labels or example.ids[example.start :] for example in examples])


def _common(one: Example, other: Example) -> int:
    """Count the tokens with which two examples both begin; 0 if these are not of one question.

    That is, if they differ before their first scored token, or if all of them are scored: then it would be chance, and a mask
    for all texts together costs more than it saves.
    """
    if one.start != other.start or one.start <= 1:
        return 0
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.ids, other.ids, strict=False)))
    return same if same >= one.start else 0


def pad(examples: Sequence[Example]) -> Batch:
    """Give each example a row, padded on the right to the longest, for models whose attention cannot take packed rows."""
    length = max(len(example.ids) for example in examples)
    first = max(min(example.start for example in examples) - 1, 0)  # logits are computed from here to the end
    ids, mask = np.zeros((2, len(examples), length), dtype=np.int64)
    row, column, position = [], [], []
    for index, example in enumerate(examples):
        ids[index, : len(example.ids)] = example.ids
        mask[index, : len(example.ids)] = 1
        column.append(_before(example) - first)
        position.append(np.arange(example.start, len(example.ids)))
        row.append(np.full(len(column[-1]), index))
    rows, columns, positions = map(np.concatenate, (row, column, position))
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(length).repeat(len(examples), 1),
        attention_mask=torch.from_numpy(mask),
        keep=torch.arange(first, length - 1),
        row=torch.from_numpy(rows),
        column=torch.from_numpy(columns),
        position=torch.from_numpy(positions),
        labels=torch.from_numpy(_labels(examples)),
        sequence=torch.from_numpy(rows),
        num_sequences=len(examples),
        num_tokens=int(mask.sum()),
    )


def in_length_order(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Put indices into batches of `size` of similar length, the longest first, so that memory runs out at once if it does."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return (order[start : start + size] for start in range(0, len(order), size))
