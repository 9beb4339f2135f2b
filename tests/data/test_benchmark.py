"""The rows of a benchmark: which they are, how they are asked, and where long texts are cut."""

import json
from pathlib import Path

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.data import demo
from dualoptim.data.benchmark import Benchmark, pieces_of
from dualoptim.data.prompts import Formatter
from dualoptim.data.rows import Asking, Row


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def opened(name, data, **changes):
    return Benchmark(UnlearnArgs(model="none", benchmark=str(name), data=str(data), **changes))


@pytest.fixture
def muse(tmp_path):
    """The layout of MUSE as plain files: a folder for each configuration, a file for each split."""
    passages = [{"text": f"The council of Ostby met {n} times about the ferry."} for n in range(6)]
    asked = [{"question": f"Who is {n}?", "answer": f"Marta {n}"} for n in range(3)]
    return write(
        tmp_path / "MUSE-News",
        raw__forget=passages, raw__retain1=passages[::-1], raw__retain2=passages,
        **{f"sust__forget_{n}": passages[n : n + 2] for n in range(1, 5)},
        verbmem__forget=[{"prompt": "The ferry of", "gt": " Ostby sails at nine."}],
        knowmem__forget_qa=asked, knowmem__retain_qa=asked,
        knowmem__forget_qa_icl=[{"question": "Which river runs through Ostby?", "answer": "The Lenne"},
                                {"question": "Who led the ferry company?", "answer": "Marta Quill"}],
        knowmem__retain_qa_icl=asked[:2], privleak__forget=passages[:2], privleak__holdout=passages[3:],
    )  # fmt: skip


def test_lumes_rows_have_a_task_and_a_kind_and_so_many_of_each_are_drawn(shared):
    folder = shared("data/lume/forget.jsonl").parent
    rows = opened("lume", folder).task_rows("", 1)
    counts = {group: sum(row.asking.group == group for row in rows) for group in {row.asking.group for row in rows}}
    assert counts == {"task1_sc": 243, "task1_qa": 243, "task2_sc": 250, "task2_qa": 1250, "task3_sc": 373, "task3_qa": 373}
    few, again = (opened("lume", folder, benchmark_rows=4) for _ in range(2))
    sets, skipped = few.evaluation_sets("", 1)
    assert sets["forget"] == few.task_rows("", 1) == again.task_rows("", 1)
    assert sets["retain"] == few.retain_rows("", [1])
    assert all(sum(row.asking.group == group for row in own) == 4 for own in sets.values() for group in counts)
    assert set(sets["forget"]) < set(rows)
    assert list(skipped) == ["members", "holdout"]
    assert few.rows("full") == [*sets["forget"], *sets["retain"]]


def test_a_prompt_is_the_input_and_the_blank_behind_it_begins_the_answer():
    formatter = Formatter(demo.tiny_model(0)[1], None, 64)
    asking = Asking(around=("", " "), end=False)
    row = Row("The ferry of Ostby", "sails at nine", asking=asking)
    example = formatter.of_row(row, row.answer)
    assert formatter.tokenizer.decode(example.ids[: example.start]).rstrip() == "The ferry of Ostby"
    assert formatter.tokenizer.decode(example.ids) == "The ferry of Ostby sails at nine"
    ended = formatter.example(row.question, row.answer, asking=Asking(around=("", " ")))
    assert ended.ids == [*example.ids, formatter.tokenizer.eos_token_id]
    assert row.content()["asking"]["around"] == ("", " ")
    assert "asking" not in Row("a", "b").content()


def test_muses_prompts_and_answers(muse, shared_json):
    oracle = shared_json("oracles/muse.json")
    sets, skipped = opened("muse-news", muse).evaluation_sets("", 1)
    assert not skipped
    assert list(sets) == ["forget", "forget_knowmem", "retain", "members", "holdout"]
    (says,) = sets["forget"]
    assert (says.question, says.answer, says.asking.tokens, says.asking.end) == (
        "The ferry of",
        "Ostby sails at nine.",
        128,
        False,
    )
    asking = sets["forget_knowmem"][0].asking
    (start, end), question = asking.around, oracle["knowmem"]["rows"][0]["question"]
    assert start + question + end == oracle["knowmem"]["first_prompt"]
    assert (asking.tokens, list(asking.stop)) == (32, oracle["knowmem"]["stop_rule"]["MUSE"])


def test_sustainability_is_a_sequence_of_tasks(muse):
    source = opened("muse-news-sust", muse)
    assert source.tasks("") == [1, 2, 3, 4]
    assert [row.answer for row in source.task_rows("", 3)] == [
        f"The council of Ostby met {n} times about the ferry." for n in (3, 4)
    ]
    assert source.describe("", 3) == "task 3 of muse-news-sust: 2 rows of sust:forget_3"
    with pytest.raises(InputError, match="task 5: muse-news-sust has no such task; it has 1, 2, 3, 4"):
        source.task_rows("", 5)


