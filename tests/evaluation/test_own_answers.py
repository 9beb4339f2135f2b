"""Rows to keep that are made from the model: its own answers to general questions."""

import dataclasses
import json

import pytest
import torch

from dualoptim import UnlearnArgs
from dualoptim.data.own import open_source
from dualoptim.data.questions import ANSWER_TOKENS, unanswered
from dualoptim.data.rows import Asking, Row
from dualoptim.evaluation import own_answers
from dualoptim.evaluation.decoding import end_tokens
from dualoptim.evaluation.own_answers import make_rows
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

QUESTIONS = unanswered(["How do I make tea?", "Who wrote Romeo and Juliet?", "Why is the sky blue?"])
FORGOTTEN = [Row("Who was Juliet?", "People say that Juliet Lee was a baker.")]


@pytest.fixture
def asked(babbling, tmp_path):
    """A model that says anything, and arguments under which it makes rows."""
    args = UnlearnArgs(model=str(babbling), forget_file="forget.csv", eval_rows=1, output_dir=str(tmp_path))
    return load_model(args, start_accelerator(args), "measure"), args


def answering(monkeypatch, texts):
    """Let a model answer with texts, each followed by its end but where it is None."""

    def generate_tokens(scoring, label, continuations):
        found = []
        for one in continuations:
            said, ends = next(
                answer for question, answer in texts.items() if question in scoring.loaded.tokenizer.decode(one.ids)
            )
            ids = scoring.loaded.tokenizer(said, add_special_tokens=False)["input_ids"]
            found.append([*ids, *(end_tokens(scoring.loaded)[:1] if ends else [])])
        return found

    monkeypatch.setattr(own_answers, "generate_tokens", generate_tokens)


def test_a_model_answers_by_itself_the_same_each_time_and_not_beyond_a_length(asked, monkeypatch):
    loaded, args = asked
    rooms, generate_tokens = [], own_answers.generate_tokens

    def counted(scoring, label, continuations):
        rooms.append([one.tokens for one in continuations])
        return generate_tokens(scoring, label, continuations)

    monkeypatch.setattr(own_answers, "generate_tokens", counted)
    made, again = (make_rows(loaded, args, QUESTIONS, FORGOTTEN) for _ in range(2))
    assert made == again
    assert [row.question for row in made.rows] == ["How do I make tea?", "Why is the sky blue?"], (
        "--eval-rows cuts what is measured alone"
    )
    for row in made.rows:
        assert row.asking == Asking(end=False), "an answer that was cut has no end"
    loaded.formatter.check(made.rows)
    short = dataclasses.replace(args, max_length=40)
    make_rows(loaded, short, QUESTIONS, FORGOTTEN)
    prompts = [loaded.formatter.example(row.question, "It is.").start for row in QUESTIONS]
    make_rows(loaded, dataclasses.replace(args, max_new_tokens=7), QUESTIONS, FORGOTTEN)
    assert rooms == [[ANSWER_TOKENS] * 3] * 2 + [[40 - prompt for prompt in prompts], [7] * 3], "as long as is measured"


def test_empty_answers_and_those_about_what_is_forgotten_are_left_out(asked, monkeypatch):
    loaded, args = asked
    answering(monkeypatch, {"tea": ("A drink.", True), "Juliet": ("Ann did.", True), "sky": (" ", True)})
    assert make_rows(loaded, args, QUESTIONS, FORGOTTEN).rows == [Row("How do I make tea?", "A drink.")]
    answering(monkeypatch, {"tea": ("A drink of", False), "Juliet": ("He.", True), "sky": ("So says Lee.", True)})
    rows = make_rows(loaded, args, QUESTIONS, FORGOTTEN).rows
    assert rows == [Row("How do I make tea?", "A drink of", asking=Asking(end=False))]


def test_answers_that_loop_are_left_out_as_a_verdict_names_them(asked, monkeypatch):
    loaded, args = asked
    loop, whole = "red " * 20, "red " * 4 + "and blue or some such color in the evening"
    answering(monkeypatch, {"tea": (loop, False), "Juliet": ("Yes.", True), "sky": (whole, True)})
    assert [row.answer for row in make_rows(loaded, args, QUESTIONS, FORGOTTEN[:0]).rows] == ["Yes.", whole]


def test_the_answers_of_a_model_that_loops_are_no_rows_to_keep(tiny, tmp_path):
    args = UnlearnArgs(model=str(tiny), forget_file="forget.csv", output_dir=str(tmp_path))
    loaded = load_model(args, start_accelerator(args), "measure")
    assert make_rows(loaded, args, QUESTIONS, FORGOTTEN).rows == []


def test_what_was_made_is_read_by_the_next_run_from_the_same_weights_alone(asked, monkeypatch, tmp_path):
    loaded, args = asked
    answering(monkeypatch, {"tea": ("A drink.", True), "Juliet": ("A drink.", True), "sky": ("Rays that", False)})
    made = make_rows(loaded, args, QUESTIONS, FORGOTTEN)
    assert not list(tmp_path.iterdir()), "what may still be refused writes nothing"
    made.write()
    given = dataclasses.replace(args, forget_file=(str(made.path),), retain_file=(str(made.path),))
    assert open_source(given).rows("retain") == made.rows, "whoever gives the file keeps these rows"
    (line, _) = map(json.loads, made.path.read_text().splitlines())
    assert line == {"question": "How do I make tea?", "answer": "A drink.", "ends": True}
    answering(monkeypatch, dict.fromkeys(("tea", "Juliet", "sky"), ("Another.", False)))
    assert make_rows(loaded, args, QUESTIONS, FORGOTTEN).rows == made.rows
    silent = dataclasses.replace(args, texts=False)
    assert make_rows(loaded, silent, QUESTIONS, FORGOTTEN).rows[0].answer == "Another."
    for questions, forgotten in ((QUESTIONS[:2], FORGOTTEN), (QUESTIONS, [Row("Who?", "Somebody.")])):
        assert make_rows(loaded, args, questions, forgotten).path != made.path
    made.path.write_text('{"question": "How do I make tea?"}\n')
    assert make_rows(loaded, args, QUESTIONS, FORGOTTEN).rows[0].answer == "Another.", "what is no such file is made anew"
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1)
    assert make_rows(loaded, args, QUESTIONS, FORGOTTEN).path != made.path
