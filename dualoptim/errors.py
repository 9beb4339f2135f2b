"""End a command early in one of two ways, each with one line for the user."""

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
