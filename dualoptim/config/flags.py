"""Say of every flag, on its field, what it belongs to, what it changes, and which values it takes.

    num_epochs: Annotated[int, Flag("steps", at_least=1, shown=True)] = 5

Checks of values, `--help`, what a resumed run may change, what a model card leaves out and what a report shows first follow
from there.
"""

import ast
import inspect
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from dualoptim.errors import InputError, shown

GROUPS = ("model", "data", "objectives", "optimizer", "steps", "memory", "evaluation", "attacks", "output")
"""What flags are about, in the order in which help and reports list them."""


@dataclass(frozen=True)
class Flag:
    """What is to be known of a flag.

    `changes`: the weights, from a training step on; `speed` and memory alone; what is measured of the weights, or how far the
    same steps go; or nothing, but where and when results are written.
    """

    group: Literal["model", "data", "objectives", "optimizer", "steps", "memory", "evaluation", "attacks", "output"]
    changes: Literal["numbers", "speed", "measures", "nothing"] = "numbers"
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    among: Collection[str] = ()  # the names that it takes, if they stand in a table
    path: bool = False  # the value may name a place on this machine
    may_be_empty: bool = False  # an empty text says something
    shown: bool = False  # a reader of results asks for it first
    acts: bool = False  # it deletes, goes on, uploads or only tells, in the call that it is given to: no file hands it on
    aliases: tuple[str, ...] = ()  # other names: of the same thing in another command, or in the published scripts

    def holds(self, value: float) -> bool:
        """Tell whether a number is within the bounds, finite, and if it is whole of 32 bits."""
        usual = abs(value) < 2**32 if isinstance(value, int) else math.isfinite(value)
        return usual and self.above < value < self.below and self.at_least <= value <= self.at_most

    @property
    def has_bounds(self) -> bool:
        """Tell whether the flag takes a number, or several, within bounds."""
        return (self.above, self.at_least, self.at_most, self.below) != (-math.inf, -math.inf, math.inf, math.inf)

    def bounds(self, numbers: str) -> str:
        """Put the bounds into words; `numbers` is "a number" or "two numbers"."""
        above = self.above > -math.inf
        if self.below < math.inf and float(self.below).is_integer() and self.below > 1:
            return f"{self.at_least:g} or more, below 2**{int(math.log2(self.below))}"
        if self.below < math.inf:
            return f"{numbers} from {self.at_least:g} up to but not {self.below:g}"
        if self.at_most < math.inf:
            return f"{numbers} above {self.above:g}, up to {self.at_most:g}"
        return f"{numbers} above {self.above:g}" if above else f"{self.at_least:g} or more"


def flags(kind: Any) -> dict[str, Flag]:
    """List the flags of a command by their field names, group by group, within a group in the order of their fields."""
    return _flags(kind)


@cache
def _flags(kind: Any) -> dict[str, Flag]:
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {field.name: _flag_of(hints[field.name]) for field in fields(kind)}
    return dict(sorted(found.items(), key=lambda item: GROUPS.index(item[1].group)))


def _flag_of(hint: Any) -> Flag:
    return next(mark for mark in hint.__metadata__ if isinstance(mark, Flag))


@cache
def helps(kind: Any) -> dict[str, str]:
    """Read the text under each field, in one line: what `--help` and the table of flags say."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if "__dataclass_fields__" in vars(one):
            (body,) = ast.parse(inspect.cleandoc(inspect.getsource(one))).body
            for name, text in zip(body.body, body.body[1:], strict=False):  # type: ignore[attr-defined]
                if isinstance(name, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[name.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return found


def flag_name(field: str) -> str:
    """Name a field as it is typed on the command line."""
    return f"--{field.replace('_', '-')}"


def default_of(kind: Any, name: str) -> Any:
    """Give the default of a field."""
    return next(field.default for field in fields(kind) if field.name == name)


def check_bounds(args: Any) -> None:
    """Make sure that every number is within the bounds of its flag, and every name one that it takes.

    Raises:
        InputError: naming the first that is not.
    """
    for name, flag in flags(type(args)).items():
        value = getattr(args, name)
        for one in value if isinstance(value, tuple) else (value,):
            if flag.among and one not in flag.among:
                raise InputError(f"{flag_name(name)} {one!r} is unknown; choose from {', '.join(flag.among)}")
        if not flag.has_bounds or value is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not flag.holds(number):
                bounds = flag.bounds("two numbers" if name.endswith("betas") else "a number")
                typed = f"{number:g}" if isinstance(number, float) else shown(number)
                raise InputError(f"{flag_name(name)} {typed} is out of range; give {bounds}")
