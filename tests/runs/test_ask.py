"""`dualoptim ask`: which models it finds, what it asks them, and what it prints."""

import builtins
import io
import os
import shutil
import sys

import pytest

from dualoptim import InputError, __main__
from dualoptim.ask import _side_by_side, ask
from dualoptim.config.args import AskArgs
from dualoptim.evaluation.records import read_records
from dualoptim.reporting.left import left_by

QUESTION = "In which city was Emeka Vasarely born?"


def asked(capsys, *given, **options):
    """What is printed of questions and answers, line by line."""
    ask(AskArgs(*given, **options))
    return [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("loading ")]


def test_a_run_answers_before_and_after_as_its_evaluations_do(demo_run, capsys):
    folder = demo_run.tasks[0].folder
    before, after = (read_records(folder / part / "forget.jsonl")[:3] for part in ("eval_before", "eval"))
    lines = asked(capsys, str(demo_run.folder), tuple(row.question for row in before))
    for n, (old, new) in enumerate(zip(before, after, strict=True)):
        assert lines[3 * n] == old.question
        assert lines[3 * n + 1] == f"  before: {' '.join(old.generated.split())}"
        assert f"  after:  {' '.join(new.generated.split())}".startswith(lines[3 * n + 2].removesuffix("..."))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("Lisbon " + "Tbilisi " * 100, "Lisbon " + "Tbilisi " * 5 + "..."),
        ("a b " * 9 + "a", "a b " * 5 + "..."),
        ("no no no no", "no no no no"),
        ("word " * 3 + "end " + "long " * 3, "word word word end long long long"),
        (" \n", "(nothing)"),
    ],
)
def test_an_answer_that_repeats_itself_is_cut(answer, shown):
    assert _side_by_side({"after": answer}) == f"  answer: {shown}"


def test_a_model_is_asked_alone_or_beside_another(taught, tiny, capsys):
    assert asked(capsys, str(taught), (QUESTION,)) == [QUESTION, "  answer: Emeka Vasarely was born in Tbilisi."]
    alone = asked(capsys, str(tiny), (QUESTION,), max_new_tokens=3)
    beside = asked(capsys, str(taught), (QUESTION,), before=str(tiny), max_new_tokens=3)
    assert beside[1].split() == ["before:", *alone[1].split()[1:]]
    assert beside[2].startswith("  after:  Emeka")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.txt", f"{QUESTION}\r\n\r\nWho wrote Ünï?\r\n"),
        ("q.csv", f"question,answer\n{QUESTION},x\nWho wrote Ünï?,\n"),
        ("q.jsonl", f'{{"question": "{QUESTION}"}}\n{{"question": "Who wrote Ünï?"}}\n'),
    ],
)
def test_questions_come_from_a_file(name, text, taught, tmp_path, capsys):
    (tmp_path / name).write_bytes(text.encode())
    lines = asked(capsys, str(taught), questions_file=str(tmp_path / name), max_new_tokens=2)
    assert lines[::2] == [QUESTION, "Who wrote Ünï?"]


def test_questions_are_read_line_by_line_or_typed(taught, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n"))
    assert asked(capsys, str(taught))[0] == QUESTION
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    words = iter([QUESTION, "too long " * 600, "Who?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(words))
    ask(AskArgs(str(taught)))
    out, err = capsys.readouterr()
    assert out.count("  answer: ") == 2
    assert "error: --max-length 500 leaves no room for an answer" in err  # and the next one is asked


def test_on_a_terminal_answers_stand_side_by_side(demo_run, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = asked(capsys, str(demo_run.folder), (QUESTION,))
    assert lines[1].split() == ["before", "after"]
    assert lines[3].startswith("Emeka Vasarely was born in Tbilisi.")


def test_the_newest_model_is_taken_and_the_one_that_it_began_with(demo_run, taught, tmp_path):
    shutil.copytree(demo_run.folder, tmp_path / "run")
    again = tmp_path / "run" / "again" / "NPO+GD_lr0.1" / "task2"
    shutil.copytree(demo_run.tasks[0].folder, again)
    os.utime(again / "model", (2e9, 2e9))
    left = left_by(str(tmp_path / "run"))
    assert (left.after.model, left.before.model, left.before.template) == (str(again / "model"), str(taught), "qa")
    assert left_by(str(again)).after == left.after
    assert left_by(str(again / "model")).before is None


def test_what_is_wrong_is_one_line(demo_run, taught, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "q.csv").write_text("frage\nWer?\n")
    shutil.copytree(demo_run.tasks[0].folder, tmp_path / "task1")
    config = tmp_path / "task1" / "config.yaml"
    config.write_text(config.read_text().replace(str(taught), "/gone/model"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    for given, message in (
        ({"run": str(tmp_path / "empty"), "questions": "x"}, r"RUN .*empty: no model in it; give the output folder of a run"),
        ({"run": "./gone", "questions": "x"}, r"RUN \./gone: no such folder; give a folder, a \.gguf file or a hub id"),
        ({"run": "demo", "questions": "x"}, "RUN demo has no weights on disk; give a folder"),
        ({"run": str(taught), "before": "./gone", "questions": "x"}, r"--before \./gone: no such folder"),
        (
            {"run": str(tmp_path / "task1"), "questions": "x"},
            "it began with /gone/model: no such folder; .*; or give --before",
        ),
        ({"run": str(taught)}, "no question is given; write it behind RUN"),
        ({"run": str(taught), "questions_file": str(tmp_path / "q.csv")}, r"q\.csv:2: no column 'question'"),
        ({"run": str(taught), "questions_file": str(tmp_path / "no.txt")}, r"no\.txt: cannot be read \(No such file"),
    ):
        with pytest.raises(InputError, match=message):
            ask(AskArgs(**given))


def test_it_is_a_command(taught, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dualoptim", "ask", str(taught), QUESTION, "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 0
    assert QUESTION in capsys.readouterr().out
