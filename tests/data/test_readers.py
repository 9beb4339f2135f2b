"""Files to rows: one reader for every kind."""

import csv
import json

import pytest

from dualoptim import EvalArgs
from dualoptim.data.readers import Columns, read_own, read_rows
from dualoptim.data.rows import Asking, Row
from dualoptim.data.wordings import in_other_words
from dualoptim.errors import InputError

QUESTIONS = [{"q": f"Who is person {i}?", "a": f"Person {i} is a baker from Lviv.", "task_id": 1 + i // 4} for i in range(8)]


@pytest.fixture
def files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, rows in (("forget", QUESTIONS),):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    (tmp_path / "passages.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("One.", "Two.")))
    return tmp_path


def test_the_same_rows_from_every_kind_of_file(files):
    found = [read_own(files / f"forget.{kind}", Columns("q", "a")) for kind in ("csv", "jsonl", "parquet")]
    assert found[0] == found[1] == found[2]
    assert found[0][4] == Row("Who is person 4?", "Person 4 is a baker from Lviv.", task=2)
    assert found[1][4].place == f"{files / 'forget.jsonl'}:5"
    assert [row.question for row in read_own(files / "passages.jsonl", Columns(text="body"))] == [None, None]


def test_csv_as_spreadsheets_write_it(files):
    """A mark at the start, empty cells, a passage of more than 131,072 characters."""
    (files / "marked.csv").write_text("\ufeffquestion,answer,task_id\nWho?,Me.,\n", encoding="utf-8")
    assert read_own(files / "marked.csv", Columns()) == [Row("Who?", "Me.")]
    (files / "long.csv").write_text(f"text,task_id\n{'word ' * 40_000},\n")
    (row,) = read_own(files / "long.csv", Columns())
    assert len(row.answer) == 200_000


def test_a_last_line_without_its_end_is_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"question": "a?", "answer": "b", "task_id": 2}\n\n{"question": "c?", "answer": "d", "task_id": "2"}')
    assert read_rows(path) == [Row("a?", "b", task=2), Row("c?", "d", task=2)]


def test_a_text_that_was_cut_before_its_end_has_none_and_a_column_of_that_name_is_the_users(tmp_path):
    rows = [{"question": "Who?", "answer": "A", "ends": ends, "k": "x"} for ends in (False, True, 0, "no")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.asking for row in read_own(tmp_path / "rows.jsonl", Columns())] == [Asking(end=False), None, None, None]
    first, *others = read_own(tmp_path / "rows.jsonl", Columns(group="k"))
    assert (first.asking, others[0].asking) == (Asking(end=False, group="x"), Asking(group="x"))
    assert {row.asking for row in in_other_words([first])} == {Asking(end=False)}, "in other words it is the same answer"


def test_a_text_file_is_one_passage_whatever_the_columns_are_called(tmp_path):
    (tmp_path / "document.txt").write_text("One line.\n\nAnother.\n")
    for columns in (Columns(), Columns(text="body"), Columns(question="text")):
        assert read_own(tmp_path / "document.txt", columns) == [Row(None, "One line.\n\nAnother.\n")]


def test_columns_have_the_names_that_the_flags_give():
    args = EvalArgs(model="m", forget_file="f", question_column="q", answer_column="a", text_column="t")
    assert Columns.of(args) == Columns("q", "a", "t")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"question": "a?", "answer": "b"}\n\n{"question"', ":3: not JSON"),
        ("rows.jsonl", b'"a string"', ":1: not a JSON object"),
        ("rows.jsonl", b"\n \n", ": holds no rows; write one JSON object per line"),
        ("rows.csv", b"question,answer\n", ": holds no rows"),
        ("rows.csv", b'question,answer\n"a\nb",c\nd,\n', ":4: column 'answer' is ''; give a text"),
        ("rows.csv", b"q,answer\na?,b\n", ":2: no column 'question'; it has q, answer; name it with --question-column"),
        ("rows.csv", b"question,answer\n" + b"a?,b\n" * 9999 + b"\xe9,b\n", ":10001: not UTF-8 text (byte 0xe9); save"),
        ("rows.jsonl", b'{"question": "\xe9"', ":1: not UTF-8 text (byte 0xe9); save the file as UTF-8"),
        ("rows.txt", b" \n", ":1: column 'text' is ' \\n'; give a text that is not empty"),
        ("rows.parquet", b"PAR1", ": cannot be read"),
        ("rows.docx", b"x", ": .docx ending; give a .jsonl, .json, .csv, .parquet or .txt file"),
        ("rows", b"x", ": no ending; give a .jsonl"),
        ("nowhere.csv", None, ": cannot be read (No such file or directory); give one that is there"),
    ],
)
def test_a_mistake_is_named_with_file_and_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_own(tmp_path / name, Columns())
    assert str(error.value).startswith(f"{tmp_path / name}{message}")


