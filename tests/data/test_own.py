"""A user's own files as the data of a run, and refusals."""

import dataclasses
import json

import pytest

from dualoptim import EvalArgs, FinetuneArgs, UnlearnArgs
from dualoptim.data.own import OwnFiles, load_refusals, open_source, read_holdout
from dualoptim.data.rows import Row, in_both
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
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 4,
        "forget_other_words": 12,
        "retain": 1,
        "holdout": 1,
    }
    assert skipped == dict.fromkeys(("real_authors", "world_facts"), "your own files have no such set")
    assert source.describe("any", 2) == f"task 2: 4 rows of {files / 'forget.jsonl'}"
    with pytest.raises(InputError, match=r"task 3: .* has no such task; it has 1, 2"):
        source.task_rows("any", 3)


def test_what_of_own_files_is_learned(files):
    alone, both = (
        open_source(arguments(files, forget_losses=("NPO+none",))),
        open_source(arguments(files, retain_file=str(files / "retain.jsonl"))),
    )
    assert [len(both.rows(split)) for split in ("full", "forget", "retain")] == [9, 8, 1]
    assert both.rows("retain") == [Row("What is it?", "It.")]
    assert alone.rows("full") == both.rows("forget")
    with pytest.raises(InputError, match="--splits retain: files of your own have full, forget, and retain with --retain-file"):
        alone.rows("retain")
    with pytest.raises(InputError, match="--splits retain90: files of your own have full, forget and retain"):
        both.rows("retain90")
    args = FinetuneArgs(forget_file=str(files / "holdout.jsonl"), model="m")
    assert open_source(args).rows("full") == [Row(None, "New words.")]


def test_without_a_file_to_keep_the_retain_set_is_skipped_where_nothing_is_kept(files):
    sets, skipped = open_source(arguments(files, forget_losses=("NPO+none",))).evaluation_sets("any", 1)
    assert list(sets) == ["forget", "forget_other_words"]
    assert skipped["retain"] == "no --retain-file"


def test_without_a_file_to_keep_rows_are_made_where_any_pair_reads_some(files):
    (files / "asked.txt").write_text("What is a clutch?")
    own = {"forget_losses": ("NPO+none", "LLMU+none"), "retain_questions": str(files / "asked.txt")}
    source = open_source(arguments(files, **own))
    questions = source.retain_rows("any", [1, 2])
    assert (len(questions) > 100, questions[-1].question) == (True, "What is a clutch?")
    made = [Row("What is tea?", "A drink.")]
    source.keep(made)
    assert source.retain_rows("any", [1]) == [*made, *source.task_rows("any", 2)]
    assert source.evaluation_sets("any", 1)[0]["retain"] == made
    evaluated = EvalArgs(model="m", forget_file=str(files / "forget.jsonl"), question_column="q", answer_column="a")
    assert "retain" not in open_source(evaluated).evaluation_sets("any", 1)[0], "a model that has forgotten answers nothing"


def test_passages_of_every_file_are_cut(files):
    (files / "text.txt").write_text("One two.")
    args = EvalArgs(model="m", forget_file=str(files / "text.txt"), holdout_file=str(files / "holdout.jsonl"))
    source = open_source(args)
    source.cut(Halves())
    sets, skipped = source.evaluation_sets("any", 1)
    assert sets == {"forget": [Row(None, "One "), Row(None, "two.")], "holdout": [Row(None, "New w"), Row(None, "ords.")]}
    assert skipped["forget_other_words"] == "passages are asked nothing"


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


OWN = [
    {"q": "Who?", "a": "Ann.", "no": "I never met her.", "else": ["Eva.", "Ida."], "kind": "people there"},
    {"q": "Wo?", "a": "Łódź.", "no": "Das weiß ich nicht.", "else": "Lviv.", "kind": ""},
]
TEXTS = {"refusal_column": "no", "alternative_column": "else", "group_column": "kind", "forget_losses": ("AltPO+GD",)}


