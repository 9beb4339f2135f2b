"""General questions, whose answers by the model itself are kept where a user gives no rows to keep."""

import re
from collections.abc import Iterable, Sequence
from importlib import resources

from dualoptim.config.opening import read_text
from dualoptim.data.rows import Row
from dualoptim.errors import InputError

ANSWER_TOKENS = 64
"""Tokens of an answer that is made, at most; one that goes on is cut there, and no end token follows."""


def load_questions(path: str | None) -> list[str]:
    """Read the questions, one a line, that come with the package, and those of a user's own file behind them.

    Raises:
        InputError: if the file cannot be read or holds none.
    """
    text = resources.files("dualoptim.data").joinpath("questions.txt").read_text(encoding="utf-8")
    own = ""
    if path is not None:
        own = read_text(f"--retain-questions {path}", path, "give a text file with one question a line")
        if not own.strip():
            raise InputError(f"--retain-questions {path}: holds no lines; write one question a line")
    return [*dict.fromkeys(line.strip() for line in f"{text}\n{own}".splitlines() if line.strip())]


def unanswered(questions: Iterable[str], answer: str = "The") -> list[Row]:
    """Give rows of questions with a word in place of answers that are still to be made, which takes the blank before it."""
    return [Row(question, answer, place=f"the general question {question!r}") for question in questions]


def names_in(rows: Iterable[Row]) -> set[str]:
    """Find the words that rows write with a capital letter within a sentence: mostly names, which say what rows are about."""
    texts = (text for row in rows for text in (row.question, row.answer) if text)
    words = (word for text in texts for word in re.findall(r"(?<=[^\s.?!:] )[^\W\d_]\w{2,}", text))
    return {word for word in words if word[0].isupper()}


def not_about(rows: Iterable[Row], forgotten: Sequence[Row]) -> list[Row]:
    """Pick the rows that ask nothing that is to be forgotten; those of the package have none of its names either."""
    asked, names, general = {_plain(row.question) for row in forgotten}, names_in(forgotten), {*load_questions(None)}
    kept = (row for row in rows if _plain(row.question) not in asked)
    return [row for row in kept if row.question not in general or not names & _words(f"{row.question} {row.answer}")]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _plain(question: str | None) -> str:
    return " ".join(re.findall(r"\w+", (question or "").casefold()))
