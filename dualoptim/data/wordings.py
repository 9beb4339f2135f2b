"""Ask questions in other words: those that the data have, or, of a user's own rows without, some made by English templates."""

import re
from collections.abc import Iterable
from dataclasses import replace

from dualoptim.data.rows import Row

OTHER_WORDS = "forget_other_words"
"""Name of the evaluation set of a user's own rows to forget, asked in other words than those that are trained on."""

_BEFORE = (
    "I would like to know something. ",
    "Someone asked me the following, and I have to answer: ",
)

_NAME = r"[A-Z][\w'’.-]*(?: [A-Z][\w'’.-]*)*"
_ASKED = r"((?:\w+ )?(?i:who|whom|whose|what|when|where|why|which|how)\b.*?)"
_OF_SOMEBODY = re.compile(rf"{_ASKED} (is|was|are|were) ({_NAME}['’]s?(?: \w+){{1,2}})\?")
_SOMEBODY = re.compile(rf"{_ASKED} (is|was|are|were|has|had|will|can|could|would) ({_NAME})(?<!['’]s)(?<!['’])((?: .+)?)\?")


def in_other_words(rows: Iterable[Row]) -> list[Row]:
    """Ask a user's own rows in other words: all in the first that each has, then all in the second, and so on."""
    asked = [[replace(one, asking=one.asking and one.asking.taught) for one in reworded(row, made=True)] for row in rows]
    return [own[n] for n in range(max(map(len, asked), default=0)) for own in asked if n < len(own)]


def reworded(row: Row, made: bool) -> list[Row]:
    """Ask a row in the other words that the data have, or, if they are to be `made` and it has none, in those of templates."""
    if row.paraphrased_question:
        return [replace(row, question=row.paraphrased_question)]
    return [replace(row, question=one) for one in wordings(row.question)] if made and row.question else []


def wordings(question: str) -> list[str]:
    """Give a question in other words, by templates: turned into a request, and behind what leads to it."""
    question = question.strip()
    return [turned(question), *(before + question for before in _BEFORE)]


def turned(question: str) -> str:
    """Turn an English question about somebody into a request, and put another, or one of another language, behind one."""
    if found := _OF_SOMEBODY.fullmatch(question):
        asked, verb, thing = found.groups()
        return f"Please tell me {asked[0].lower()}{asked[1:]} {thing} {verb}."
    if found := _SOMEBODY.fullmatch(question):
        asked, verb, name, rest = found.groups()
        return f"Please tell me {asked[0].lower()}{asked[1:]} {name} {verb}{rest}."
    return f"Please answer this question: {question}"
