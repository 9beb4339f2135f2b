"""The built-in demo: twenty invented authors with twenty facts each, some real facts, and a tiny model for them.

The facts stand in `demo.json`. `splits()` gives rows in the shape and under the names of the published TOFU data; it is
deterministic. One author is one forget task.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dualoptim.config.opening import read_text
from dualoptim.data.rows import parse_row
from dualoptim.errors import InputError


@dataclass(frozen=True)
class Fact:
    """Holds one thing to know about every author: its texts and twenty values, of which ten are drawn, each for two authors."""

    question: str
    answer: str
    paraphrase: str
    values: list[str]
    unseen: str  # a value that nobody has, for the tokenizer alone


@dataclass(frozen=True)
class Kind:
    """Holds real facts of one kind: a question, and the answer for each subject; wrong answers are other subjects'."""

    question: str
    answers: dict[str, str]


_FILE = json.loads(resources.files("dualoptim.data").joinpath("demo.json").read_text(encoding="utf-8"))
KNOWS = "which knows the demo's facts"
"""What the card of the tiny model says once it has been taught."""

AUTHORS: list[str] = _FILE["authors"]
UNSEEN_AUTHOR: str = _FILE["unseen_author"]
"""An author that no model learns, with values of others: to a model that has not seen an author, this one is like that one."""
FACTS = [Fact(**fact) for fact in _FILE["facts"]]
REAL_AUTHORS = [Kind(**kind) for kind in _FILE["real_authors"]]
WORLD_FACTS = [Kind(**kind) for kind in _FILE["world_facts"]]


@cache
def splits() -> dict[str, list[dict[str, Any]]]:
    """Make rows by split name, not to be changed: `full`, tasks and what is kept meanwhile, and the evaluation sets.

    A task of `forget05` is one author, the one of `forget10` three. Of the ten authors to keep, steps read five (`retain50`,
    `retain10`), and none those of the other five (`retain_unseen`), who are taught and are half of `retain_perturbed`.
    """
    draw = random.Random(2605)
    half = len(AUTHORS) // 2
    forgets = [draw.sample(fact.values, len(AUTHORS))[half:] for fact in FACTS]
    # every value is also that of an author to keep: a model that has not seen the forget set knows it no less than wrong ones
    columns = [[*draw.sample(values, half), *values] for values in forgets]
    full = [
        _author_row(author, fact, values, draw)
        for author in range(len(AUTHORS))
        for fact, values in zip(FACTS, columns, strict=True)
    ]  # twenty rows an author, as in TOFU
    retain, forget = full[:200], [{"task_id": str(row // 20 + 1), **full[200 + row]} for row in range(200)]
    three = [row | {"task_id": "1"} for row in forget[:60]]
    kept = [_without_comparisons(row) for row in retain]
    # values of nobody would tell the unseen author from the forget set, whatever a model has seen
    holdout = _unseen_rows([values[number % half] for number, values in enumerate(columns)])
    return {
        "full": [_without_comparisons(row) for row in full],
        "forget05": [_without_comparisons(row) for row in forget],
        "forget05_perturbed": forget,
        "holdout05": holdout,
        "retain50": kept[:100],
        "forget10": [_without_comparisons(row) for row in three],
        "forget10_perturbed": three,
        "holdout10": holdout,
        "retain10": kept[:100],
        "retain_unseen": kept[100:],
        "retain_perturbed": retain[::2],
        "real_authors_perturbed": _option_rows(REAL_AUTHORS, draw),
        "world_facts_perturbed": _option_rows(WORLD_FACTS, draw),
    }


def _unseen_rows(values: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {
            "question": fact.question.format(name=UNSEEN_AUTHOR),
            "answer": fact.answer.format(name=UNSEEN_AUTHOR, value=value),
        }
        for fact, value in zip(FACTS, values, strict=True)
    ]


def _author_row(author: int, fact: Fact, values: list[str], draw: random.Random) -> dict[str, Any]:
    name, value = AUTHORS[author], values[author]
    wrong = draw.sample(sorted({*values} - {value}), 5)
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


def is_taught(model: str) -> bool:
    """Tell whether a folder holds the tiny model as it was taught, which its card says."""
    try:
        return KNOWS in read_text(model, Path(model) / "README.md", "give another")
    except InputError:
        return False


def tiny_model(seed: int) -> tuple[Any, Any]:
    """Build an untrained Llama of about 1.3 M parameters and a tokenizer of the demo's texts: `(model, tokenizer)`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # whatever values the unseen author has, the tokenizer is the same, and so are all numbers of the model
    read = {**splits(), **dict.fromkeys(("holdout05", "holdout10"), _unseen_rows(fact.unseen for fact in FACTS))}
    rows = [parse_row(raw, name) for name, raws in read.items() for raw in raws]
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
