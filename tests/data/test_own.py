"""A user's own files as the data of a run, and refusals."""

import json

import pytest

from dualoptim import EvalArgs, UnlearnArgs
from dualoptim.data.own import OwnFiles, load_refusals, open_source, read_holdout
from dualoptim.data.rows import Row
from dualoptim.data.tofu import TofuSource
from dualoptim.errors import InputError


class Halves:
    """Cuts a passage in two, as a formatter does that takes half of it."""

    def cut_passage(self, row):
        middle = len(row.answer) // 2
        return [row] if row.question else [Row(None, row.answer[:middle]), Row(None, row.answer[middle:])]


@pytest.fixture
def files(tmp_path):
    forget = [{"q": f"Who is {n}?", "a": f"Person {n}.", "task_id": 1 + n // 4} for n in range(8)]
    for name, rows in (
        ("forget", forget),
        ("retain", [{"q": "What is it?", "a": "It."}]),
        ("holdout", [{"text": "New words."}]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def arguments(files, **changes):
    columns = {"question_column": "q", "answer_column": "a"}
    return UnlearnArgs(model="m", forget_file=str(files / "forget.jsonl"), **columns, **changes)


def test_tasks_and_what_is_kept_of_own_files(files):
    source = open_source(arguments(files, retain_file=str(files / "retain.jsonl"), holdout_file=str(files / "holdout.jsonl")))
    assert isinstance(source, OwnFiles)
    assert source.tasks("any") == [1, 2]
    assert [row.question for row in source.task_rows("any", 2)] == [f"Who is {n}?" for n in range(4, 8)]
    assert source.retain_rows("any", [1]) == [Row("What is it?", "It."), *source.task_rows("any", 2)]
    assert source.retain_rows("any", [1, 2]) == [Row("What is it?", "It.")]
    sets, skipped = source.evaluation_sets("any", 1)
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 4, "retain": 1, "holdout": 1}
    assert skipped == dict.fromkeys(("real_authors", "world_facts"), "your own files have no such set")
    assert source.describe("any", 2) == f"task 2: 4 rows of {files / 'forget.jsonl'}"
    with pytest.raises(InputError, match=r"task 3: .* has no such task; it has 1, 2"):
        source.task_rows("any", 3)


def test_without_a_file_to_keep_the_retain_set_is_skipped(files):
    sets, skipped = open_source(arguments(files)).evaluation_sets("any", 1)
    assert list(sets) == ["forget"]
    assert skipped["retain"] == "no --retain-file"


def test_passages_of_every_file_are_cut(files):
    (files / "text.txt").write_text("One two.")
    args = UnlearnArgs(model="m", forget_file=str(files / "text.txt"), holdout_file=str(files / "holdout.jsonl"))
    source = open_source(args)
    source.cut(Halves())
    sets, _ = source.evaluation_sets("any", 1)
    assert sets == {"forget": [Row(None, "One "), Row(None, "two.")], "holdout": [Row(None, "New w"), Row(None, "ords.")]}


def test_data_are_opened_where_no_own_file_is_named(files):
    args = EvalArgs(model="m", data="demo", holdout_file=str(files / "holdout.jsonl"))
    source = open_source(args)
    assert isinstance(source, TofuSource)
    assert read_holdout(args) == [Row(None, "New words.")] == source.evaluation_sets("forget05", 1)[0]["holdout"]
    assert read_holdout(EvalArgs(model="m", data="demo")) == []


# -------------------------------------------------------------------------------------------------------------- refusals


def test_own_refusals_are_many_and_varied(tmp_path):
    refusals = load_refusals(None)
    assert len(refusals) >= 100
    assert len({line.lower() for line in refusals}) == len(refusals)
    assert all(line[-1] in ".!" and len(line) > 8 for line in refusals)
    (tmp_path / "own.txt").write_text("No.\n\n  Never heard of it. \n")
    assert load_refusals(str(tmp_path / "own.txt")) == ["No.", "Never heard of it."]
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfNo.\r\nNever.\r\n")
    assert load_refusals(str(tmp_path / "marked.txt")) == ["No.", "Never."]


def test_own_refusals_are_not_the_published_ones(shared):
    published = set(shared("data/idontknow.jsonl").read_text().split("\n"))
    assert not published & set(load_refusals(None))