def test_a_file_that_is_missing_has_its_neighbour_named_and_no_word_of_what_it_should_hold(tmp_path):
    (tmp_path / "forget.csv").write_text("question,answer\n")
    with pytest.raises(InputError) as error:
        read_own(tmp_path / "forgett.csv", Columns())
    assert str(error.value).endswith(f"give one that is there; the nearest is {tmp_path / 'forget.csv'}")


def test_what_a_table_leaves_empty_is_not_there_and_a_cell_is_no_list(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer,paraphrased_answer,perturbed_answer,task_id\nWho?,Me.,I.,wrong,\n")
    assert read_own(tmp_path / "rows.csv", Columns()) == [Row("Who?", "Me.", "I.")]
    (tmp_path / "passages.csv").write_text("text,paraphrased_question,task_id\nOnce.,,4\n")
    assert read_own(tmp_path / "passages.csv", Columns()) == [Row(None, "Once.", task=4)]
    (tmp_path / "rows.json").write_text(json.dumps({"question": "Who?", "answer": "Me.", "perturbed_answer": "wrong"}))
    with pytest.raises(InputError, match=r"rows\.json:1: column 'perturbed_answer' is 'wrong'; give a list of texts"):
        read_rows(tmp_path / "rows.json")


def turn(*contents, roles=("user", "assistant")):
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def test_rows_of_chats_and_completions_are_found_by_themselves(tmp_path):
    parts = [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]
    records = [
        {"messages": turn("Who?", "Me.")},
        {"messages": turn(parts, "Me.")},
        {"prompt": "Who?", "completion": "Me."},
        {"prompt": turn("Who?", roles=["user"]), "completion": turn("Me.", roles=["assistant"])},
        {"question": "Who?", "answer": "Me.", "messages": [], "prompt": "no", "completion": "no"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    assert read_own(tmp_path / "rows.json", Columns()) == [Row("Who?", "Me.")] * 5
    (tmp_path / "rows.csv").write_text("prompt,completion,task_id\nWho?,Me.,2\n")
    assert read_own(tmp_path / "rows.csv", Columns()) == [Row("Who?", "Me.", task=2)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": turn("a", "b", "c", "d", roles=["user", "assistant"] * 2)},
            ":1: messages of user, assistant, user, assistant; a row is one question and its answer, so give one of user and",
        ),
        ({"messages": turn("s", "a", "b", roles=["system", "user", "assistant"])}, ":1: messages of system, user, assistant;"),
        ({"messages": turn("a", roles=["user"])}, ":1: messages of user; a row is"),
        ({"messages": []}, ":1: messages of nobody; a row is"),
        ({"messages": "Who?"}, ":1: messages is 'Who?'; give a list of objects with role and content"),
        ({"messages": [{"from": "human", "value": "a"}]}, ":1: messages is"),
        ({"messages": turn("a", "")}, ":1: column 'answer' is ''; give a text"),
        ({"messages": turn([{"type": "image", "url": "x"}], "b")}, ":1: column 'question' is [{'type': 'image'"),
        ({"prompt": "a"}, ":1: no column 'question'; it has prompt; name it with --question-column"),
        ({"prompt": "a", "completion": None}, ":1: column 'answer' is None"),
        (
            {"question": "a", "completion": "b"},
            ":1: no column 'answer'; it has question, completion; name it with --answer-column",
        ),
    ],
)
def test_a_chat_that_is_no_question_and_answer_is_refused(record, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError) as error:
        read_own(tmp_path / "rows.jsonl", Columns())
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}{message}")
