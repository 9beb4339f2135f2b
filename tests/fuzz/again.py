"""Play an input of the fuzzer again, as a failed test has printed it: `python tests/fuzz/again.py < case`."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from fuzz.home import make_home
from fuzz.judge import from_text, play

if __name__ == "__main__":
    case = from_text(sys.stdin.read())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "home").mkdir()
        print(play(case, make_home(Path(folder) / "home"), Path(folder) / "place"))
