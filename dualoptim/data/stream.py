"""The order in which a run meets its rows, the same for any number of processes and after any interruption."""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dualoptim.config.args import TrainArgs
from dualoptim.data.prompts import Example, Formatter
from dualoptim.data.rows import Row


@dataclass(frozen=True)
class ExampleBuilder:
    """Builds the examples of a row when it is called: one for each text that the objective `reads`.

    `answer` is the row's own; `refusal` is that of the row, or where it has none one of `refusals`, `alternative` one of the
    row's, and `mismatch` the answer of one of `others`, all drawn anew at each visit.
    """

    rows: Sequence[Row]
    formatter: Formatter
    reads: Sequence[str]
    seed: int
    refusals: Sequence[str] = ()
    others: Sequence[Row] = ()
    score_question: bool = False
    first_token: bool = False  # is scored as well
    instead: str | None = None  # the kind of text whose tokens are the labels, again and again

    def __call__(self, index: int, epoch: int) -> list[Example]:
        """Build the examples of row `index` for its visit in epoch `epoch`."""
        row = self.rows[index]
        texts = [self._text(kind, index, epoch) for kind in self.reads]
        examples = [self.formatter.of_row(row, text, self.score_question) for text in texts]
        if self.instead:
            said = self.formatter.of_row(row, self._text(self.instead, index, epoch))
            repeated = itertools.cycle(said.ids[said.start :])
            examples = [replace(one, labels=[*itertools.islice(repeated, len(one.ids) - one.start)]) for one in examples]
        return [replace(example, start=0) for example in examples] if self.first_token else examples

    def _text(self, kind: str, index: int, epoch: int) -> str:
        if kind == "answer":
            return self.rows[index].answer
        if kind == "refusal" and (own := self.rows[index].refusal) is not None:
            return own
        texts = {"refusal": self.refusals, "alternative": self.rows[index].alternatives}.get(kind, self.others)
        drawn = texts[int(seeded(self.seed, kind, epoch, index).integers(len(texts)))]
        return drawn.answer if isinstance(drawn, Row) else drawn


@dataclass
class Stream:
    """Visits the rows of one phase in an endless, seeded order.

    Epoch e visits the rows in a permutation of its own, epochs follow each other without a gap, and step k of the phase takes
    the k-th block of `global_batch` rows. So what a step sees follows from the seed, the global batch and k alone: not from
    the number of processes, and not from where a run was interrupted.

    `build(index, epoch)` gives the examples of one row: one, or several that belong together.
    """

    name: str
    rows: int  # how many there are
    build: Callable[[int, int], list[Example]]
    seed: int
    batch_size: int
    accumulation: int
    process: int = 0
    processes: int = 1
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def of(args: TrainArgs, name: str, build: ExampleBuilder, share: tuple[int, int]) -> "Stream":
        """Make the stream of a run with `args`. `share` is the number of this process and how many there are."""
        return Stream(name, len(build.rows), build, args.seed, args.batch_size, args.gradient_accumulation_steps, *share)

    @property
    def global_batch(self) -> int:
        """Count the rows of an optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.processes

    def window(self, step: int) -> Iterator[list[Example]]:
        """Give this process's micro-batches of the phase's step `step`."""
        first = step * self.global_batch + self.process * self.batch_size * self.accumulation
        for start in range(first, first + self.batch_size * self.accumulation, self.batch_size):
            yield list(self._examples(range(start, start + self.batch_size)))

    def visited(self, steps: int) -> Iterator[Example]:
        """Give all examples that all processes meet in the phase's first `steps` steps."""
        return self._examples(range(steps * self.global_batch))

    def _examples(self, positions: range) -> Iterator[Example]:
        for position in positions:
            epoch, visit = divmod(position, self.rows)
            yield from self.build(self._order(epoch)[visit], epoch)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = seeded(self.seed, self.name, epoch).permutation(self.rows)
        return self._orders[epoch]


def seeded(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """Make a random generator that depends on nothing but its arguments."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *numbers])
