"""What tests of objectives share: rows of the oracles as texts, scores with a reference or by hand, and losses of both."""

import dataclasses

import torch
from support import Bigram

from dualoptim.data.prompts import Example
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import Reference, TokenScores, score

OBJECTIVES = {name: objective for name, objective in {**FORGET, **RETAIN}.items() if objective}


def examples_of(batch) -> list[Example]:
    """Oracle rows (ids and labels with -100) as examples: the scored tokens are those with a label."""
    examples = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        scored = [position for position, label in enumerate(labels) if label != -100]
        assert scored == list(range(scored[0], scored[-1] + 1))
        assert [ids[p] for p in scored] == [labels[p] for p in scored]
        examples.append(Example(ids[: scored[-1] + 1], scored[0]))
    return examples


def loss_of(name, scores, beta=None, gamma=None):
    """The sum over all units, with the published constants or these."""
    return OBJECTIVES[name].resolved({"beta": beta, "gamma": gamma}, 0)(scores)


def mean_of(name, scores, batch, beta=None, gamma=None):
    return loss_of(name, scores, beta, gamma) / OBJECTIVES[name].count(batch)


def scores_with_reference(model, reference, batch, layer=None):
    """What the loop gives an objective: scores, and all that a frozen model says about the same tokens."""
    with torch.no_grad():
        frozen = score(reference, batch, layer)
    return dataclasses.replace(
        score(model, batch, layer), reference=Reference(frozen.log_prob, frozen.logits.__getitem__, frozen.hidden)
    )


def scores_of(logits, labels, sequence=None):
    sequence = torch.zeros(len(labels), dtype=torch.long) if sequence is None else torch.tensor(sequence)
    logits = torch.tensor(logits, dtype=torch.float64)
    logsumexp = logits.logsumexp(-1)
    log_prob = logits.gather(-1, torch.tensor(labels)[:, None])[:, 0] - logsumexp
    correct = logits.argmax(-1) == torch.tensor(labels)
    count = int(sequence.max()) + 1
    return TokenScores(
        log_prob, logsumexp, logits.mean(-1), correct, sequence, count, torch.tensor(labels), logits, torch.arange(len(labels))
    )


TEXTS = [Example([1, 2, 3, 4], 2), Example([5, 6, 7], 1), Example([3, 1, 8, 2], 1), Example([9, 8, 7, 6, 5], 3)]


def models(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Bigram(torch.randn(12, 12, generator=generator, dtype=torch.float64)) for _ in range(2)]
