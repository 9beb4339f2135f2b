"""Compare a model's own answer with the true one in further ways: those of `--metrics`, and of benchmarks."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from dualoptim.evaluation.distinct_rouge import distinct_rouge
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


@cache
def splits_sentences() -> bool:
    """Tell whether nltk has the data by which it finds sentences before words."""
    try:
        sentences_words("One. Two.")
    except LookupError:
        return False
    return True


def sentences_words(text: str) -> list[str]:
    """Split a text into words and punctuation as nltk does, sentence by sentence, so that a full stop is no part of a word.

    Raises:
        LookupError: without nltk's data punkt_tab.
    """
    from nltk.tokenize import word_tokenize

    found: list[str] = word_tokenize(text)
    return found


def bag_f1(answer: str, generated: str) -> float:
    """Compute F1 of the words of two texts in any order (TriviaQA): letters in lower case, without punctuation and articles."""
    true, own = (Counter(_plain_words(text)) for text in (answer, generated))
    if not true or not own:
        return float(true == own)
    common = (true & own).total()
    return 2 * common / (true.total() + own.total())


def _plain_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def stated_answer(answer: str, generated: str) -> float:
    """Tell with 1 or 0 whether the words from `the answer is` to the next full stop, else all, are the true ones (BBH)."""
    said = re.search(r"[tT]he answer is (.*?)\.", generated)
    return float(_plain_words(answer) == _plain_words(said[1] if said else generated))


@dataclass(frozen=True)
class Comparison:
    """What is known of one such score, computed of the true answer and the model's own."""

    title: str
    says: str
    of: Callable[[str, str], float]
    forget: Literal["fall", "stay"] = "fall"
    needs: str = ""  # where `can` says that it cannot be computed
    can: Callable[[], bool] = lambda: True


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
    "ngram_entropy_of_sentences": Comparison(
        "n-gram entropy of its answer, sentence by sentence",
        "the same of the words of one sentence after another, as RWKU computes it",
        lambda answer, generated: ngram_entropy(sentences_words(generated)),
        "stay",
        "needs nltk's data punkt_tab; python -m nltk.downloader punkt_tab",
        splits_sentences,
    ),
    "distinct_rouge_l_recall": Comparison(
        "ROUGE-L recall of distinct words",
        "share of the true answer's distinct words in the longest common subsequences of sentences (the package rouge, RWKU)",
        lambda answer, generated: distinct_rouge(answer, generated or "NOANSWER")[0],
    ),
    "bag_f1": Comparison(
        "F1 of words in any order",
        "the harmonic mean of recall and precision of words in any order, without punctuation and articles (TriviaQA)",
        bag_f1,
    ),
    "stated_answer": Comparison(
        "states the true answer",
        "share of rows that say it after `the answer is`, or say nothing else; punctuation and articles do not count (BBH)",
        stated_answer,
    ),
}
"""The names that `--metrics` and benchmarks take."""

OF_BENCHMARKS: dict[str, tuple[str, Literal["fall", "rise"], str]] = {
    "right_choice": ("right choice", "fall", "share of rows whose true answer as a whole is likelier than each wrong one"),
    "passage_loss": ("loss of a passage", "rise", "mean loss per token (RWKU)"),
    "passage_zlib": ("loss of a passage over its compressed size", "rise", "the same over the bytes that zlib takes"),
    "passage_min_k": ("Min-20% of a passage", "rise", "mean loss of the fifth of its tokens that is least likely"),
    "passage_min_k_plus_plus": (
        "Min-20%++ of a passage",
        "rise",
        "the same of losses less what the model expects there, in deviations",
    ),
}
"""Scores of the pass that a benchmark may ask for: title, where they should go on a forget set, definition."""
