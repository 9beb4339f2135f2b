"""End a command early, each way with one line for the user."""

import contextlib
import os
import re
import reprlib
import select
import signal
import sys
from collections.abc import Iterator
from typing import Any


class InputError(Exception):
    """A mistake in what the user gave: one line with the value, the place and the remedy. Commands exit with code 2.

    Not a ValueError, because tyro would draw a box around it instead of letting the one line through.
    """

    def __init__(self, line: str) -> None:
        """Say it in one line that a terminal shows as it is, whatever stood in a file; a very long one loses its middle."""
        line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
        super().__init__(line if len(line) <= 1000 else f"{line[:500]} ... {line[-400:]}")


class OutOfReachError(InputError):
    """What a user names is not here: on the hub, on another machine, or still to be fetched. A plan can do without it."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number; commands exit with code 1.

    The step was not taken: the weights are those that the step before left.
    """


class WriteError(Exception):
    """What a run has found cannot be written any more: the disk is full, or the folder is gone. Commands exit with code 1.

    `what` says where and why, and what is to be done about it, `how` how the run goes on then.
    """

    def __init__(self, what: str, how: str) -> None:
        """Say both."""
        super().__init__(what)
        self.what, self.how = what, how

    def __str__(self) -> str:
        """Give the one line for the user."""
        return f"{self.what}; {self.how}"


class PeerError(RuntimeError):
    """Another process of the launch has ended, or is silent for too long; commands exit with code 1."""


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end; commands exit with 128 + `signum`.

    A KeyboardInterrupt, so that a notebook shows an interrupt and no `except Exception` takes it for a failure.
    """

    def __init__(self, signum: int, where: str = "", agreed: bool = False) -> None:
        """Say `where` the command was; `agreed`: all processes of the launch end here."""
        super().__init__(signum)
        self.signum, self.where, self.agreed = signum, where, agreed
        self.how = "give the same command again"

    def __str__(self) -> str:
        """Give the one line for the user."""
        return " ".join(filter(None, [f"stopped by {signal.Signals(self.signum).name}", self.where])) + f"; {self.how}"


def reason(error: BaseException) -> str:
    """Say what a library's error says, in one line of at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


_CODE = {
    "trust_remote_code": (
        "brings code of its own, which is never run here",
        "give one whose kind the installed libraries know",
    ),
    "weights_only": ("asks in a pickle for code to be run, which is never done", None),
}
"""What we say, and instead of which remedy, where a library names a switch that is none of ours: it found code in a file."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def shown(value: Any) -> str:
    """Write a value as Python does, but no more of it than a line takes, however long, deep or large it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of thousands of digits
        return "a number of thousands of digits"


def counted(count: int, what: str) -> str:
    """Write how many there are of something: `1 step`, `1,200 steps`."""
    return f"{count:,} {what}" + "s" * (count != 1)


@contextlib.contextmanager
def blamed(flag: str, value: object, remedy: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Turn whatever a library raises inside into the one line that a user reads, for kinds that differ by its version.

    Raises:
        InputError: naming the flag, its value, the library's reason and the remedy.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        for switch, (said, instead) in _CODE.items():
            if switch in str(error):
                raise InputError(f"{flag} {value} {said}; {instead or remedy}") from None
        raise InputError(f"{flag} {value}: {what} ({reason(error)}); {remedy}") from None


@contextlib.contextmanager
def read_to_the_end() -> Iterator[None]:
    """End quietly, as other command line tools do, where what reads the output has closed it: `dualoptim --help | head -3`.

    With 128 + SIGPIPE, as a shell counts an end by that signal, which would itself come of sockets to other processes too.
    """
    try:
        try:
            yield
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except BrokenPipeError:
        if not (closed := unread()):
            raise
        for stream in closed:  # what is left of it goes nowhere, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + 13)


def unread() -> list[Any]:
    """List the outputs of this process that nobody reads any more."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # it is no file, as in a notebook, or this system cannot tell
            asked = select.poll()
            asked.register(stream.fileno(), 0)  # for nothing: errors alone are told
            found += [stream] if asked.poll(0) else []
    return found


_GONE = re.compile("closed by peer|reset by peer|was likely closed|Broken pipe|remote process exited")
_SILENT = re.compile("Timed out waiting|timed out after|Watchdog caught collective operation timeout")


@contextlib.contextmanager
def with_peers() -> Iterator[None]:
    """Turn what torch raises when another process of a launch is gone, or does not answer, into one line.

    Raises:
        PeerError: saying which of both.
    """
    try:
        yield
    except (RuntimeError, Stopped) as error:
        # a launcher sends SIGTERM to those that are left, which comes while they are on their way out
        text = " ".join(map(str, _chain(error)))
        if not (_GONE.search(text) or _SILENT.search(text)):
            raise
        what = "has ended" if _GONE.search(text) else "has not answered for too long"
        raise PeerError(
            f"another process of this launch {what}; what it says itself tells why. Go on as after any interruption: training "
            "with --resume, an evaluation or a sweep with the same command"
        ) from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and those during whose handling it came."""
    while error:
        yield error
        error = error.__context__
