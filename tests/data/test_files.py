"""Records of files, each with its line: what is read alike, and what would be lost is refused."""

import gzip
import json

import pytest

from dualoptim.data.files import records
from dualoptim.data.readers import Columns, read_own
from dualoptim.data.rows import Row
from dualoptim.errors import InputError

LINES = b'{"question": "Who?", "answer": "Me."}\n{"question": "Where?", "answer": "Here."}\n'
TABLE = b"question,answer\nWho?,Me.\nWhere?,Here.\n"
ROWS = [Row("Who?", "Me."), Row("Where?", "Here.")]


def zipped(content):
    """Compress it, without the time of day, which would make tests of other names each time."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.json", LINES.replace(b"\n", b"\r\n")),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("rows.jsonl", b"\n".join(b"\xef\xbb\xbf" + line for line in LINES.split(b"\n"))),  # files that were joined
        ("rows.json", b"\xef\xbb\xbf  [" + LINES.strip().replace(b"\n", b",\n") + b"]\n"),
        ("rows.json", json.dumps([json.loads(line) for line in LINES.split(b"\n") if line], indent=4).encode()),
        ("rows.jsonl", b"[" + LINES.strip().replace(b"\n", b",") + b"]"),
        ("rows.jsonl.gz", zipped(LINES)),
        ("rows.json.gz", zipped(b"\xef\xbb\xbf[" + LINES.strip().replace(b"\n", b",") + b"]")),
        ("rows.csv.gz", zipped(TABLE)),
        ("ROWS.CSV.GZ", zipped(TABLE)),
        ("rows [1].csv", b"\xef\xbb\xbf" + TABLE),
        ("rows.csv", b"\n" + TABLE.replace(b"\n", b",,\n\n")),  # empty columns and lines, as spreadsheets write them
        ("rows.csv", b",question,answer\n0,Who?,Me.\n1,Where?,Here.\n"),  # a first column without a name: row numbers
    ],
)
def test_the_same_rows_however_a_file_is_written(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_own(tmp_path / name, Columns()) == ROWS


def test_parquet_is_read_packed_and_a_passage_without_its_mark(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"question": row.question, "answer": row.answer} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "plain [x].parquet")
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress((tmp_path / "plain [x].parquet").read_bytes()))
    assert read_own(tmp_path / "plain [x].parquet", Columns()) == read_own(tmp_path / "rows.parquet.gz", Columns()) == ROWS
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbfOne.\r\nTwo."))
        assert read_own(tmp_path / name, Columns(text="body")) == [Row(None, "One.\nTwo.")]


def test_records_of_an_array_stand_at_their_lines(tmp_path):
    (tmp_path / "a.json").write_text('\n[{"a": 1}, {"a":\n 2},\n\n{"a": [3,\n 4]}\n, 5]')
    places = [(place.rsplit(":", 1)[1], record) for place, record in records(tmp_path / "a.json")]
    assert places == [("2", {"a": 1}), ("2", {"a": 2}), ("5", {"a": [3, 4]}), ("7", 5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"question,answer\nWho, in your view,Me.\n", ":2: 3 cells where the header has 2; quote texts that hold"),
        ("rows.csv", b"question,answer,,\nWho, in your view,Me.,\n", ":2: 4 cells where the header has 2"),  # a sheet of four
        ("rows.csv", b'question,answer\n"a\nb",c\nx,y,z\n', ":4: 3 cells where the header has 2"),
        ("rows.csv", b"question,answer,task_id\nWho?,Me.,1\nWhere?,He\n", ":3: 2 cells where the header has 3; leave cells"),
        ("rows.csv", b"question,answer\nWho?\n", ":2: 1 cell where the header has 2"),
        ("rows.csv", b"question,answer,answer\nWho?,Me.,You.\n", ":1: two columns have the name 'answer'; rename one of them"),
        ("rows.csv", b"note,question,answer,note\n1,2,3,4\n", ":1: two columns have the name 'note'"),
        ("rows.csv", b'question,answer\n"He said "hi" there",Me.\n', ":2: not CSV ("),
        ("rows.csv", b'question,answer\n"Who?,Me.\nWhere?,Here.\n', ":3: not CSV (unexpected end of data); quote texts"),
        ("rows.csv.gz", zipped(b"question,answer\na,b,c\n"), ":2: 3 cells where"),
        ("rows.csv.gz", zipped(TABLE * 99)[:-20], ": cannot be read ("),
        ("rows.csv.gz", TABLE, ": cannot be read (Not a gzipped file"),
        ("rows.gz", zipped(TABLE), ": no ending; give a .jsonl"),
        (
            "rows.jsonl",
            b'{"question": "a", "answer": "b", "answer": "c"}',
            ":1: not JSON ('answer' stands twice in one object)",
        ),
        ("rows.json", b'[{"question": "a", "answer": "b"},\n {"answer": "b", "answer": "c"}]', ":2: not JSON ('answer' stands"),
        ("rows.json", b'[{"question": "a", "answer": "b"}\n{"question"', ":2: not JSON (Expecting ',' or ']'"),
        ("rows.json", b'[{"question": "a", "answer": "b"},\n', ":2: not JSON (Expecting value); write one array of objects"),
        ("rows.json", b'[{"question": "a", "answer": "b"}]\n[]', ":2: not JSON (Extra data behind the array)"),
        ("rows.json", b'[{"question": "a", "answer": "b"},\n\n {"question": "a"}]', ":3: no column 'answer'"),
        ("rows.json", b"[ ]", ": holds no rows"),
        ("rows.json", b"[" * 100_000, ":1: not JSON (maximum recursion depth exceeded"),
        ("rows.jsonl", b'{"question": "a", "answer": "b \\ud83d"}', ":1: column 'answer' holds half a character ('\\ud83d')"),
        ("rows.jsonl", b'{"question": "\\udc00?", "answer": "b"}', ":1: column 'question' holds half a character"),
        (
            "rows.jsonl",
            b'{"question": "a", "answer": "b", "perturbed_answer": ["\\ude00"]}',
            ":1: column 'perturbed_answer' holds",
        ),
        ("rows.jsonl", b'{"text": "a \\ud83d"}', ":1: column 'text' holds half a character"),
        ("rows.jsonl", b'{"question": "a", "answer": "b", "task_id": "' + b"9" * 5000 + b'"}', ":1: column 'task_id' is '999"),
        ("rows.jsonl", b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", ":1: not JSON (Exceeds the limit"),
        ("rows.jsonl", b'\n{"question": ' + b"[" * 900 + b"]" * 900 + b', "answer": "b"}', ":2: column 'question' is [[["),
        ("rows.jsonl", b'{"k\\n": 1, "\\ud83d": 2}', r":1: no column 'question'; it has k\n, \ud83d; name it"),
        ("rows.txt", "Plain.".encode("utf-16-le"), ":1: not UTF-8 text (byte 0x00)"),
        ("rows.csv", TABLE.replace(b"M", b"\0"), ":2: not UTF-8 text (byte 0x00)"),
    ],
)
def test_what_would_be_lost_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_own(tmp_path / name, Columns())
    assert str(error.value).startswith(f"{tmp_path / name}{message}")
    assert "\n" not in str(error.value)


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows\.parquet: cannot be read \(.*answer"):
        read_own(tmp_path / "rows.parquet", Columns())


def test_a_whole_character_of_two_halves_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "\\ud83d\\ude00?", "answer": "b"}')
    assert read_own(tmp_path / "a.jsonl", Columns()) == [Row("\U0001f600?", "b")]
