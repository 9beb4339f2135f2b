"""What a benchmark declares: read as it is written, and refused in one line where it is wrong."""

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.config.opening import parse_yaml
from dualoptim.data import declaration
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
        ("kept.jsonl",),
        {"kind": "fact"},
    )
    assert longest_answer(UnlearnArgs(model="x", benchmark=own(OWN), data=".")) == 300
    assert longest_answer(UnlearnArgs(model="x")) == 128


def test_a_declaration_is_parsed_once_and_again_once_its_file_has_changed(own, monkeypatch):
    path, parsed = own(OWN), []
    monkeypatch.setattr(declaration, "parse_yaml", lambda *a: parsed.append(a) or parse_yaml(*a))
    declaration._declaration.cache_clear()
    assert read_declaration(path) is read_declaration(path)
    assert len(parsed) == 1
    assert read_declaration(own(OWN.replace("300", "30"))).rows["kept"].tokens == 30
    assert len(parsed) == 2


def test_a_declaration_may_extend_another(own):
    books, news = read_declaration("muse-books"), read_declaration("muse-news")
    assert books.rows == news.rows
    assert [name for name in news.scores if news.scores[name] != books.scores[name]] == ["auc_retrain"]
    cyber = read_declaration("wmdp-cyber")
    assert (list(cyber.corpora), cyber.forgotten(), cyber.kept()) == (["cyber"], ["cyber"], ["wikitext"])
    mine = read_declaration(own("extends: lume\nrows: {forget: {tokens: 64}}"))
    assert (mine.rows["forget"].tokens, mine.rows["forget"].file, mine.scores) == (
        64,
        ("forget.jsonl",),
        read_declaration("lume").scores,
    )
    sustained = read_declaration("muse-news-sust")
    assert [sustained.rows[name].file[0] for name in sustained.forget] == [f"sust:forget_{n}" for n in range(1, 5)]
    assert sustained.rows["passages_2"].join == "\n\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "holds no `name: value` lines; data/README.md shows a whole one"),
        ("row: {}", "unknown key 'row'; take name, about,"),
        ("rows: {forget: {fil: x}}", "rows.forget: unknown key 'fil'; take file, like, parts,"),
        ("rows: {forget: {tokens: many}}", "rows.forget.tokens is 'many'; give a whole number from 0"),
        ("rows: {forget: {file: x, end: 1}}", "rows.forget.end is 1; give true or false"),
        ("rows: {forget: {file: x, where: a}}", "rows.forget.where is 'a'; give `name: value` lines"),
        ("rows: {forget: {tokens: 3}}", "rows.forget has no file; name one of --data"),
        ("rows: {forget: {like: none}}", "rows.forget.like is 'none'; name an entry that is not itself like another"),
        ("rows: {a: {file: x}}\nforget: b", "forget names 'b'; rows has a"),
        ("rows: {a: {file: x}}", "nothing is forgotten; name an entry of rows under forget"),
        ("rows: {a: {file: x}}\nforget: a\nmeasure: a", "measure has no set called forget; rename a wherever it stands"),
        (
            "rows: {a: {file: x}, forget_b: {file: x}}\nforget: a\nmeasure: [a, forget_b]",
            "measure has no set called forget; rename forget_b wherever it stands",
        ),
        ("rows: {a: {file: x}}\nforget: a", "measure has no set called forget; add an entry forget to rows and measure"),
        ("scores: {a: {of: '1', should: stays}}\nextends: lume", "scores.a.should is 'stays'; give rise, fall or stay, `fall"),
        ("scores: {a: {of: '1', should: Fall}}\nextends: lume", "scores.a.should is 'Fall'; give rise"),
        ("scores: {a: {of: '1', should: be}}\nextends: lume", "scores.a.should is 'be'; give rise"),
        (
            "rows: {forget: {file: a}, kept: {file: b}}\nforget: forget\ncorpora: {one: {forget: forget}}\nmeasure: forget",
            "corpora.one says what is forgotten and kept; give it forget, and drop the keys forget and retain",
        ),
        ("rows: {forget: {file: a}}\ncorpora: {one: {forget: two}}\nmeasure: forget", "forget names 'two'; rows has forget"),
        ("extends: tofu", "extends is 'tofu'; take lume,"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(own, text, message):
    with pytest.raises(InputError) as error:
        read_declaration(own(text))
    assert message in str(error.value)


def test_what_is_trained_on_to_be_forgotten_is_a_forget_set_by_any_name(own):
    rows = "{letters: {file: a, groups: {long: {}}}, letters_open: {file: a}, forget: {file: b}, forget_me_not: {file: c}}"
    found = read_declaration(
        own(f"rows: {rows}\nforget: letters\nretain: forget_me_not\nmeasure: [letters, letters_open, forget, forget_me_not]")
    )
    names = ["letters", "letters_long", "letters_open", "forget", "forget_task2", "forget_me_not", "holdout"]
    assert [name for name in names if found.forgets(name)] == ["letters", "letters_long", "forget", "forget_task2"]


def test_a_name_that_there_is_not_lists_those_that_there_are():
    with pytest.raises(InputError, match=r"--benchmark lme: no such benchmark; take lume, muse-books, .* or give a .yaml file"):
        read_declaration("lme")
    with pytest.raises(InputError, match=r"--benchmark none.yaml: cannot be read|none.yaml"):
        read_declaration("none.yaml")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("beta: 0", "beta is 0; give a number above 0"),
        ("beta: -1.5", "beta is -1.5; give a number above 0"),
        ("beta: .nan", "beta is nan; give a number above 0"),
        ("beta: .inf", "beta is inf; give a number above 0"),
        (f"beta: {'9' * 400}", f"beta is {'9' * 18}"),  # more than a float holds
        ("regularization_coeff: 0.0", "regularization_coeff is 0; give a number above 0"),
    ],
)
def test_what_a_corpus_has_in_place_of_a_flag_is_within_its_bounds(own, said, message):
    path = own(f"extends: wmdp\ncorpora: {{bio: {{{said}}}}}")
    with pytest.raises(InputError) as error:
        read_declaration(path)
    assert str(error.value).startswith(f"--benchmark {path}: corpora.bio.{message}")
