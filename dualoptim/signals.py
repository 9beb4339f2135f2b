"""Turn a signal that asks a command to end into `Stopped`: at once, or when what must not be cut in two is done."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from dualoptim.errors import Stopped

ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""What job managers, spot machines, terminals and users send."""

_ONE_REQUEST = 0.5  # seconds: a job manager signals workers and launcher, which passes it on to the workers at once


@dataclass
class _Asked:
    """Hold the first signal that came, how many blocks listen, and how many of them want it to wait."""

    signum: int = 0
    at: float = 0.0
    blocks: int = 0
    holds: int = 0


_asked = _Asked()


def asked() -> int:
    """Give the number of the signal that asked this process to end, 0 if none has."""
    return _asked.signum


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Raise `Stopped` where the first signal comes, unless a block inside holds it; a second one ends the process at once.

    In the main thread alone, where Python tells of signals. One that was ignored, as `nohup` has it, stays so.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        own = (_hear, signal.SIG_IGN, None)
        before = {signum: signal.getsignal(signum) for signum in ASKING if signal.getsignal(signum) not in own}
    _asked.blocks += 1
    try:
        for signum in before:
            signal.signal(signum, _hear)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _asked.blocks -= 1
        if not _asked.blocks:
            _asked.signum = 0


def _hear(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if not _asked.signum:
        _asked.signum, _asked.at = signum, now
        _stop_unless_held()
    elif now - _asked.at > _ONE_REQUEST:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


def _stop_unless_held() -> None:
    if _asked.signum and not _asked.holds:
        raise Stopped(_asked.signum)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until the end of the block, within which `asked` tells of it."""
    with heard():
        _asked.holds += 1
        try:
            yield
        finally:
            _asked.holds -= 1
        _stop_unless_held()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let no signal wait in this block of one that does."""
    holds, _asked.holds = _asked.holds, 0
    try:
        _stop_unless_held()
        yield
    finally:
        _asked.holds = holds
