"""Ask a model questions, and beside it the model that it was before.

    dualoptim ask runs/mine "In which city was Emeka Vasarely born?"
    dualoptim ask runs/mine --questions-file forget.csv
    dualoptim ask runs/mine/NPO+none_lr1e-05/task1/model --before my-model

The last one asks for questions.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["ask"])

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualoptim.config.args import AskArgs, EvalArgs
from dualoptim.config.values import expect
from dualoptim.data.files import kind_of, records
from dualoptim.data.rows import Row, checked_text
from dualoptim.errors import InputError
from dualoptim.evaluation.generation import continuation, generate
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.models.launch import start_accelerator
from dualoptim.models.loaded import LoadedModel
from dualoptim.reporting.console import shown
from dualoptim.reporting.left import left_by, load_left, named
from dualoptim.reporting.tables import Table

_ANSWER = "The"
"""Stands for the answer that is not known yet: where a prompt ends depends on how the answer begins, most often with a word."""


def ask(args: AskArgs) -> None:
    """Answer questions, by the model before and by the one after, and print the answers side by side.

    Raises:
        InputError: if a model, the questions or the launch is not as it should be.
    """
    expect(args, AskArgs)
    questions = _given(args)
    models = _models(args)
    accelerator = start_accelerator(models["after"])
    if accelerator.num_processes > 1:
        raise InputError(f"ask is for one process, and this launch has {accelerator.num_processes}; give --num_processes 1")

    def loaded(when: str) -> LoadedModel:
        own = when == "before" and not args.before
        with named("it began with" if own else "--before" if when == "before" else "RUN"):
            try:
                return load_left(models[when], accelerator)
            except InputError as error:
                remedy = f"give --before MODEL, or {models['after'].model} as RUN to ask that alone"
                raise InputError(f"RUN {args.run}: {error}; or {remedy}") if own else error from None

    if questions is not None:  # one model after another, each of which has the memory for itself
        answers = [_answers(loaded(when), one, questions) for when, one in models.items()]
        for question, *texts in zip(questions, *answers, strict=True):
            print(f"\n{question}\n{_side_by_side(dict(zip(models, texts, strict=True)))}", flush=True)
        return
    voices = {when: loaded(when) for when in models}
    for question in _typed():
        try:
            answered = {when: _answers(voices[when], one, [question])[0] for when, one in models.items()}
            print(f"{_side_by_side(answered)}\n", flush=True)
        except InputError as error:  # of this question alone
            print(f"error: {error}", file=sys.stderr)


def _models(args: AskArgs) -> dict[str, EvalArgs]:
    """Say which models are asked: the one before, if there is one, and the one after.

    Raises:
        InputError: if there is no model.
    """
    left = left_by(args.run)
    before = replace(left.after, model=args.before) if args.before else left.before
    models = {"before": before, "after": left.after}
    lengths = {"max_new_tokens": args.max_new_tokens, "max_length": args.max_length}
    given: dict[str, Any] = {name: length for name, length in lengths.items() if length is not None}
    return {when: replace(one, **given) for when, one in models.items() if one}


def _given(args: AskArgs) -> list[str] | None:
    """Read all questions; None if they are to be typed on a terminal.

    Raises:
        InputError: if there is none, or one is empty or in no column.
    """
    if args.questions_file is not None:
        return [text for place, record in records(Path(args.questions_file)) for text in _in_record(place, record)]
    if args.questions:
        return list(args.questions)
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    if found := [line.strip() for line in sys.stdin or () if line.strip()]:
        return found
    raise InputError("no question is given; write it behind RUN, in quotes, or give --questions-file")


def _in_record(place: str, record: Mapping[str, str]) -> list[str]:
    """Give the question of a record, or those of all lines of a text."""
    if kind_of(Path(place.rpartition(":")[0])) == ".txt":
        return [line.strip() for line in record["text"].splitlines() if line.strip()]
    if not isinstance(record, dict) or "question" not in record:
        raise InputError(f"{place}: no column 'question'; name it so, or write one question a line into a .txt file")
    return [checked_text(record, "question", place)]


def _typed() -> Iterator[str]:
    """Give questions as they are typed, up to an empty line."""
    while True:
        try:
            question = input("question (an empty line ends): ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        yield question


def _answers(loaded: LoadedModel, args: EvalArgs, questions: Sequence[str]) -> list[str]:
    """Have a model answer questions as an evaluation does: greedily, up to its end token."""
    asked = [continuation(loaded, Row(question, _ANSWER)) for question in questions]
    loaded.model.eval()
    with loaded.autocast():
        return generate(ScoringPass(loaded, args), "answer", asked)


def _side_by_side(answers: Mapping[str, str]) -> str:
    """Lay answers out: as a table on a terminal, else a line each."""
    answers = {when: _without_repeats(text) for when, text in answers.items()}
    if sys.stdout.isatty() and len(answers) > 1:
        return shown(Table(tuple(answers), [tuple(answers.values())], left=len(answers)))
    if len(answers) == 1:
        answers = {"answer": answers["after"]}
    width = max(map(len, answers)) + 1
    return "\n".join(f"  {when + ':':<{width}} {text or '(nothing)'}" for when, text in answers.items())


def _without_repeats(text: str) -> str:
    """Write an answer on one line, and cut it where up to four words have been said five times in a row."""
    text = " ".join(text.split())
    found = re.search(r"(?<!\S)((?:\S+ ){1,4}?)\1{4}", text)
    return f"{text[: found.end()]}..." if found else text
