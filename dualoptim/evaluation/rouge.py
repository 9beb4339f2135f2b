"""Compute ROUGE-1 and ROUGE-L of texts in any script; on Latin letters they are `rouge_score`'s to the digit."""

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import regex

_NO_SPACES = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Tibetan}\p{Javanese}\p{Balinese}\p{lb=SA}"  # SA: Thai, Lao, Khmer ...
    "ーｰ"
)
"""Characters of scripts that put no spaces between words."""

# rouge_score's own words, then characters, then words. Accents on Latin letters separate words, as they do there.
_TOKEN = regex.compile(
    rf"""(?V1x)
    [a-z0-9]+
    | [[{_NO_SPACES}]&&[\p{{L}}\p{{M}}\p{{N}}]] \p{{M}}*
    | [[[\p{{L}}\p{{M}}\p{{N}}]--[\p{{Latin}}\p{{Common}}\p{{Inherited}}]][[\p{{Nd}}]--[0-9]]ａ-ｚ]
      [[[\p{{L}}\p{{M}}\p{{N}}\u200c\u200dـ]--[\p{{Latin}}0-9{_NO_SPACES}]]ａ-ｚ]*
    """
)


@contextmanager
def _without_sklearn() -> Iterator[None]:
    """Have nltk leave out its wrapper of scikit-learn, which would bring that and pandas: a second, and 100 MB a process."""
    if "sklearn" in sys.modules:
        yield
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        yield
    finally:
        del sys.modules["sklearn"]


class _Words:
    """Splits texts into words, of which Latin ones are stemmed, and into characters where no spaces stand between words."""

    def __init__(self) -> None:
        with _without_sklearn():
            from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        return [self._form(word) for word in _TOKEN.findall(text.lower())]

    def _form(self, word: str) -> str:
        """Give the stem of a Latin word as `rouge_score` does; of others, one of several ways to write the same characters."""
        if word.isascii():
            return self._stem(word) if len(word) > 3 else word
        return unicodedata.normalize("NFC", word)


class _WholeWords(_Words):
    """Splits texts in the same way, and stems no word."""

    def __init__(self) -> None:
        self._stem = str


class _Characters:
    """Splits texts without words, such as emoji, into their characters."""

    def tokenize(self, text: str) -> list[str]:
        return regex.findall(r"\S", text.lower())


@cache
def _rouge(kind: type, measure: str) -> Any:
    with _without_sklearn():
        from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([measure], tokenizer=kind())


def rouge(measure: Literal["rouge1", "rougeL"], answer: str, generated: str, stemmed: bool = True) -> tuple[float, float]:
    """Compute ROUGE-1 or ROUGE-L of `generated` against `answer`: recall and F1, both 0..1."""
    words = _Words if stemmed else _WholeWords
    scores = _rouge(words if _TOKEN.search(answer.lower()) else _Characters, measure).score(answer, generated)
    return float(scores[measure].recall), float(scores[measure].fmeasure)


def rouge_l_recall(answer: str, generated: str) -> float:
    """Compute ROUGE-L recall of `generated` against `answer`, with stemming as TOFU computes it: 0..1."""
    recall, _ = rouge("rougeL", answer, generated)
    return recall


def words_beyond(question: str | None, answer: str) -> str:
    """Give the words of an answer that its question does not hold; all of them where it holds all, or there is no question."""
    words, split = (_Words(), _TOKEN.findall) if _TOKEN.search(answer.lower()) else (_Characters(), _Characters().tokenize)
    asked = set(words.tokenize(question or ""))
    left = [word for word in split(answer.lower()) if not asked.intersection(words.tokenize(word))]
    return " ".join(left) or answer
