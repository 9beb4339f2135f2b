"""Show that a command goes on where nothing else would be printed for a while."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_SECONDS = 2.0


@contextlib.contextmanager
def pulsing(bar: Any) -> Iterator[Any]:
    """Draw a progress bar anew every other second, also while nothing moves it, and close it in the end."""
    ended = threading.Event()

    def draw() -> None:
        while not ended.wait(_SECONDS):
            bar.refresh()

    thread = threading.Thread(target=draw, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield bar
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
        bar.close()


@contextlib.contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    """Show what takes place, and for how long already, where it takes more than two seconds; a file gets one line of it."""
    ended = threading.Event()

    def draw() -> None:
        if ended.wait(_SECONDS):
            return
        if not sys.stderr.isatty():
            print(f"{what} ...", file=sys.stderr, flush=True)
        else:
            with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:
                bar.start_t -= _SECONDS
                while not ended.wait(_SECONDS):
                    bar.refresh()

    thread = threading.Thread(target=draw, daemon=True)
    if shown:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if shown:
            thread.join()
