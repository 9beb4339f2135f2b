"""Compare a model's own answer with the true one in further ways: those of `--metrics`, and of benchmarks."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from dualoptim.evaluation.rouge import rouge


def exact_match(answer: str, generated: str) -> float:
    """Tell with 1 or 0 whether two texts are the same but for blanks at their ends and the case of letters (LUME)."""
    return float(answer.strip().lower() == generated.strip().lower())


def ngram_entropy(words: Sequence[object]) -> float:
    """Compute the fluency of a text (RWKU): (2/3 H2 + 4/3 H3) / 2, with Hn the entropy of its n-grams in bits.

    A text that repeats itself scores low; one of fewer words than n has Hn = 0.
    """
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[object], n: int) -> float:
    grams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = sum(grams.values())
    return -sum(count / total * math.log2(count / total) for count in grams.values())


@cache
def _word_tokenizer() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer  # needs no data, unlike the one that finds sentences first

    return NLTKWordTokenizer()


def words_of(text: str) -> list[str]:
    """Split a text into words and punctuation as nltk does, without looking for sentences."""
    found: list[str] = _word_tokenizer().tokenize(text)
    return found


@dataclass(frozen=True)
class Comparison:
    """What is known of one such score, computed of the true answer and the model's own."""

    title: str
    says: str
    of: Callable[[str, str], float]
    forget: Literal["fall", "stay"] = "fall"


COMPARISONS = {
    "rouge_1_recall": Comparison(
        "ROUGE-1 recall of its own answer",
        "how many of the true answer's words are in the model's own, in any order",
        lambda answer, generated: rouge("rouge1", answer, generated)[0],
    ),
    "rouge_1_f1": Comparison(
        "ROUGE-1 F1 of its own answer",
        "the same, and how many of its words are the true answer's (their harmonic mean)",
        lambda answer, generated: rouge("rouge1", answer, generated)[1],
    ),
    "rouge_l_f1": Comparison(
        "ROUGE-L F1 of its own answer",
        "the harmonic mean of ROUGE-L recall and precision",
        lambda answer, generated: rouge("rougeL", answer, generated)[1],
    ),
    "rouge_l_f1_unstemmed": Comparison(
        "ROUGE-L F1, unstemmed",
        "the same of whole words, as MUSE computes it",
        lambda answer, generated: rouge("rougeL", answer, generated, stemmed=False)[1],
    ),
    "exact_match": Comparison(
        "exact match of its own answer",
        "share of rows whose own answer is the true one, but for blanks at the ends and the case of letters",
        exact_match,
    ),
    "ngram_entropy": Comparison(
        "n-gram entropy of its answer",
        "fluency, (2/3 H2 + 4/3 H3) / 2 in bits (RWKU), of nltk's words: a text that repeats itself scores low",
        lambda answer, generated: ngram_entropy(words_of(generated)),
        "stay",
    ),
}
"""The names that `--metrics` and benchmarks take."""
