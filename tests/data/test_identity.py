"""Hashes of rows and prompts: equal for what is the same, other for anything that a model would see otherwise."""

from dataclasses import replace

from dualoptim import UnlearnArgs
from dualoptim.data import demo
from dualoptim.data.identity import prompts_hash, rows_hash, sets_hash
from dualoptim.data.prompts import make_formatter
from dualoptim.data.rows import Asking, Row

ROWS = [Row("Who?", "I.", perturbed_answers=("You.", "He.")), Row(None, "A passage."), Row("What?", "Nothing.", task=2)]


def test_rows_are_told_apart_by_every_field_and_their_order():
    others = [
        ROWS[::-1],
        ROWS[:2],
        [replace(ROWS[0], question="who?"), *ROWS[1:]],
        [replace(ROWS[0], perturbed_answers=("You.",)), *ROWS[1:]],
        [replace(ROWS[0], perturbed_answers=("He.", "You.")), *ROWS[1:]],
        [*ROWS[:2], replace(ROWS[2], task=3)],
        [ROWS[0], Row("", "A passage."), ROWS[2]],
        [ROWS[0], replace(ROWS[1], asking=Asking(end=False)), ROWS[2]],
    ]
    assert len({rows_hash(rows) for rows in [ROWS, *others]}) == 1 + len(others)
    assert rows_hash(ROWS) == rows_hash([replace(row) for row in ROWS])
    assert "asking" not in ROWS[1].content(), "hashes of older runs would be others"
    assert len({rows_hash(ROWS), rows_hash(ROWS, 1), rows_hash(ROWS, ["no"])}) == 3


def test_what_only_measures_a_row_changes_the_evaluation_and_not_what_is_learned():
    formatter, _ = make_formatter(UnlearnArgs(), demo.tiny_model(0)[1])
    measuring = {"group": "people", "metrics": ("exact_match",), "only": True, "tokens": 3, "accepted": ("Me.",)}
    measuring |= {"stop": ("\n",), "stop_tokens": (".",)}
    for asking in (None, Asking(("", " ")), Asking(end=False)):
        row = replace(ROWS[2], asking=asking)
        other = [replace(row, asking=replace(asking or Asking(), **{name: value})) for name, value in measuring.items()]
        assert {rows_hash([one]) for one in other} == {rows_hash([row])}
        assert len({sets_hash({"forget": [one]}, formatter) for one in (row, *other)}) == 1 + len(other)


def test_prompts_are_told_apart_by_template_and_length():
    _, tokenizer = demo.tiny_model(0)
    formatters = [
        make_formatter(UnlearnArgs(**changes), tokenizer)[0]
        for changes in ({}, {"question_start_tag": "Q: "}, {"answer_tag": "A: "}, {"max_length": 9})
    ]
    assert len({prompts_hash(ROWS[1:], formatter) for formatter in formatters}) == len(formatters)
    pieces = [[replace(row, asking=Asking(end=end)) for row in ROWS[1:2]] for end in (False, True)]
    assert len({prompts_hash(rows, formatters[0]) for rows in pieces}) == 2
    assert len({sets_hash({name: ROWS[1:]}, formatters[0]) for name in ("forget", "retain")}) == 2
