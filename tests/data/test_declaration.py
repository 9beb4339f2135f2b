"""What a benchmark declares: read as it is written, and refused in one line where it is wrong."""

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.data.declaration import benchmarks, longest_answer, read_declaration

OWN = """
rows:
  forget: {file: facts.jsonl, tokens: 300}
  kept: {like: forget, file: kept.jsonl, where: {kind: fact}}
forget: forget
retain: kept
measure: [forget]
"""


@pytest.fixture
def own(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_every_benchmark_of_the_package_can_be_read_and_says_where_it_is_from():
    assert {"lume", "muse-news", "muse-books"} <= set(benchmarks())
    for name in benchmarks():
        found = read_declaration(name)
        assert found.name == name
        assert found.about
        assert found.source
        assert found.data or found.get
        assert all(set(scores) <= set(found.scores) for scores in found.published.results.values())


def test_an_entry_takes_what_it_does_not_say_from_one_that_it_is_like(own):
    found = read_declaration(own(OWN))
    assert (found.name, found.forget, found.retain) == ("mine", ("forget",), "kept")
    assert (found.rows["kept"].tokens, found.rows["kept"].file, found.rows["kept"].where) == (
        300,
        "kept.jsonl",
        {"kind": "fact"},
    )
    assert longest_answer(UnlearnArgs(model="x", benchmark=own(OWN), data=".")) == 300
    assert longest_answer(UnlearnArgs(model="x")) == 128


def test_a_declaration_may_extend_another(own):
    books, news = read_declaration("muse-books"), read_declaration("muse-news")
    assert books.rows == news.rows
    assert [name for name in news.scores if news.scores[name] != books.scores[name]] == ["auc_retrain"]
    mine = read_declaration(own("extends: lume\nrows: {forget: {tokens: 64}}"))
    assert (mine.rows["forget"].tokens, mine.rows["forget"].file, mine.scores) == (
        64,
        "forget.jsonl",
        read_declaration("lume").scores,
    )
    sustained = read_declaration("muse-news-sust")
    assert [sustained.rows[name].file for name in sustained.forget] == [f"sust:forget_{n}" for n in range(1, 5)]
    assert sustained.rows["passages_2"].join == "\n\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "holds no `name: value` lines; data/README.md shows a whole one"),
        ("row: {}", "unknown key 'row'; take name, about,"),
        ("rows: {forget: {fil: x}}", "rows.forget: unknown key 'fil'; take file, like,"),
        ("rows: {forget: {tokens: many}}", "rows.forget.tokens is 'many'; give a whole number from 0"),
        ("rows: {forget: {file: x, end: 1}}", "rows.forget.end is 1; give true or false"),
        ("rows: {forget: {file: x, where: a}}", "rows.forget.where is 'a'; give `name: value` lines"),
        ("rows: {forget: {tokens: 3}}", "rows.forget has no file; name one of --data"),
        ("rows: {forget: {like: none}}", "rows.forget.like is 'none'; name an entry that is not itself like another"),
        ("rows: {a: {file: x}}\nforget: b", "forget names 'b'; rows has a"),
        ("rows: {a: {file: x}}", "nothing is forgotten; name an entry of rows under forget"),
        ("rows: {a: {file: x}}\nforget: a\nmeasure: a", "measure lacks forget; one of its sets has that name"),
        ("extends: tofu", "extends is 'tofu'; take lume,"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(own, text, message):
    with pytest.raises(InputError) as error:
        read_declaration(own(text))
    assert message in str(error.value)


def test_a_name_that_there_is_not_lists_those_that_there_are():
    with pytest.raises(InputError, match=r"--benchmark lme: no such benchmark; take lume, muse-books, .* or give a .yaml file"):
        read_declaration("lme")
    with pytest.raises(InputError, match=r"--benchmark none.yaml: cannot be read|none.yaml"):
        read_declaration("none.yaml")
