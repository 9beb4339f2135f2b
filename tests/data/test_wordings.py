"""Questions in other words, made by templates."""

import pytest

from dualoptim.data.rows import Asking, Row
from dualoptim.data.wordings import in_other_words, reworded, turned, wordings


@pytest.mark.parametrize(
    ("question", "request_"),
    [
        ("In which city was Emeka Vasarely born?", "Please tell me in which city Emeka Vasarely was born."),
        ("What is Emeka Vasarely's full name?", "Please tell me what Emeka Vasarely's full name is."),
        ("What is James’ job?", "Please tell me what James’ job is."),
        ("Who was Zoë?", "Please tell me who Zoë was."),
        ("Which award has J. R. Lee won so far?", "Please tell me which award J. R. Lee has won so far."),
        ("When did Ann Lee die?", "Please answer this question: When did Ann Lee die?"),
        ("What was Ann's first book called?", "Please answer this question: What was Ann's first book called?"),
        ("谁写了这本书？", "Please answer this question: 谁写了这本书？"),
    ],
)
def test_a_question_about_somebody_is_turned_and_another_is_put_behind_a_request(question, request_):
    assert turned(question) == request_


def test_every_wording_differs_and_says_the_question_or_its_words():
    found = wordings(" Who was {Ann}? ")
    assert len(set(found)) == len(found) >= 3
    assert all("{Ann}?" in one for one in found)


def test_rows_are_asked_in_one_wording_after_the_other_as_often_as_each_has_some():
    one, two = Row("Who is Ann?", "A baker.", task=1, asking=Asking(group="bakers")), Row("Who is Eva?", "A smith.")
    given = Row("Who is Ida?", "A cook.", paraphrased_question="What does Ida do?")
    rows = in_other_words([one, given, two, Row(None, "A passage.")])
    assert [row.answer for row in rows] == ["A baker.", "A cook.", "A smith.", *(["A baker.", "A smith."] * 2)]
    assert rows[1].question == "What does Ida do?"
    assert not {row.question for row in rows} & {one.question, two.question, given.question}
    assert {row.asking for row in rows} == {None}, "they are no group's, whose means are of the trained wording"
    assert in_other_words([Row(None, "A passage.")]) == []


def test_words_are_made_for_a_users_own_rows_alone():
    assert reworded(Row("Who is Ann?", "A baker."), made=False) == []
    assert len(reworded(Row("Who is Ann?", "A baker."), made=True)) == 3
