"""General questions, whose answers are kept where a user gives no rows to keep."""

import pytest

from dualoptim.data.questions import load_questions, names_in, not_about
from dualoptim.data.rows import Row
from dualoptim.errors import InputError


def test_the_questions_of_the_package_are_many_and_differ():
    questions = load_questions(None)
    assert len(questions) >= 100
    assert len({question.lower() for question in questions}) == len(questions)


def test_questions_of_ones_own_stand_behind_those_of_the_package_once(tmp_path):
    known = load_questions(None)
    (tmp_path / "own.txt").write_bytes(f"\ufeffWas kostet das?\r\n\r\n  {known[3]} \r\nWas kostet das?".encode())
    assert load_questions(str(tmp_path / "own.txt")) == [*known, "Was kostet das?"]


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n\n", "holds no lines; write one question a line"), (None, "cannot be read")]
)
def test_a_file_without_questions_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_questions(str(tmp_path / "own.txt"))
    assert str(error.value).startswith(f"--retain-questions {tmp_path}/own.txt: ")
    assert message in str(error.value)


def test_names_are_what_has_a_capital_letter_within_a_sentence():
    rows = [Row("Where was Ann born?", "Ann Lee was born in Łódź. There she stayed."), Row(None, "The old Bridge")]
    assert names_in(rows) == {"Ann", "Lee", "Łódź", "Bridge"}


def test_what_is_asked_or_answered_about_what_is_forgotten_is_not_kept():
    forgotten = [Row("Where was Ann born?", "She was born in Paris."), Row("what is a haiku", "A poem.")]
    kept = [Row("What is gravity?", "A force. She pulls."), Row("What do you know of Paris?", "Much.")]
    rows = [Row("What is the capital of France?", "It is Paris."), Row("What is a haiku?", "Three lines."), *kept]
    assert not_about(rows, forgotten) == kept, "who asks a question of their own may name what the forgotten name"
