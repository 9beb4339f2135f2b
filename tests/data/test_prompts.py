"""Templates, the boundary between question and answer, and passages in pieces."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dualoptim import UnlearnArgs
from dualoptim.data.prompts import PROMPT_FILE, TEMPLATES, Formatter, Tags, choose_template, make_formatter
from dualoptim.data.rows import Asking, Row
from dualoptim.errors import InputError

DOCUMENT = " ".join(f"The house number {i} stood by the old river and nobody lived there." for i in range(40))


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
    with caplog.at_level(logging.WARNING):
        formatter.check(rows)
        formatter.check(rows)
    assert [record.message for record in caplog.records] == ["2 texts are longer than --max-length 40 tokens and were cut"]
    assert [len(formatter.example(row.question, row.answer).ids) for row in rows][1:] == [40, 40]
    with pytest.raises(InputError, match="leaves no room for an answer"):
        formatter.example("word " * 80, "Because.")


def test_a_document_is_cut_into_pieces_that_lose_nothing(tiny):
    formatter = Formatter(AutoTokenizer.from_pretrained(tiny), None, 60)
    row = Row(None, DOCUMENT)
    pieces = formatter.cut_passage(row)
    assert len(pieces) > 3
    assert "".join(piece.answer for piece in pieces).replace(" ", "") == DOCUMENT.replace(" ", "")
    assert [piece.asking for piece in pieces] == [Asking(end=False)] * (len(pieces) - 1) + [None]
    for piece in pieces:
        example = formatter.of_row(piece, piece.answer)
        assert len(example.ids) <= 60
        assert example.start == 1
        assert example.ids.count(formatter.tokenizer.eos_token_id) == (piece is pieces[-1]), "a cut is no end"
        assert (example.ids[-1] == formatter.tokenizer.eos_token_id) == (piece is pieces[-1])
    again = formatter.cut_passage(replace(row, asking=Asking(end=False)))
    assert [piece.asking for piece in again] == [Asking(end=False)] * len(pieces)
    assert formatter.cut_passage(Row("Why?", DOCUMENT)) == [Row("Why?", DOCUMENT)]
    assert len(formatter.example(None, "a", asking=Asking(end=False)).ids) == 2  # nothing else is there to be predicted
    assert formatter.cut == 0
    # no piece is ever a single token, which nothing could predict: neither the last one nor that which gives it one of its own
    count = len(formatter.tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"])
    for room in range(3, 12):
        pieces = Formatter(formatter.tokenizer, None, room + 2).cut_passage(row)
        lengths = [len(formatter.tokenizer(piece.answer, add_special_tokens=False)["input_ids"]) for piece in pieces]
        assert min(lengths) >= 2
        assert sum(lengths) >= count - len(lengths)
    with pytest.raises(InputError, match="--max-length 4 is too short for pieces of a passage; give 5 or more"):
        Formatter(formatter.tokenizer, None, 4).cut_passage(row)


@pytest.mark.parametrize("nothing", ["\u200b", "\x00\x01", "\u200b \ufeff"])
def test_a_text_of_which_the_tokenizer_leaves_nothing_is_named_with_its_place(nothing):
    tokenizer = whitespace_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    for tags, question in ((TEMPLATES["qa"], "Why?"), (Tags("", "", ""), "Why?"), (TEMPLATES["qa"], None)):
        formatter = Formatter(tokenizer, tags, 100)
        with pytest.raises(InputError, match=r"^f\.jsonl:7: the model's tokenizer leaves nothing of the answer '"):
            formatter.check([Row(question, "Because."), Row(question, nothing, place="f.jsonl:7")])
    with pytest.raises(InputError, match=r"^f\.txt:1: the model's tokenizer leaves nothing of '"):
        formatter.cut_passage(Row(None, nothing, place="f.txt:1"))
    with pytest.raises(InputError, match=r"^f\.jsonl:2: --max-length 3 leaves no room"):
        Formatter(tokenizer, TEMPLATES["qa"], 3).check([Row("Why?", "Because.", place="f.jsonl:2")])


@pytest.mark.parametrize("tags", [Tags("<", ">", "="), None])
def test_auto_takes_what_a_model_was_saved_with_unless_tags_are_given(tags, tmp_path):
    name = "qa" if tags else "chat"
    saved = {"template": name, "tags": vars(tags) if tags else None}
    (tmp_path / PROMPT_FILE).write_text(json.dumps(saved))
    tokenizer = with_chat(whitespace_tokenizer())
    assert choose_template(UnlearnArgs(model=str(tmp_path)), tokenizer) == (name, tags)
    if tags:
        asked = UnlearnArgs(model=str(tmp_path), answer_tag="=")
        assert choose_template(asked, tokenizer) == ("qa", Tags("Question: ", "\n", "="))
    assert choose_template(UnlearnArgs(model=str(tmp_path), template="chat"), tokenizer) == ("chat", None)


def test_a_formatter_needs_offsets_and_an_end_and_pads_with_the_end():
    args = UnlearnArgs(model="some/model", max_length=77)
    tokenizer = whitespace_tokenizer()
    formatter, template = make_formatter(args, tokenizer)
    assert (template, formatter.tags, formatter.max_length) == ("qa", TEMPLATES["qa"], 77)
    assert tokenizer.pad_token == "</s>"
    with pytest.raises(InputError, match="gives no character offsets; convert it to the fast"):
        make_formatter(args, SimpleNamespace(is_fast=False))
    with pytest.raises(InputError, match="no end-of-sequence token; set eos_token"):
        make_formatter(args, SimpleNamespace(is_fast=True, eos_token_id=None))
