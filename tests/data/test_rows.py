"""A row, and what may stand in the JSON object that it is made of."""

import pytest

from dualoptim.data.rows import Row, of_task, parse_passage, parse_row, still_known, task_numbers
from dualoptim.errors import InputError

QUESTION = {"question": "Who?", "answer": "Me."}


def test_a_row_has_all_that_its_json_object_has():
    raw = {
        **QUESTION, "paraphrased_answer": "It is me.", "perturbed_answer": ["You.", "They."], "task_id": "3",
        "golden_answer": "I", "original_answer": "I am it.", "paraphrased_question": "Which one?", "name": "ignored",
    }  # fmt: skip
    row = parse_row(raw, "here")
    assert row == Row("Who?", "Me.", "It is me.", ("You.", "They."), 3, "I", "I am it.", "Which one?")
    assert row.texts() == ["Me.", "It is me.", "You.", "They."]
    assert parse_row(dict.fromkeys(raw) | QUESTION, "here") == Row("Who?", "Me.")


def test_a_passage_has_no_question():
    assert parse_passage({"body": "Once.", "task_id": 2, "question": ""}, "here", "body") == Row(None, "Once.", task=2)
    with pytest.raises(InputError, match="here: column 'body' is ' '; give a text that is not empty"):
        parse_passage({"body": " "}, "here", "body")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "not a JSON object; each line holds one with question and answer"),
        ({"question": "Who?"}, "no field 'answer'; every row needs question and answer"),
        ({"question": None, "answer": "Me."}, "column 'question' is None; give a text that is not empty"),
        ({**QUESTION, "golden_answer": ""}, "column 'golden_answer' is ''; give a text that is not empty"),
        ({**QUESTION, "paraphrased_answer": 3}, "column 'paraphrased_answer' is 3; give a text"),
        ({**QUESTION, "perturbed_answer": []}, "column 'perturbed_answer' is []; give a list of texts"),
        ({**QUESTION, "perturbed_answer": ["x", ""]}, "column 'perturbed_answer' is ['x', '']; give a list of texts"),
        ({**QUESTION, "task_id": True}, "column 'task_id' is True; give a whole number"),
        ({**QUESTION, "task_id": -1}, "column 'task_id' is -1; give a whole number"),
    ],
)
def test_a_mistake_is_named_with_its_place(raw, message):
    with pytest.raises(InputError) as error:
        parse_row(raw, "file:7")
    assert str(error.value) == f"file:7: {message}"


def test_rows_by_their_tasks():
    rows = [Row("a?", "a", task=2), Row("b?", "b"), Row("c?", "c", task=1), Row("d?", "d", task=2)]
    assert task_numbers(rows) == [1, 2]
    assert task_numbers(rows[1:2]) == [1]
    assert [row.answer for row in of_task(rows, 2)] == ["a", "b", "d"]
    assert [row.answer for row in still_known(rows, [1])] == ["a", "d"]


def test_where_a_row_stands_is_no_part_of_what_it_says():
    row, moved = (parse_row({"question": "Who?", "answer": "I."}, place) for place in ("a.jsonl:1", "b/c.jsonl:7"))
    assert row == moved
    assert row.content() == moved.content()
    assert "place" not in row.content()
