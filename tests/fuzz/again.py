"""Play an input of the fuzzer again, as a failed test has printed it: `python tests/fuzz/again.py < case`."""

import os
import sys
import tempfile
from pathlib import Path


def again(text: str) -> str:
    from fuzz.home import make_home
    from fuzz.judge import from_text, play

    with tempfile.TemporaryDirectory() as name:
        home, place = Path(name) / "home", Path(name) / "place"
        home.mkdir()
        return play(from_text(text), make_home(home), place)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
    case = sys.stdin.read()
    print(again(case))