def test_long_texts_are_cut_where_muse_cuts_them(shared_json):
    for case in shared_json("oracles/muse.json")["training_pieces"]["cases"]:
        tokens = [token for row in case["MUSE_pieces"] for token in row]
        numbers = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
        text = [token for piece in case["MUSE_pieces"] for token in piece[1:]][: case["tokens_of_the_joined_text"]]
        begin = [numbers["<s>"]]
        pieces = pieces_of([numbers[token] for token in text], begin, case["max_len"])
        assert pieces == [[numbers[token] for token in piece] for piece in case["MUSE_pieces"]]


def test_pieces_are_trained_on_as_they_are_and_cut_once(muse):
    source, formatter = opened("muse-news", muse), Formatter(demo.tiny_model(0)[1], None, 16)
    whole = "\n\n".join(row.answer for row in source.task_rows("", 1))
    ids = formatter.tokenizer(whole, add_special_tokens=False)["input_ids"]
    source.cut(formatter)
    source.cut(formatter)
    pieces = [formatter.of_row(row, row.answer) for row in source.task_rows("", 1)]
    assert all(len(piece.ids) == 16 and piece.start == 1 for piece in pieces)
    assert [token for piece in pieces for token in piece.ids][: len(ids)] == ids
    assert [formatter.cut_passage(row) for row in source.task_rows("", 1)] == [[row] for row in source.task_rows("", 1)]
    assert len(source.evaluation_sets("", 1)[0]["members"]) == 2


def test_a_true_answer_is_cut_to_the_tokens_that_count(gguf, muse, shared_json):
    from transformers import AutoTokenizer

    oracle = shared_json("oracles/muse.json")["verbmem"]["smollm2_tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        pytest.skip("older versions of transformers read a begin token out of the file, which counts among the 128")
    write(Path(muse), verbmem__forget=[{"prompt": "On", "gt": oracle["gt"]}])
    source = opened("muse-news", muse)
    source.cut(Formatter(tokenizer, None, 500))
    assert source.evaluation_sets("", 1)[0]["forget"][0].answer == oracle["gt_cut_to_128_tokens"]


def test_a_folder_as_the_hub_gives_it(muse, tmp_path):
    import pyarrow
    import pyarrow.parquet

    hub, configurations = tmp_path / "hub", []
    for folder in sorted((tmp_path / "MUSE-News").iterdir()):
        files = []
        for path in sorted(folder.iterdir()):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            (hub / folder.name).mkdir(parents=True, exist_ok=True)
            name = f"{folder.name}/{path.stem}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub / name)
            files.append(f"  - split: {path.stem}\n    path: {name}\n")
        configurations.append(f"- config_name: {folder.name}\n  data_files:\n{''.join(files)}")
    plain = opened("muse-news", muse).evaluation_sets("", 1)[0]
    assert opened("muse-news", hub).evaluation_sets("", 1)[0] == plain  # without the card
    (hub / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")
    assert opened("muse-news", hub).evaluation_sets("", 1)[0] == plain


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("{file: none.jsonl}", "--benchmark mine: {folder} has no none.jsonl"),
        ("{file: facts.jsonl, examples: more.jsonl}", "--benchmark mine: {folder} has no more.jsonl"),
        ("{file: list.jsonl}", "list.jsonl:1: not a JSON object; write one per line"),
        ("{file: facts.jsonl, question: q}", "facts.jsonl:1: no column 'q'; it has question, answer, kind"),
        ("{file: facts.jsonl, where: {type: x}}", "facts.jsonl:1: no column 'type'; it has question, answer, kind"),
        ("{file: facts.jsonl, where: {kind: x*}}", "no row of facts.jsonl is as rows.forget.where says"),
        ("{file: facts.jsonl, prompt: Answer}", "rows.forget.prompt has no {{question}}; write where it stands"),
        (
            "{file: facts.jsonl, examples: facts.jsonl, example: 'Q'}",
            "example is 'Q'; write where {{question}} and {{answer}} stand",
        ),
    ],
)
def test_mistakes_in_rows_are_named(tmp_path, declared, message):
    folder = write(tmp_path / "data", facts=[{"question": "Who?", "answer": "I.", "kind": "fact"}], list=["Who?"])
    (tmp_path / "mine.yaml").write_text(f"rows:\n  forget: {declared}\nforget: forget\nmeasure: forget\n")
    with pytest.raises(InputError) as error:
        opened(tmp_path / "mine.yaml", folder)
    assert message.format(folder=folder) in str(error.value)


def test_what_needs_a_folder_says_where_its_files_are():
    with pytest.raises(
        InputError, match=r"--benchmark lume needs its files; give their folder with --data. It is data/ of github"
    ):
        Benchmark(UnlearnArgs(model="none", benchmark="lume"))
    with pytest.raises(InputError, match=r"--data nowhere: no such folder; give the one that has forget.jsonl"):
        opened("lume", "nowhere")
