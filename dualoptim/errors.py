"""End a command early in one of three ways, each with one line for the user."""

import contextlib
from collections.abc import Iterator


class InputError(Exception):
    """A mistake in what the user gave: one line with the value, the place and the remedy. Commands exit with code 2.

    Not a ValueError, because tyro would draw a box around it instead of letting the one line through.
    """


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number; commands exit with code 1.

    The step was not taken: the weights are those that the step before left.
    """


class WriteError(Exception):
    """What a run has found cannot be written any more: the disk is full, or the folder is gone. Commands exit with code 1.

    `what` says where and why, and what is to be done about it, `go_on` how the run goes on then.
    """

    def __init__(self, what: str, go_on: str) -> None:
        super().__init__(what, go_on)
        self.what = what

    def __str__(self) -> str:
        return ", and ".join(self.args)


def reason(error: BaseException) -> str:
    """Say what a library's error says, in one line of at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


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
        raise InputError(f"{flag} {value}: {what} ({reason(error)}); {remedy}") from None
