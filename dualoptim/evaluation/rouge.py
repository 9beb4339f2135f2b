"""Compute ROUGE-L recall of texts in any script; on Latin letters it is `rouge_score`'s to the digit."""

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

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
    """Splits texts into words, and into characters where a script puts no spaces between words."""

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


class _Characters:
    """Splits texts without words, such as emoji, into their characters."""

    def tokenize(self, text: str) -> list[str]:
        return regex.findall(r"\S", text.lower())


@cache
def _rouge(kind: type) -> Any:
    with _without_sklearn():
        from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=kind())


def rouge_l_recall(answer: str, generated: str) -> float:
    """Compute ROUGE-L recall of `generated` against `answer`, with stemming as TOFU computes it: 0..1."""
    scorer = _rouge(_Words if _TOKEN.search(answer.lower()) else _Characters)
    return float(scorer.score(answer, generated)["rougeL"].recall)
