"""Rows, tasks, templates, token boundaries and the order of examples."""

import hashlib
import json
import logging

import pytest
from conftest import shared
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dualoptim import UnlearnArgs
from dualoptim.data import demo
from dualoptim.data.tofu import (
    TEMPLATES,
    Formatter,
    Row,
    Source,
    Stream,
    Tags,
    choose_template,
    example_builder,
    load_refusals,
    read_rows,
)
from dualoptim.errors import InputError

SPLITS = {"forget01": (10, 40, 3600), "forget05": (10, 200, 2000), "forget10": (9, 400, 400)}


# ------------------------------------------------------------------------------------------------- the published folder


@pytest.fixture(scope="module")
def tofu():
    return Source(str(shared("data/tofu")))


@pytest.mark.parametrize("split", list(SPLITS))
def test_tasks_of_the_published_folder(tofu, split):
    tasks, size, never_forgotten = SPLITS[split]
    assert tofu.tasks(split) == list(range(1, tasks + 1))
    for task in (1, tasks):
        assert len(tofu.task_rows(split, task)) == size
    unlearned = [1, 3]
    pool = tofu.retain_rows(split, unlearned)
    assert len(pool) == never_forgotten + size * (tasks - len(unlearned))
    questions = {row.question for row in pool}
    assert not questions & {row.question for task in unlearned for row in tofu.task_rows(split, task)}
    assert {row.question for row in tofu.task_rows(split, 2)} <= questions


def test_evaluation_sets_of_the_published_folder(tofu):
    sets, skipped = tofu.evaluation_sets("forget01", 4)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 40,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert skipped == {}
    assert [row.question for row in sets["forget"]] == [row.question for row in tofu.task_rows("forget01", 4)]
    assert all(row.paraphrased_answer and len(row.perturbed_answers) == 5 for row in sets["forget"] + sets["retain"])


# --------------------------------------------------------------------------------------------------- the layout of the hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder as the hub holds `locuslab/TOFU`: a card that lists configurations, and files without task numbers."""
    published = Source(str(shared("data/tofu")))
    folder = tmp_path_factory.mktemp("hub") / "TOFU"
    folder.mkdir()

    def plain(rows):
        return [{"question": row.question, "answer": row.answer} for row in rows]

    full = plain(published.rows("retain90")) + plain(row for k in range(1, 11) for row in published.task_rows("forget01", k))
    perturbed = [json.loads(line) for line in shared("data/tofu/forget10_perturbed.json").read_text().splitlines()]
    perturbed = [{k: v for k, v in row.items() if k != "task_id"} for row in perturbed if row["task_id"] == "1"]
    configurations = {
        "full": full,
        "forget01": full[3960:],
        "forget05": full[3800:],
        "forget10": full[3600:],
        "retain99": full[:3960],
        "retain95": full[:3800],
        "retain90": full[:3600],
        "forget01_perturbed": perturbed[-40:],
        "forget10_perturbed": perturbed,
    }
    for name, rows in configurations.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        (folder / f"{name}.json").write_text(shared(f"data/tofu/{name}.json").read_text())
        configurations[name] = []
    card = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in configurations)
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{card}---\n# TOFU\n")
    return folder


@pytest.fixture(scope="module", params=["through datasets", "as files"])
def hub_source(request, hub, tmp_path_factory):
    if request.param == "as files":
        folder = tmp_path_factory.mktemp("files")
        for file in hub.glob("*.json"):
            (folder / file.name).write_text(file.read_text())
        return Source(str(folder))
    return Source(str(hub))


def test_tasks_are_cut_from_full_as_published(hub_source, tofu):
    for split, task in (("forget01", 1), ("forget01", 10), ("forget05", 1), ("forget05", 7), ("forget10", 3)):
        assert [(r.question, r.answer) for r in hub_source.task_rows(split, task)] == [
            (r.question, r.answer) for r in tofu.task_rows(split, task)
        ]
    assert hub_source.describe("forget05", 3).endswith("rows 3200 to 3399 of " + hub_source.name + " full")


def test_task_zero_is_the_hubs_own_cut(hub_source):
    assert [r.question for r in hub_source.task_rows("forget01", 0)] == [r.question for r in hub_source.rows("full")[3960:]]
    assert len(hub_source.retain_rows("forget01", [0])) == 3960
    with pytest.raises(InputError, match="mixes task 0"):
        hub_source.retain_rows("forget01", [0, 1])


def test_retain_pools_of_both_layouts_hold_the_same_rows(hub_source, tofu):
    for split, unlearned in (("forget01", [1]), ("forget05", [1, 2]), ("forget10", [2])):
        ours = {row.question for row in hub_source.retain_rows(split, unlearned)}
        assert ours == {row.question for row in tofu.retain_rows(split, unlearned)}


def test_evaluation_sets_of_the_hub_layout(hub_source, tofu):
    sets, skipped = hub_source.evaluation_sets("forget01", 2)
    assert skipped == {}
    expected = tofu.evaluation_sets("forget01", 2)[0]["forget"]
    assert [(r.question, r.perturbed_answers) for r in sets["forget"]] == [(r.question, r.perturbed_answers) for r in expected]
    outside, _ = hub_source.evaluation_sets("forget05", 7)  # rows 2000..2200: the hub has no compared answers for them
    assert len(outside["forget"]) == 200
    assert all(row.perturbed_answers == () for row in outside["forget"])


