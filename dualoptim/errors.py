"""End a command early in one of two ways, each with one line for the user."""

import contextlib
import reprlib
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


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number; commands exit with code 1.

    The step was not taken: the weights are those that the step before left.
    """


def reason(error: BaseException) -> str:
    """Say what a library's error says, in one line of at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def shown(value: Any) -> str:
    """Write a value as Python does, but no more of it than a line takes, however long, deep or large it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of thousands of digits
        return "a number of thousands of digits"


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
