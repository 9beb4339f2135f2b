"""Files that users name: what is no file, no text or no YAML is one line and never a wait."""

import os

import pytest

from dualoptim import EvalArgs, InputError, UnlearnArgs
from dualoptim.config.opening import decoded, read_bytes, read_text
from dualoptim.config.saved import load_yaml
from dualoptim.errors import shown


def test_marks_of_editors_are_no_text(tmp_path):
    for marks in ("", "\ufeff", "\ufeff\ufeff"):
        (tmp_path / "a").write_text(marks + "Täxt", encoding="utf-8")
        assert read_text("a", tmp_path / "a", "give one") == "Täxt"


def test_what_is_no_file_is_told_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nowhere")
    for name, why in (
        ("pipe", "it is a pipe or a device"),
        ("/dev/zero", "it is a pipe or a device"),
        (".", "it is a folder"),
        ("broken", "No such file"),
        ("loop", "Too many levels"),
        ("a\0b", ".*null byte"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(InputError, match=rf"^here: cannot be read \({why}.*\); give one$"):
            read_bytes("here", tmp_path / name, "give one")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("é".encode("latin-1"), 1),
        (b"a\nb\n\x93c", 3),
        ("a\n".encode("utf-16"), 1),
        ("a\nb".encode("utf-16-le"), 1),
        (b"a\nb\0", 2),
    ],
)
def test_what_is_not_utf_8_is_told_with_its_line(content, line):
    with pytest.raises(InputError, match=rf"^f:{line}: not UTF-8 text \(byte 0x..\); save the file as UTF-8$"):
        decoded("f", content)


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "an alias, which no run writes"),
        ("seed: 1\nseed: 2", "'seed' stands twice"),
        ("seed: " + "9" * 5000, "digits"),
        ("seed: " + "9" * 400, "--seed 9+ ?.*is out of range"),
        ("date_string: 2025-04-10", r"date_string: datetime.date\(2025, 4, 10\) has the wrong type; give str"),
        ("date_string: 2025-13-10", "month must be in 1..12"),
        ("split: " + "[" * 3000, "is not YAML"),
        ("model: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("learning_rates: .nan", "--learning-rates nan is out of range"),
        ("learning_rates: true", "learning_rates: True has the wrong type"),
        ("idk_file: [refusals.txt]", "has the wrong type; give str"),
        ('model: "a\\0b"', "model 'a\\\\x00b' holds a NUL character"),
        ('"a\\nb": 1', "unknown key 'a"),
        ("", "holds no `name: value` lines"),
        ("# nothing\n", "holds no `name: value` lines"),
    ],
)
def test_a_settings_file_of_another_kind_is_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_yaml(tmp_path / "c.yaml", UnlearnArgs)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_a_message_is_one_line_whatever_stood_in_a_file():
    assert str(InputError("a\nb\x1b[31m \ud83d é")) == "a\\nb\\x1b[31m \\ud83d é"
    long = str(InputError("begins" + "x" * 9999 + "; remedy"))
    assert long.startswith("begins")
    assert long.endswith("; remedy")
    assert len(long) < 1000
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, 10**5000, "x" * 10_000, {n: n for n in range(9999)}):
        assert len(shown(value)) < 500


@pytest.mark.parametrize("kind", [UnlearnArgs, EvalArgs])
def test_names_that_no_file_can_have_are_told_at_once(kind, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    for name in ("model", "retain_logs", "idk_file", "output_dir", "forget_file"):
        for value, why in (("x" * 300, "File name too long"), (str(tmp_path / "loop"), "Too many levels"), ("a\0b", "NUL")):
            with pytest.raises(InputError, match=rf"^--{name.replace('_', '-')} .*{why}.*; give "):
                kind(**{"model": "m", name: value})
    for value in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match=r"^--output-dir .*: Not a directory; give another path"):
            kind(model="m", output_dir=value)
