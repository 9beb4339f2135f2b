"""Give a question with a hint: other rows with their true answers before it, or the first words of its own answer behind it."""

import re
from collections.abc import Sequence
from dataclasses import replace

from dualoptim.data.prompts import Formatter
from dualoptim.data.rows import Asking, Row
from dualoptim.data.stream import seeded
from dualoptim.errors import InputError

_SEED = 0  # of which rows are examples: not the training's

Hinted = list[tuple[int, Row]]
"""Rows that were given a hint, each with its number among all."""


def after_examples(rows: Sequence[Row], count: int, formatter: Formatter) -> Hinted:
    """Ask each question behind `count` others of the same rows with their true answers, drawn once by a fixed seed.

    They stand where the question does, each as the template writes it; in a chat, all in one turn. A row that has fewer others,
    because some are the same as it, is left out.

    Raises:
        InputError: if no question has so many others, or a row does not fit.
    """
    asked, most = [n for n, row in enumerate(rows) if row.question is not None], 0
    hinted = []
    for n in asked:
        order = [asked[k] for k in seeded(_SEED, "examples", n).permutation(len(asked))]
        others = [rows[k] for k in order if (rows[k].question, rows[k].answer) != (rows[n].question, rows[n].answer)]
        most = max(most, len(others))
        if len(others) >= count:
            hinted.append((n, _behind(rows[n], others[:count], formatter)))
    if not hinted:
        there, remedy = (f"at most {most}", f"give {most}") if most else ("no", "drop it")
        asked_for = f"--few-shot {count}: forget questions that are measured have {there}"
        raise InputError(f"{asked_for} others that could be examples; {remedy}")
    formatter.check(row for _, row in hinted)
    return hinted


def _behind(row: Row, shown: Sequence[Row], formatter: Formatter) -> Row:
    asking, tags = row.asking or Asking(), formatter.tags
    between, after = ("\n", "\n\n") if tags is None else (f"{tags.question_end}{tags.answer}", f"\n\n{tags.question_start}")
    if asking.plain:
        between, after = "", "\n\n"
    start, end = asking.around or ("", "")
    examples = "".join(f"{start}{one.question}{end}{between}{one.answer}{after}" for one in shown)
    lead = asking.lead if asking.around else asking.lead or ""  # the template stands around the examples as well
    return replace(row, asking=replace(asking, around=(examples + start, end), lead=lead))


def after_first_words(rows: Sequence[Row], count: int, formatter: Formatter) -> Hinted:
    """Ask each question with the first words of its answer, and take the rest as what is to be answered.

    Rows whose answer has no more words are left out, and other texts than the answer.

    Raises:
        InputError: if no row is left, or one does not fit.
    """
    hinted = []
    for n, row in enumerate(rows):
        words = re.findall(r"\s*\S+\s*", row.answer)
        if row.question is not None and len(words) > count:
            hinted.append((n, _begun(row, "".join(words[:count]), "".join(words[count:]))))
    if not hinted:
        raise InputError(f"--prefix-words {count}: no answer to a question of the forget set has more words; give fewer")
    formatter.check(row for _, row in hinted)
    return hinted


def _begun(row: Row, first: str, rest: str) -> Row:
    asking = row.asking or Asking()
    if asking.plain and asking.around:
        begun = first.rstrip(" ")  # the blank between is the first character of the answer
        asking, rest = replace(asking, around=(asking.around[0], asking.around[1] + begun)), first[len(begun) :] + rest
    else:
        asking = replace(asking, lead=(asking.lead or "") + first)
    return replace(row, answer=rest, paraphrased_answer=None, perturbed_answers=(), refusal=None, asking=asking)
