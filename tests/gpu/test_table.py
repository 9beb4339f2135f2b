"""The table of tests/speed/gpu.py: each line ends in a row of its own, and those that need no GPU run on a CPU."""

import subprocess
import sys

import pytest
from speed import gpu
from support import ROOT


def test_every_line_of_the_list_is_there_in_order():
    assert list(gpu.LINES) == list(range(1, 18))
    assert all(line.title and line.expected and callable(line.measure) for line in gpu.LINES.values())
    assert gpu.header("cpu").startswith("CPU only; Python 3.")


def test_whatever_happens_a_line_is_a_row(tmp_path):
    def fails(_):
        raise RuntimeError("first\nlast | line")

    bench = gpu.Bench(tmp_path, "cpu", "demo")
    rows = [
        gpu.row(7, line, bench)
        for line in (
            gpu.Line(lambda _: ("0.5", True), "what", "1", on_cpu=True),
            gpu.Line(lambda _: ("2", False), "what", "1", on_cpu=True),
            gpu.Line(fails, "what", "1", on_cpu=True),
            gpu.Line(fails, "what", "1"),
        )
    ]
    assert [row.split(" | ")[3:5] for row in rows] == [
        ["0.5", "yes"],
        ["2", "**no**"],
        ["RuntimeError: last / line", "**no**"],
        ["not run: needs 1 GPU", ""],
    ]


@pytest.mark.launch
def test_a_line_runs_on_a_cpu():
    line = [sys.executable, str(ROOT / "tests" / "speed" / "gpu.py"), "--device", "cpu", "--only", "10", "12"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    header, *rows = done.stdout.strip().splitlines()
    assert header.startswith("CPU only; "), done.stderr
    assert rows[-1].startswith("| 12 |")
    assert " | not run: needs 1 GPU | " in rows[-1]
    assert " | yes | " in rows[-2], done.stdout + done.stderr
