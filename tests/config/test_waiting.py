"""What shows that a command goes on."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from dualoptim.config import waiting
from dualoptim.config.waiting import pulsing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(waiting, "_SECONDS", 0.02)


def test_a_bar_that_nothing_moves_is_drawn_again_and_closed():
    text = io.StringIO()
    with pulsing(tqdm(total=2, desc="steps", file=text)) as bar:
        time.sleep(0.2)
        bar.update()
    assert text.getvalue().count("steps:   0%") > 3
    assert "1/2" in text.getvalue()
    assert bar.disable


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_long_is_shown_and_what_does_not_is_not(terminal, capsys, monkeypatch):
    """A pipe gets a line of its own, to which nothing is glued."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with waiting.waiting("hashing"):
        time.sleep(0.2)
    if not terminal:
        assert capsys.readouterr().err == "hashing ...\n"
        return
    assert capsys.readouterr().err.count("hashing: 00:0") > 2
    with waiting.waiting("hashing", shown=False):
        time.sleep(0.1)
    with waiting.waiting("hashing"):
        pass
    assert capsys.readouterr().err == ""


def test_an_error_inside_ends_the_waiting():
    with pytest.raises(ValueError, match="x"), waiting.waiting("hashing"):
        raise ValueError("x")