def test_forget10_is_evaluated_on_all_of_its_rows():
    source = Source(str(shared("data/tofu/forget10_perturbed.json").parent))
    assert len(source.evaluation_sets("forget10", 1)[0]["forget"]) == 400


def test_a_missing_evaluation_set_is_named(tmp_path):
    (tmp_path / "forget01.json").write_text('{"question": "q", "answer": "a"}')
    sets, skipped = Source(str(tmp_path)).evaluation_sets("forget01", 1)
    assert list(sets) == ["forget"]
    assert set(skipped) == {"retain", "real_authors", "world_facts"}


# ------------------------------------------------------------------------------------------------------------- the demo


def test_demo_rows_are_deterministic_and_in_tofus_shape():
    splits = demo.splits()
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    assert digest == "364dcd5571344b7542c16dac59968332d6ff6d7d5c6e7166480e396a398d0b05"
    assert len(splits["full"]) == len(demo.NAMES) * len(demo.FACTS) == 400
    assert len({row["question"] for row in splits["full"]}) == 400
    for row in splits["forget05_perturbed"] + splits["retain_perturbed"]:
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]
    for row in splits["real_authors_perturbed"] + splits["world_facts_perturbed"]:
        assert len(set(row["perturbed_answer"])) == 3
        assert row["answer"] not in row["perturbed_answer"]
    assert all(len(set(values)) == 20 for *_, values in demo.FACTS)


def test_demo_tasks_are_authors():
    source = Source("demo")
    rows = source.task_rows("forget05", 3)
    assert len(rows) == 20
    assert all(demo.NAMES[12] in row.question for row in rows)
    assert len(source.retain_rows("forget05", [1, 2])) == 200 + 8 * 20


# -------------------------------------------------------------------------------------------------------------- refusals


def test_own_refusals_are_many_and_varied(tmp_path):
    refusals = load_refusals(None)
    assert len(refusals) >= 100
    assert len({line.lower() for line in refusals}) == len(refusals)
    assert all(line[-1] in ".!" and len(line) > 8 for line in refusals)
    (tmp_path / "own.txt").write_text("No.\n\n  Never heard of it. \n")
    assert load_refusals(str(tmp_path / "own.txt")) == ["No.", "Never heard of it."]


def test_own_refusals_are_not_the_published_ones():
    published = set(shared("data/idontknow.jsonl").read_text().split("\n"))
    assert not published & set(load_refusals(None))


# ---------------------------------------------------------------------------------------------- templates and boundaries


def whitespace_tokenizer(extra=(), **kwargs):
    """Words as tokens, made on the spot: enough to choose templates by vocabulary."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", "Question", "Answer", ":", *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **kwargs)


CHAT = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def with_chat(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "flags", "name", "prompt"),
    [
        (with_chat(whitespace_tokenizer()), {}, "chat", "<u>Why?</u><a>"),
        (whitespace_tokenizer(), {}, "qa", "Question: Why?\nAnswer: "),
        (
            whitespace_tokenizer(["<|start_header_id|>"]),
            {},
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (whitespace_tokenizer(["<|assistant|>"]), {}, "phi", "<|user|>\nWhy?<|end|>\n<|assistant|>\n"),
        (whitespace_tokenizer(), {"model": "org/Llama-2-7b"}, "llama2", "[INST] Why? [/INST]"),
        (whitespace_tokenizer(), {"model": "locuslab/tofu_ft_llama2-7b"}, "llama2", "[INST] Why? [/INST]"),
        (with_chat(whitespace_tokenizer()), {"template": "qa"}, "qa", "Question: Why?\nAnswer: "),
        (with_chat(whitespace_tokenizer()), {"answer_tag": "A: "}, "qa", "Question: Why?\nA: "),
        (
            whitespace_tokenizer(),
            {"question_start_tag": "Q\\n", "question_end_tag": "", "answer_tag": "->"},
            "qa",
            "Q\nWhy?->",
        ),
    ],
)
def test_template_choice(tokenizer, flags, name, prompt):
    args = UnlearnArgs(**{"model": "some/model", **flags})
    chosen, tags = choose_template(args, tokenizer)
    assert chosen == name
    assert Formatter(tokenizer, tags, 100).prompt("Why?") == prompt


def test_a_token_across_the_boundary_belongs_to_the_answer(tiny):
    """`Answer: ` + `The` is one token ` The` here. Counting the prompt's own tokens would leave it unscored."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    formatter = Formatter(tokenizer, TEMPLATES["qa"], 100)
    example = formatter.example("Which genre is Ilvara Quenby best known for?", "The last one.")
    assert tokenizer.decode(example.ids[example.start :]) == " The last one.<|end|>"
    counted = len(tokenizer(formatter.prompt("Which genre is Ilvara Quenby best known for?"))["input_ids"])
    assert counted == example.start + 1  # the published way loses the first answer token
    assert example.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("tags", [*TEMPLATES.values(), Tags("", "", ""), Tags("", "?", "")])
