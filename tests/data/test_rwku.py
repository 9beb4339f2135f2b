"""RWKU's rows: per target, with its prompts to the letter, in each of the layouts in which its files lie."""

import json
from dataclasses import replace

import pytest
from rwku_layout import write_rwku

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.config.product import sequences
from dualoptim.data import demo
from dualoptim.data.benchmark import Benchmark
from dualoptim.data.prompts import TEMPLATES, Formatter, Tags
from dualoptim.data.stream import ExampleBuilder
from dualoptim.data.targets import with_targets

PEOPLE = ("Marta Quill", "Ostby Lind, Duke of Derry")


@pytest.fixture(scope="module")
def rwku(tmp_path_factory):
    return write_rwku(tmp_path_factory.mktemp("rwku"), PEOPLE)


def opened(data, name="rwku", **changes):
    return Benchmark(UnlearnArgs(model="none", benchmark=name, data=str(data), **changes))


def probes_of(source, task=1):
    return source.evaluation_sets("", task)[0]["forget"]


CHAT = """{% for one in messages %}<|{{ one.role }}|>
{{ one.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.mark.parametrize("template", ["chat", "tags"])
def test_prompts_are_those_of_its_code(shared_json, tmp_path, template):
    oracle = shared_json("oracles/rwku.json")
    write_rwku(tmp_path, ["Somebody"], probes=oracle["forget_probes"], neighbors=oracle["neighbor_probes"])
    tokenizer = demo.tiny_model(0)[1]
    tokenizer.chat_template = CHAT
    tags = Tags("<|user|>\n", "<|end|>\n<|assistant|>\n") if template == "tags" else None
    formatter = Formatter(tokenizer, tags, 500)
    expected = {probe["query"]: probe["prompt"] for probe in oracle["forget_probes"]}
    rows = probes_of(opened(tmp_path))
    assert len(rows) == len(expected)
    for row in rows:
        prompt, answer = row.asking.words(row.question, row.answer, formatter.prompt)
        assert prompt == expected[row.question]
        assert answer == ("" if row.asking.lead == "" else " ") + row.answer
        example = formatter.of_row(row, row.answer)
        assert tokenizer.decode(example.ids[example.start :], skip_special_tokens=True).strip().startswith(row.answer)
        assert example.ids[: example.start] == tokenizer(prompt)["input_ids"]  # what a model goes on from
        assert (row.asking.tokens, row.asking.stop_tokens) == (30, (" \n", "\n"))


def test_in_context_unlearning_tells_a_model_to_forget_in_every_prompt(shared_json, tmp_path):
    oracle = shared_json("oracles/rwku.json")
    write_rwku(tmp_path, ["Somebody"], probes=oracle["forget_probes"])
    sets, _ = opened(tmp_path, "rwku-icu").evaluation_sets("", 1)
    formatter = Formatter(demo.tiny_model(0)[1], Tags("<|user|>\n", "<|end|>\n<|assistant|>\n"), 500)
    first = sets["forget"][0]
    assert first.asking.words(first.question, "", formatter.prompt)[0] == oracle["icu_prompt_level_1_example"]
    assert sets["forget_passages"][0].answer.startswith("You are an AI Assistant who is supposed to unlearn about Somebody and")
    assert not opened(tmp_path, "rwku-icu").task_rows("", 1)[0].answer.startswith("You")


def test_each_target_has_its_own_rows_and_what_names_no_target_belongs_to_all(rwku):
    source = opened(rwku)
    assert source.targets == list(PEOPLE)
    assert source.tasks("") == [1, 2]
    for task, person in enumerate(PEOPLE, start=1):
        sets, skipped = source.evaluation_sets("", task)
        assert all(person in row.answer for row in source.task_rows("", task))
        assert all(person in row.question for row in sets["forget"])
        assert [row.asking.group for row in sets["forget"]] == [
            "level1", "level2", "level3 prefix_injection", "level3 affirmative_suffix", "level3 incontext_learning"
        ]  # fmt: skip
        assert [row.asking.group for row in sets["retain"]] == ["level1", "level2"]
        assert not skipped
        assert sets["fluency"][0].question == "Tell of a day."
    assert source.describe("", 2) == "task 2 of rwku: 2 rows of Ostby Lind, Duke of Derry"
    assert source.retain_rows("", [1]) == []


@pytest.mark.parametrize("layout", ["Target", "of one", "All", "flat", "hub"])
def test_the_same_rows_in_every_layout(rwku, tmp_path, layout):
    usual = opened(rwku)
    people = PEOPLE
    folder = write_rwku(tmp_path, people, layout="Target" if layout == "of one" else layout)
    source = opened(folder / "Target" if layout == "of one" else folder)
    assert source.targets == list(people)
    for task in (1, 2):
        assert source.task_rows("", task) == usual.task_rows("", task)
        assert source.evaluation_sets("", task) == usual.evaluation_sets("", task)


@pytest.mark.parametrize(
    ("people", "folders"),
    [
        (("Stephen King", "King"), ("1_Stephen_King", "2_King")),
        (("King", "Stephen King", "A King"), ("1_King", "12_Stephen_King", "3_A_King")),
        (("a_b", "b", "a b c"), ("1_a_b", "2_b", "3_a_b_c")),
        (("[K]ing*", "King", "Who?"), ("1_[K]ing*", "2_King", "3_Who?")),
        (("Zoë Łoś", "Łoś"), ("1_Zoe\u0308_Łos\u0301", "2_Łoś")),
    ],
)
@pytest.mark.parametrize("within", ["Target", "."])
def test_a_targets_folder_is_the_one_of_its_whole_name(tmp_path, people, folders, within):
    (tmp_path / "intro.json").write_text(json.dumps([{"target": name} for name in people]))
    for name, folder in zip(people, folders, strict=True):
        (tmp_path / within / folder).mkdir(parents=True)
        for file in ("positive.json", "forget_level1.json"):
            row = {"text": f"Of {name}.", "query": f"Who is {name}?", "answer": "x"}  # that names no subject
            (tmp_path / within / folder / file).write_text(json.dumps([row]))
    source = opened(tmp_path)
    assert source.targets == list(people)
    for task, name in enumerate(people, start=1):
        assert [row.answer for row in source.task_rows("", task)] == [f"Of {name}."]


def test_choices_and_examples_of_utility_sets(rwku):
    sets, _ = opened(rwku).evaluation_sets("", 1)
    (general,), (truth,), (fact,), (reason,) = (sets[name] for name in ("mmlu", "truthfulqa", "triviaqa", "bbh"))
    prompt, answer = general.asking.words(general.question, general.answer, lambda asked: f"<{asked}>")
    assert prompt == (
        "<The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Question: One?\nA. yes\nB. no\nAnswer: B\n\nPlease following the previous examples and answer the given question.\n"
        "Question: Two?\nA. red\nB. blue\nC. green>Answer:"
    )
    assert (answer, general.perturbed_answers) == (" C", ("A", "B"))
    assert (truth.answer, truth.perturbed_answers) == ("Nothing happens.", ("You die.", "You fly."))
    assert (fact.answer, fact.asking.accepted) == ("Rim of Fire", ("the Ring of Fire",))
    assert reason.asking.words(reason.question, reason.answer, str)[0].startswith("Q: 1+1? A: so the answer is 2.\n\nFollowing")


def test_what_is_measured_may_be_longer_than_what_trains(rwku):
    source, tokenizer = opened(rwku), demo.tiny_model(0)[1]
    formatter = Formatter(tokenizer, TEMPLATES["qa"], 40)
    (primed,) = source.evaluation_sets("", 1)[0]["truthfulqa"]
    assert len(formatter.of_row(primed, primed.answer).ids) > 200
    with pytest.raises(InputError, match="--max-length 40 leaves no room"):
        formatter.example(*primed.asking.words(primed.question, primed.answer, str))
    assert len(formatter.of_row(replace(source.task_rows("", 1)[0], answer="a " * 99), "a " * 99).ids) == 40


def test_pairs_and_refusals_bring_what_should_be_answered(rwku):
    (pair,) = opened(rwku, "rwku-pairs").task_rows("", 1)
    assert (pair.answer, pair.refusal) == ("Marta Quill was born in Ostby.", "Marta Quill was made up.")
    formatter = Formatter(demo.tiny_model(0)[1], TEMPLATES["qa"], 300)
    examples = ExampleBuilder([pair], formatter, ("answer", "refusal"), 0, ["I don't know."])(0, 0)
    assert [example.ids for example in examples] == [formatter.of_row(pair, text).ids for text in (pair.answer, pair.refusal)]
    (refusal,) = opened(rwku, "rwku-refusals").task_rows("", 1)
    assert refusal.answer == refusal.refusal == "I do not know the answer."
    assert opened(rwku, "rwku-passages").task_rows("", 2)[0].answer.startswith("Ostby Lind")
    assert opened(rwku, "rwku-phi").task_rows("", 2)[0].answer.startswith("Phi on Ostby Lind")


@pytest.mark.parametrize(
    ("given", "tasks"),
    [
        (("Marta Quill",), (1,)),
        (("ostby_lind,_duke_of_derry", "1_Marta_Quill"), (2, 1)),
        (("all",), (1, 2)),
        (("people.txt",), (2, 1)),
    ],
)
def test_targets_are_tasks_by_their_names(rwku, tmp_path, monkeypatch, given, tasks):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people.txt").write_bytes("\ufeffOstby Lind, Duke of Derry\r\n\r\n Marta Quill\r\n".encode())
    args = with_targets(UnlearnArgs(model="none", benchmark="rwku", data=str(rwku), targets=given))
    names = tuple(PEOPLE[task - 1] for task in tasks)
    assert (args.task_list, args.tasks_independent, args.targets) == (tasks, True, names)
    assert with_targets(args) == args  # as a config.yaml says it
    assert [(one.task_list, one.targets) for one in sequences(args)] == [((task,), (PEOPLE[task - 1],)) for task in tasks]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("Marta",)}, "--targets 'Marta': rwku has 2 targets, and none of this name; the nearest is 'Marta Quill'"),
        ({"targets": ("Marta Quill", "marta_quill")}, "--targets names 'Marta Quill' twice; give each once"),
        ({"targets": ("all",), "task_list": (2,)}, "--targets and --task-list both say what is forgotten; give one of them"),
        ({"targets": ("none.txt",)}, "--targets none.txt: cannot be read"),
        (
            {"targets": ("all",), "benchmark": None, "data": None},
            "--targets all are those of a benchmark; give --benchmark rwku",
        ),
        ({"targets": ("all",), "task_list": (2, 1)}, "--targets and --task-list both say what is forgotten; give one of them"),
        ({"targets": ("all", "all")}, "--targets names all twice; give each value once"),
    ],
)
def test_targets_that_there_are_not(rwku, changes, message):
    with pytest.raises(InputError) as error:
        with_targets(UnlearnArgs(**{"model": "none", "benchmark": "rwku", "data": str(rwku), **changes}))
    assert message in str(error.value)


def test_a_benchmark_without_targets_has_none_to_choose_from(shared):
    lume = shared("data/lume/forget.jsonl").parent
    with pytest.raises(InputError, match=r"^--targets: lume has none to choose from; drop it$"):
        with_targets(UnlearnArgs(model="none", benchmark="lume", data=str(lume), targets=("all",)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"choices": "red", "answer": 0},
            "choices is 'red'; give a list and the number of the right one as answer, or choices",
        ),
        ({"choices": ["red"], "answer": 2}, "choices is ['red']; give a list and the number of the right one as answer"),
        ({"choices": {"choices": [], "labels": [0]}, "answer": 0}, "give a list and the number of the right one"),
        ({"choices": ["red", "blue"], "answer": 1, "examples": 5}, "rows.forget.shots: examples is 5; give a list of rows"),
        ({"choices": ["red", "blue"], "answer": 1, "examples": [1]}, "rows.forget.shots: examples is [1]; give a list of rows"),
    ],
)
def test_choices_that_are_none(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Which?", "examples": [], **row}))
    (tmp_path / "mine.yaml").write_text(
        "rows:\n  forget: {file: rows.jsonl, choices: choices, shots: examples, message: '{shots}{question}'}\n"
        "forget: forget\nmeasure: forget\n"
    )
    with pytest.raises(InputError) as error:
        opened(tmp_path, str(tmp_path / "mine.yaml"))
    assert message in str(error.value)


def test_an_evaluation_is_of_one_target(rwku):
    same = {"model": "none", "benchmark": "rwku", "data": str(rwku)}
    assert with_targets(EvalArgs(**same, targets=(PEOPLE[1],))).task == 2
    with pytest.raises(InputError, match=r"--targets names 2, and a model is measured on one; give that"):
        with_targets(EvalArgs(**same, targets=("all",)))


def test_what_a_target_lacks_is_named(tmp_path):
    folder = write_rwku(tmp_path, PEOPLE, layout="Target")
    (folder / "Target" / "2_Ostby_Lind,_Duke_of_Derry" / "positive.json").write_text(
        json.dumps([{"text": "x", "subject": "y"}])
    )
    with pytest.raises(InputError, match=r"--benchmark rwku: no row of positive.json is of Ostby Lind, Duke of Derry and as"):
        opened(folder).task_rows("", 2)
    (folder / "Target" / "1_Marta_Quill" / "fluency.json").unlink()
    assert list(opened(folder).evaluation_sets("", 1)[1]) == ["fluency"]


def test_rows_to_keep_may_be_given_where_a_benchmark_has_none(rwku, tmp_path):
    from dualoptim.data.own import open_source

    (tmp_path / "keep.jsonl").write_text('{"q": "Who?", "answer": "I."}')
    same = {"model": "none", "retain_file": (str(tmp_path / "keep.jsonl"),), "question_column": "q"}
    (kept,) = open_source(UnlearnArgs(benchmark="rwku", data=str(rwku), **same)).retain_rows("", [1])
    assert kept.question == "Who?"
    with pytest.raises(InputError, match=r"--retain-file: lume says by itself what is kept; drop it"):
        open_source(UnlearnArgs(benchmark="lume", data=str(rwku), **same))