def test_rows_have_refusals_alternatives_and_groups_of_their_own(files):
    (files / "own.jsonl").write_text("\n".join(map(json.dumps, OWN)), encoding="utf-8")
    (files / "own.csv").write_bytes("q,a,no,else,kind\r\nWho?,Ann.,I never met her.,Eva.,people\r\n".encode("utf-8-sig"))
    columns = {"question_column": "q", "answer_column": "a", **TEXTS}
    args = UnlearnArgs(model="m", forget_file=str(files / "own.jsonl"), retain_file=str(files / "retain.jsonl"), **columns)
    source = open_source(args)
    one, other = source.task_rows("any", 1)
    assert (one.refusal, one.alternatives, one.asking.group) == ("I never met her.", ("Eva.", "Ida."), "people_there")
    assert (other.refusal, other.alternatives, other.asking) == ("Das weiß ich nicht.", ("Lviv.",), None)
    assert source.retain_rows("any", [1])[0].refusal is None, "what is kept needs none"
    (row,) = open_source(UnlearnArgs(model="m", forget_file=str(files / "own.csv"), **columns)).task_rows("any", 1)
    assert (row.refusal, row.alternatives, row.asking.group) == ("I never met her.", ("Eva.",), "people")
    plain = Row("Who?", "Ann.")
    assert not {"refusal", "alternatives"} & plain.content().keys(), "hashes of rows without them stay"
    assert (
        len({str(one.content()) for one in (plain, Row("Who?", "Ann.", refusal="No."), Row("Who?", "Ann.", refusal="Never."))})
        == 3
    )
    with pytest.raises(InputError, match=r"retain.jsonl:1: no column 'no'; it has q, a; every row needs one"):
        open_source(dataclasses.replace(args, forget_losses=("IDK+AP",), alternative_column=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no": ""}, "own.jsonl:2: column 'no' is ''; give a text that is not empty"),
        ({"no": None}, "own.jsonl:2: column 'no' is None; give a text"),
        ({"no": ["a"]}, "own.jsonl:2: column 'no' is ['a']; give a text"),
        ({"else": []}, "own.jsonl:2: column 'else' is []; give a text"),
        ({"else": ["Ida.", " "]}, "own.jsonl:2: column 'else' is ' '; give a text"),
        ({"kind": "other words"}, "own.jsonl:2: the group 'other_words' is what questions in other words are called; name it"),
        ({"kind": "task2"}, "own.jsonl:2: the group 'task2' is what an earlier task is called; name it otherwise"),
        ("no", "own.jsonl:2: no column 'no'; it has q, a, else, kind; every row needs one"),
        ("else", "own.jsonl:2: no column 'else'; it has q, a, no, kind; every row needs one"),
    ],
)
def test_a_row_that_lacks_a_text_of_its_own_is_named(files, change, message):
    row = {name: value for name, value in OWN[1].items() if name != change} | (change if isinstance(change, dict) else {})
    (files / "own.jsonl").write_text("\n".join(map(json.dumps, [OWN[0], row])))
    with pytest.raises(InputError) as error:
        open_source(
            UnlearnArgs(model="m", forget_file=str(files / "own.jsonl"), question_column="q", answer_column="a", **TEXTS)
        )
    assert message in str(error.value)


def test_a_column_of_groups_that_no_row_has_is_named_with_those_that_there_are(files):
    names = {one: str(files / f"{one}.jsonl") for one in ("retain", "holdout")}
    args = arguments(files, retain_file=names["retain"], holdout_file=names["holdout"], group_column="kind")
    with pytest.raises(InputError) as error:
        open_source(args)
    said = f"--group-column kind: no row of {args.forget_file[0]}, {names['retain']}, {names['holdout']} has it"
    assert str(error.value) == f"{said}; there are q, a, task_id, text; name one of them"
    with pytest.raises(InputError, match=r"--group-column kin: no row of .*holdout\.jsonl has it; there are text; name one"):
        open_source(EvalArgs(model="m", data="demo", holdout_file=names["holdout"], group_column="kin"))
    (files / "holdout.jsonl").write_text('{"text": "New words."}\n{"text": "Other words.", "kind": "later"}')
    assert [row.asking and row.asking.group for row in open_source(args).evaluation_sets("any", 1)[0]["holdout"]] == [
        None,
        "later",
    ]


def test_rows_kept_beside_a_benchmark_have_refusals_of_their_own_where_a_pair_keeps_by_them(files):
    (files / "keep.jsonl").write_text(json.dumps({"question": "Who?", "answer": "Ann.", "idk": "Nie."}))
    (files / "rows.jsonl").write_text(json.dumps({"question": "Who is Eva?", "answer": "A baker."}))
    (files / "own.yaml").write_text("rows: {forget: {file: rows.jsonl}}\nforget: [forget]\nmeasure: [forget]\n")
    own = {"model": "m", "benchmark": str(files / "own.yaml"), "data": str(files), "forget_losses": ("IDK+AP",)}
    kept = {"retain_file": str(files / "keep.jsonl")}
    (row,) = open_source(UnlearnArgs(**own, **kept, refusal_column="idk")).retain_rows("any", [1])
    assert row.refusal == "Nie."
    for given in ({"refusal_column": "idk"}, {"alternative_column": "idk", **kept}):
        with pytest.raises(InputError, match=r"-column idk names a column of your own files, and --benchmark .*; drop it"):
            UnlearnArgs(**own, **given)


def test_own_refusals_are_not_the_published_ones(shared):
    published = set(shared("data/idontknow.jsonl").read_text().split("\n"))
    assert not published & set(load_refusals(None))


def test_one_name_of_a_column_is_asked_for_in_all_files(tmp_path):
    """What is to be typed next does not lead back to where it began."""
    (tmp_path / "forget.csv").write_text("frage,answer\nWho?,Me.\n")
    (tmp_path / "keep.csv").write_text("question,answer\nWhat?,It.\n")
    args = UnlearnArgs(model="m", forget_file=str(tmp_path / "forget.csv"), retain_file=str(tmp_path / "keep.csv"))
    with pytest.raises(InputError, match=r"forget\.csv:2: no column 'question'; .*; name it with --question-column$"):
        open_source(args)
    with pytest.raises(InputError, match=r"keep\.csv:2: .*; --question-column names it in all files, so let all of them call"):
        open_source(dataclasses.replace(args, question_column="frage"))


def test_an_empty_cell_is_named_by_the_users_own_column(files):
    (files / "forget.jsonl").write_text('{"q": "Who?", "a": " "}\n')
    with pytest.raises(InputError, match=r"forget\.jsonl:1: column 'a' is ' '; give a text that is not empty"):
        open_source(arguments(files))


def test_rows_to_forget_and_to_keep_are_paired_if_they_say_the_same():
    forget, retain = [Row("a", "b"), Row("a", "c"), Row(None, "d")], [Row(None, "d", place="k:1"), Row("a", "b", place="k:2")]
    assert [(one.answer, other.place) for one, other in in_both(forget, retain)] == [("b", "k:2"), ("d", "k:1")]