@pytest.mark.parametrize("answer", ["Paris", " Paris", "Ça va 日本!", "'Quoted' text", "1984", "x"])
def test_prompt_and_answer_are_split_where_the_text_is(tiny, tags, answer):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    formatter = Formatter(tokenizer, tags, 200)
    example = formatter.example("What is the capital of France", answer)
    scored = tokenizer.decode(example.ids[example.start : -1], clean_up_tokenization_spaces=False)
    given = tokenizer.decode(example.ids[: example.start], clean_up_tokenization_spaces=False)
    assert given + scored == formatter.prompt("What is the capital of France") + answer
    assert scored.endswith(answer)
    assert tokenizer.decode(example.ids[example.start + 1 : -1]) != scored


def test_the_question_is_scored_on_request(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 100)
    assert formatter.example("Why?", "Because.", score_question=True).start == 1
    assert formatter.example("Why?", "Because.").start > 1


def test_an_end_token_of_the_tokenizers_own_is_not_doubled(tiny):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    ids = Formatter(tokenizer, TEMPLATES["qa"], 100).example("Why?", "Because.").ids
    assert ids.count(tokenizer.eos_token_id) == 1


def test_overlong_rows_are_cut_with_one_warning(tiny, caplog):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 40)
    rows = [Row("Why?", "word " * n) for n in (3, 50, 90)]
    build = example_builder(rows, formatter, ("answer",), seed=0)
    with caplog.at_level(logging.WARNING):
        formatter.check(rows)
        formatter.check(rows)
    assert [record.message for record in caplog.records] == ["2 texts are longer than --max-length 40 tokens and were cut"]
    assert [len(build(index, 0)[0].ids) for index in range(3)][1:] == [40, 40]
    with pytest.raises(InputError, match="leaves no room for an answer"):
        formatter.example("word " * 80, "Because.")


# --------------------------------------------------------------------------------------------------------------- streams


def stream(processes=1, process=0, batch_size=4, accumulation=3, rows=17, seed=5):
    return Stream(
        "forget", rows, lambda index, epoch: [(int(index), epoch)], seed, batch_size, accumulation, process, processes
    )


def flat(windows):
    return [example for window in windows for micro_batch in window for example in micro_batch]


def test_every_epoch_visits_every_row_once():
    seen = flat(stream().window(step) for step in range(17))  # 17 steps of 12 = 12 epochs of 17
    for epoch in range(12):
        assert sorted(index for index, visited in seen if visited == epoch) == list(range(17))
    orders = [[index for index, visited in seen if visited == epoch] for epoch in range(12)]
    assert len({tuple(order) for order in orders}) == 12


def test_a_step_sees_the_same_rows_on_any_number_of_processes():
    for step in (0, 1, 7):
        alone = flat([stream(batch_size=4, accumulation=6).window(step)])
        for processes, batch_size, accumulation in ((2, 4, 3), (2, 2, 6), (3, 4, 2), (8, 1, 3)):
            shares = [flat([stream(processes, p, batch_size, accumulation).window(step)]) for p in range(processes)]
            assert [example for share in shares for example in share] == alone


def test_a_stream_needs_no_memory_of_what_came_before():
    forward, jumping = stream(), stream()
    windows = [flat([forward.window(step)]) for step in range(12)]
    for step in (11, 3, 0, 7):
        assert flat([jumping.window(step)]) == windows[step]


def test_the_seed_and_the_phase_choose_the_order():
    base = flat([stream().window(0)])
    assert flat([stream(seed=6).window(0)]) != base
    other = stream()
    other.name = "retain"
    assert flat([other.window(0)]) != base


def test_refusals_vary_over_rows_and_epochs_and_repeat_with_the_seed(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), TEMPLATES["qa"], 200)
    rows = [Row(f"Question {n}?", "Answer.") for n in range(10)]
    refusals = load_refusals(None)
    first = example_builder(rows, formatter, ("answer", "refusal"), 1, refusals)
    again = example_builder(rows, formatter, ("answer", "refusal"), 1, refusals)
    other = example_builder(rows, formatter, ("answer", "refusal"), 2, refusals)
    drawn = [first(index, epoch)[1].ids for epoch in range(3) for index in range(10)]
    assert [again(index, epoch)[1].ids for epoch in range(3) for index in range(10)] == drawn
    assert [other(index, epoch)[1].ids for epoch in range(3) for index in range(10)] != drawn
    texts = {formatter.tokenizer.decode(ids[first(0, 0)[1].start :]) for ids in drawn}
    assert len(texts) > 20
    answer, refusal = first(3, 0)
    assert answer.ids[: answer.start] == refusal.ids[: refusal.start]


def test_a_last_line_without_its_end_is_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"question": "a?", "answer": "b", "task_id": 2}\n\n{"question": "c?", "answer": "d", "task_id": "2"}')
    assert read_rows(path) == [Row("a?", "b", task=2), Row("c?", "d", task=2)]
