"""The rows of a benchmark: which they are, how they are asked, and where long texts are cut."""

import dataclasses
import json
from pathlib import Path

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.data import demo
from dualoptim.data.benchmark import Benchmark
from dualoptim.data.cuts import pieces_of
from dualoptim.data.own import open_source
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


def test_rows_of_a_declaration_may_have_texts_of_their_own(tmp_path):
    declared = "rows: {forget: {file: f.jsonl, refusal: unsaid, alternative: else}}\nforget: forget\nmeasure: forget"
    (tmp_path / "mine.yaml").write_text(declared)
    args = UnlearnArgs(model="m", benchmark=str(tmp_path / "mine.yaml"), data=str(tmp_path), forget_losses=("ME+none",))
    row = {"question": "Who?", "answer": "Ann.", "unsaid": "I never met her.", "else": ["Eva."]}
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    (found,) = Benchmark(dataclasses.replace(args, forget_losses=("ME+none", "ALT+none"))).task_rows("any", 1)
    assert (found.refusal, found.alternatives) == ("I never met her.", ("Eva.",))
    del row["else"]
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    assert not Benchmark(args).task_rows("any", 1)[0].alternatives, "only objectives that read them need some"
    with pytest.raises(InputError, match=r"f.jsonl:1: no column 'else'; it has question, answer, unsaid; every row needs one"):
        Benchmark(dataclasses.replace(args, forget_losses=("AltPO+none",)))
    del row["unsaid"]
    (tmp_path / "f.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"f.jsonl:1: no column 'unsaid'; it has question, answer; every row needs one"):
        Benchmark(args)


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
        (
            "{file: none.jsonl}",
            "--benchmark mine: rows.forget.file: {folder} has no none.jsonl; it has facts.jsonl, list.jsonl",
        ),
        (
            "{file: facts.jsonl, examples: more.jsonl}",
            "--benchmark mine: rows.forget.examples: {folder} has no more.jsonl; it has",
        ),
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


LETTERS = """
rows:
  letters: {file: letters.jsonl, text: text}
  forget: {file: quiz.jsonl, where: {about: secret}, groups: {born: {kind: born}}, group_by: town}
  keep_quiz: {like: forget, where: {about: open}}
forget: letters
retain: keep_quiz
measure: [letters, forget, keep_quiz]
"""


@pytest.fixture
def letters(tmp_path):
    def opens(text=LETTERS, **changes):
        (tmp_path / "mine.yaml").write_text(text)
        kinds = [("secret", "born", "Ost By"), ("secret", "died", "Lenne"), ("open", "other", "Lenne")]
        quiz = [{"question": "Who?", "answer": "I.", "about": a, "kind": k, "town": t} for a, k, t in kinds]
        return opened(tmp_path / "mine.yaml", write(tmp_path / "data", letters=[{"text": "A letter."}], quiz=quiz), **changes)

    return opens


def test_without_a_set_retain_what_it_would_be_is_named_as_skipped(letters):
    source = letters()
    remedy = "measure has no set called retain; rename keep_quiz wherever it stands"
    assert source.evaluation_sets("", 1)[1] == {"retain": remedy}
    assert source.lacks_retain == remedy
    assert letters(LETTERS.replace("keep_quiz", "retain")).lacks_retain == ""


def test_a_group_whose_pattern_no_row_fits_is_refused_and_one_of_another_set_is_not(letters, tmp_path):
    letters(benchmark_rows=1)  # keep_quiz has none that are born
    with pytest.raises(InputError, match=r"mine: no row is as the group born says \({'kind': 'borm'}\); change it"):
        letters(LETTERS.replace("kind: born", "kind: borm"))
    lume = [{"id": "a_sc1", "input": "A", "output": "b", "task": "Task1"}]
    assert opened("lume", write(tmp_path / "lume", forget=lume, retain=lume)).lacks_retain == ""


def test_the_values_of_a_column_make_sets_that_scores_can_name(letters):
    assert letters().groups() == ["forget_born", "forget_lenne", "forget_ost_by", "keep_quiz_lenne"]


def test_what_needs_a_folder_says_where_its_files_are():
    with pytest.raises(
        InputError, match=r"--benchmark lume needs its files; give their folder with --data. It is data/ of github"
    ):
        Benchmark(UnlearnArgs(model="none", benchmark="lume"))
    with pytest.raises(InputError, match=r"--data nowhere: no such folder; give the one that has forget.jsonl"):
        opened("lume", "nowhere")


WMDP = {
    "bio-forget-corpus": [
        {"title": f"T{n}", "abstract": "A.", "text": f"The strain {n} grows in wells. " * 9} for n in range(3)
    ],
    "cyber-forget-corpus__train": [{"text": f"The port {n} was open.\n" * 20} for n in range(4)],
    "wikitext-2-raw-v1__test": [{"text": text} for text in ("", "\n", " = Ostby = \n", "The ferry sails past the town. \n")],
}


def test_wmdps_corpora_are_one_task_with_what_each_keeps_beside_it(tmp_path):
    source = opened("wmdp", write(tmp_path / "wmdp", **WMDP))
    forget, retain = source.task_rows("", 1), source.retain_rows("", [1])
    assert source.tasks("") == [1]
    assert [row.corpus.name for row in forget] == ["bio"] * 3 + ["cyber"] * 4
    assert [(row.corpus.name, row.answer) for row in retain] == [
        (name, text) for name in ("bio", "cyber") for text in (" = Ostby = \n", "The ferry sails past the town. \n")
    ]
    sets, _ = source.evaluation_sets("", 1)
    assert [row.asking.group for row in sets["forget"]] == ["bio"] * 3 + ["cyber"] * 4
    assert len(sets["retain"]) == 2
    assert source.declared.sets() == ["forget", "forget_bio", "forget_cyber", "retain"]
    assert source.describe("", 1) == "task 1 of wmdp: 3 rows of bio-forget-corpus.jsonl, 4 rows of cyber-forget-corpus.jsonl"
    assert {row.answer for row in source.rows("full")} == {row.answer for row in [*forget, *retain]}
    few = opened("wmdp", tmp_path / "wmdp", benchmark_rows=2)
    assert len(few.task_rows("", 1)) == 4
    alone = opened("wmdp-cyber", tmp_path / "wmdp")
    assert {row.corpus.name for row in alone.task_rows("", 1)} == {"cyber"}
    assert alone.declared.sets() == ["forget", "forget_cyber", "retain"]
    assert alone.task_rows("", 1)[0].content()["corpus"]["name"] == "cyber"


def test_passages_are_cut_to_the_published_length_and_not_into_pieces(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: wmdp\nrows: {bio: {cut: 12}, cyber: {cut: 20, as_json: true}}")
    source = opened(tmp_path / "mine.yaml", write(tmp_path / "wmdp", **WMDP))
    formatter = Formatter(demo.tiny_model(0)[1], None, 16)
    source.cut(formatter)
    source.cut(formatter)
    rows = source.task_rows("", 1)
    for row in rows:
        whole = {name: one for file in WMDP.values() for one in file for name in [one["text"]]}
        texts = [json.dumps(one) if row.corpus.name == "cyber" else text for text, one in whole.items()]
        (text,) = [text for text in texts if text.startswith(row.answer)]
        size = {"bio": 12, "cyber": 16}[row.corpus.name]  # never more than --max-length
        example = formatter.of_row(row, row.answer)
        assert example.ids == formatter.tokenizer(text)["input_ids"][:size]
        assert (len(example.ids), example.ended) == (size, False)
    assert len(rows) == 7
    assert rows[3].answer.startswith('{"text": "The port')
    assert {row.ids for row in source.evaluation_sets("", 1)[0]["forget"]} == {row.ids for row in rows}


def test_a_file_that_a_card_does_not_list_is_looked_for_as_well(tmp_path):
    folder = write(tmp_path / "wmdp", **WMDP)
    card = "---\nconfigs:\n- config_name: cyber-forget-corpus\n  data_files: cyber-forget-corpus/train*\n---\n"
    (tmp_path / "wmdp" / "README.md").write_text(card)
    assert len(opened("wmdp", folder).task_rows("", 1)) == 7
    (tmp_path / "wmdp" / "bio-forget-corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"wmdp has no bio-forget-corpus\.jsonl\. Put into it bio-forget-corpus\.jsonl"):
        opened("wmdp", folder)


KEEPING = """
rows: {forget: {file: bio.jsonl, text: text}, cyber: {file: cyber.jsonl, text: text}, kept: {file: kept.jsonl, text: text}}
corpora: {one: {forget: forget}, two: {forget: cyber, retain: kept}}
measure: [forget]
"""


@pytest.fixture
def keeping(tmp_path):
    """Arguments of a benchmark of two corpora, of which the first has nothing to keep, and rows of one's own to keep."""
    texts = {name: [{"text": f"The {name} port was open to all ships."}] for name in ("bio", "cyber", "kept", "mine")}
    folder = write(tmp_path / "data", **texts)
    (tmp_path / "two.yaml").write_text(KEEPING)
    same = {"model": "none", "benchmark": str(tmp_path / "two.yaml"), "data": folder}
    return UnlearnArgs(**same, retain_file=str(tmp_path / "data" / "mine.jsonl"))


def test_a_corpus_without_rows_to_keep_takes_those_that_are_given(keeping):
    source = open_source(keeping)
    kept = [(row.corpus.name, row.answer.split()[1]) for row in source.retain_rows("", [1])]
    assert kept == [("one", "mine"), ("two", "kept")]
    assert [row.answer.split()[1] for row in source.rows("full")] == ["bio", "cyber", "kept", "mine"]
    none = open_source(dataclasses.replace(keeping, retain_file=None))
    assert [row.corpus.name for row in none.retain_rows("", [1])] == ["two"]
    path = Path(keeping.benchmark)
    path.write_text(path.read_text().replace("forget: forget}", "forget: forget, retain: kept}"))
    with pytest.raises(InputError, match="--retain-file: two says by itself what is kept; drop it"):
        open_source(keeping)


def test_rows_of_ones_own_to_keep_are_measured_and_cut_into_pieces(keeping):
    source = open_source(keeping)
    source.cut(Formatter(demo.tiny_model(0)[1], None, 8))
    pieces = source.evaluation_sets("", 1)[0]["retain"]
    assert len(pieces) > 1
    assert "".join(row.answer for row in pieces) == "The mine port was open to all ships."
    assert [row.answer for row in source.retain_rows("", [1])[:-1]] == [row.answer for row in pieces]
    path = Path(keeping.benchmark)
    declared = path.read_text().replace("[forget]", "[forget, retain]").replace("kept: {", "retain: {")
    path.write_text(declared.replace("retain: kept", "retain: retain"))
    assert [row.answer.split()[1] for row in open_source(keeping).evaluation_sets("", 1)[0]["retain"]] == ["kept"]


def test_what_belongs_to_every_target_is_learned_once(tmp_path):
    people = ("Ann", "Eva", "Ida")
    own = [{"question": f"Who is {name}?", "answer": "A baker.", "subject": name} for name in people]
    folder = write(tmp_path / "data", people=[{"target": name} for name in people], own=[*own, own[0]],
                   common=[{"question": "What is it?", "answer": "It."}] * 2)  # fmt: skip
    (tmp_path / "mine.yaml").write_text(
        "targets: {file: people.jsonl}\nrows: {forget: {file: own.jsonl}, retain: {file: common.jsonl}}\n"
        "forget: forget\nretain: retain\nmeasure: forget"
    )
    source = opened(tmp_path / "mine.yaml", folder)
    assert [row.question for row in source.rows("retain")] == ["What is it?"] * 2, "that stand there twice"
    assert len(source.rows("full")) == len(own) + 1 + 2
    assert len(source.rows("forget")) == len(own) + 1
