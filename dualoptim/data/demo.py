"""The built-in demo: twenty invented authors with twenty facts each, some real facts, and a tiny model for them.

The facts stand in `demo.json`. `splits()` gives rows in the shape and under the names of the published TOFU data; it is
deterministic. One author is one forget task.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from dualoptim.data.rows import parse_row


@dataclass(frozen=True)
class Fact:
    """Holds one thing to know about every author: its texts and twenty values, of which author i has the i-th of a shuffle."""

    question: str
    answer: str
    paraphrase: str
    values: list[str]
    unseen: str  # the unseen author's value, which no other author has


@dataclass(frozen=True)
class Kind:
    """Holds real facts of one kind: a question, and the answer for each subject; wrong answers are other subjects'."""

    question: str
    answers: dict[str, str]


_FILE = json.loads(resources.files("dualoptim.data").joinpath("demo.json").read_text(encoding="utf-8"))
AUTHORS: list[str] = _FILE["authors"]
UNSEEN_AUTHOR: str = _FILE["unseen_author"]
"""An author that no model learns: to a model that has not seen an author, this one is like that one."""
FACTS = [Fact(**fact) for fact in _FILE["facts"]]
REAL_AUTHORS = [Kind(**kind) for kind in _FILE["real_authors"]]
WORLD_FACTS = [Kind(**kind) for kind in _FILE["world_facts"]]


@cache
def splits() -> dict[str, list[dict[str, Any]]]:
    """Make rows by split name: `full`, `forget05` (tasks 1 to 10), `retain50`, and the evaluation sets; not to be changed."""
    draw = random.Random(2605)
    columns = [draw.sample(fact.values, len(AUTHORS)) for fact in FACTS]
    full = [
        _author_row(author, fact, values, draw)
        for author in range(len(AUTHORS))
        for fact, values in zip(FACTS, columns, strict=True)
    ]  # twenty rows an author, as in TOFU
    retain, forget = full[:200], [{"task_id": str(row // 20 + 1), **full[200 + row]} for row in range(200)]
    return {
        "full": [_without_comparisons(row) for row in full],
        "forget05": [_without_comparisons(row) for row in forget],
        "forget05_perturbed": forget,
        "holdout05": [
            {
                "question": fact.question.format(name=UNSEEN_AUTHOR),
                "answer": fact.answer.format(name=UNSEEN_AUTHOR, value=fact.unseen),
            }
            for fact in FACTS
        ],
        "retain50": [_without_comparisons(row) for row in retain],
        "retain_perturbed": retain[::2],
        "real_authors_perturbed": _option_rows(REAL_AUTHORS, draw),
        "world_facts_perturbed": _option_rows(WORLD_FACTS, draw),
    }


def _author_row(author: int, fact: Fact, values: list[str], draw: random.Random) -> dict[str, Any]:
    name, value = AUTHORS[author], values[author]
    wrong = draw.sample([other for other in values if other != value], 5)
    return {
        "question": fact.question.format(name=name),
        "paraphrased_question": f"Please tell me: {fact.question[0].lower()}{fact.question[1:].format(name=name)}",
        "answer": fact.answer.format(name=name, value=value),
        "paraphrased_answer": fact.paraphrase.format(name=name, value=value),
        "perturbed_answer": [fact.paraphrase.format(name=name, value=other) for other in wrong],
    }


def _option_rows(kinds: list[Kind], draw: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "question": kind.question.format(subject),
            "answer": answer,
            "perturbed_answer": draw.sample([other for other in kind.answers.values() if other != answer], 3),
        }
        for kind in kinds
        for subject, answer in kind.answers.items()
    ]


def _without_comparisons(row: dict[str, Any]) -> dict[str, Any]:
    left_out = ("paraphrased_answer", "perturbed_answer", "paraphrased_question")
    return {key: value for key, value in row.items() if key not in left_out}


def tiny_model(seed: int) -> tuple[Any, Any]:
    """Build an untrained Llama of about 1.3 M parameters and a tokenizer of the demo's texts: `(model, tokenizer)`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [parse_row(raw, name) for name, raws in splits().items() for raw in raws]
    texts = [text for row in rows for text in (str(row.question), *row.texts())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question: \nAnswer: "] * 99 + texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), wrapped
