"""Hints for an attack: other rows before a question, and the first words of an answer behind it."""

import pytest

from dualoptim import EvalArgs, InputError
from dualoptim.data import demo
from dualoptim.data.hints import after_examples, after_first_words
from dualoptim.data.prompts import make_formatter
from dualoptim.data.rows import Asking, Row

ROWS = [Row(f"Who is the {n}. author?", f"She is author {n}, born in Tbilisi.") for n in range(5)]
ASKINGS = [None, Asking(), Asking(lead="Well: "), Asking(around=("Q ", " A")), Asking(around=("Q ", " A"), lead="So ")]


@pytest.fixture(scope="module")
def formatter():
    _, tokenizer = demo.tiny_model(0)
    return make_formatter(EvalArgs(model="m", template="qa"), tokenizer)[0]


def text_of(formatter, row):
    example = formatter.of_row(row, row.answer)
    return formatter.tokenizer.decode(example.ids[: example.start]), formatter.tokenizer.decode(example.ids[example.start :])


def test_examples_stand_before_the_question_as_the_template_writes_them(formatter):
    hinted = after_examples(ROWS, 2, formatter)
    assert [n for n, _ in hinted] == [0, 1, 2, 3, 4]
    for n, row in hinted:
        asked, answer = text_of(formatter, row)
        plain, same = text_of(formatter, ROWS[n])
        assert answer == same
        assert asked.endswith(plain)
        parts = asked.split("\n\n")
        assert len(parts) == 3
        shown = ["".join(text_of(formatter, one)).replace("<|end|>", "") for one in ROWS]
        examples = [shown.index(next(one for one in shown if one.startswith(part))) for part in parts[:2]]
        assert n not in examples
        assert len(set(examples)) == 2
        assert (row.question, row.answer) == (ROWS[n].question, ROWS[n].answer)
    assert hinted == after_examples(ROWS, 2, formatter)
    twice = after_examples([*ROWS[:2], ROWS[0]], 1, formatter)  # nobody is an example for its own question
    assert all(ROWS[0].answer not in row.asking.around[0] for n, row in twice if n != 1)


@pytest.mark.parametrize("asking", ASKINGS, ids=str)
def test_what_a_benchmark_writes_around_a_question_stays_there(formatter, asking):
    rows = [Row(row.question, row.answer, asking=asking) for row in ROWS]
    for n, row in after_examples(rows, 1, formatter):
        asked, answer = text_of(formatter, row)
        assert answer == text_of(formatter, rows[n])[1]
        own = (asking.around if asking and asking.around else ("", ""))[0] + rows[n].question
        assert own in asked
        assert asked.count("author?") == 2
        assert asked.endswith(text_of(formatter, rows[n])[0][-3:])


@pytest.mark.parametrize("asking", ASKINGS, ids=str)
@pytest.mark.parametrize("answer", ["She is a  baker, born\nin Tbilisi.", "Она пекарь из Тбилиси.", " one two three"])
def test_the_first_words_are_given_and_the_same_tokens_follow(formatter, asking, answer):
    row = Row("Who is Ann?", answer, "no", ("wrong",), asking=asking)
    ((_, hinted),) = after_first_words([row], 2, formatter)
    whole, rest = (formatter.of_row(one, one.answer) for one in (row, hinted))
    assert rest.ids == whole.ids
    assert rest.start > whole.start
    assert hinted.texts() == [hinted.answer]
    assert answer.endswith(hinted.answer.strip())
    assert len(hinted.answer.split()) == len(answer.split()) - 2


def test_what_has_no_question_or_no_more_words_gets_no_hint(formatter):
    passage, short = Row(None, "Ann was a baker by the sea."), Row("Who is Ann?", "A baker.")
    assert [n for n, _ in after_examples([passage, *ROWS], 1, formatter)] == [1, 2, 3, 4, 5]
    assert [n for n, _ in after_first_words([passage, short, *ROWS], 2, formatter)] == [2, 3, 4, 5, 6]
    for rows, said in (
        ([passage, short, short], "no others that could be examples; drop it"),
        (ROWS, "at most 4 others that could be examples; give 4"),
        ([short, short, ROWS[0]], "at most 2 others that could be examples; give 2"),
    ):
        with pytest.raises(InputError, match=f"^--few-shot 9: forget questions that are measured have {said}$"):
            after_examples(rows, 9, formatter)
    assert [n for n, _ in after_examples([short, short, ROWS[0]], 2, formatter)] == [2], "the others have one"
    with pytest.raises(InputError, match=r"--prefix-words 2: no answer to a question of the forget set has more words"):
        after_first_words([passage, short], 2, formatter)
    with pytest.raises(InputError, match=r"leaves no room for an answer"):
        after_examples([Row(row.question, row.answer * 100) for row in ROWS], 1, formatter)
