"""The two ways a command ends early, each with one line for the user."""


class InputError(Exception):
    """A mistake in what the user gave: one line with the value, the place and the remedy. Commands exit with code 2.

    Not a ValueError, because tyro would draw a box around it instead of letting the one line through.
    """


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or not a number; commands exit with code 1.

    The step was not taken: the weights are those that the step before left.
    """


def reason(error: BaseException) -> str:
    """What a library's error says, in one line of at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
