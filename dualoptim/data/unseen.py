"""Kept rows that no step sees: which there are, and how `--retain-held-out` makes some."""

from collections.abc import Sequence

from dualoptim.config.args import EvalArgs, MeasureArgs
from dualoptim.data.own import Source
from dualoptim.data.rows import Row
from dualoptim.data.stream import seeded
from dualoptim.errors import InputError

_SEED = 0  # of the rows that are held out: not the training's


def said(row: Row) -> str:
    """Give what tells a row from others, whatever it is answered: its question, or the whole text of a passage."""
    return " ".join((row.answer if row.question is None else row.question).split())


def held_out(args: MeasureArgs, source: Source, tasks: Sequence[int]) -> frozenset[str]:
    """Draw the rows of the retain sets of some tasks that `--retain-held-out` keeps from every step, as they are `said`.

    The draw depends on the rows' number alone, so that a larger one holds the rows of a smaller one.

    Raises:
        InputError: if so many cannot be held out.
    """
    found = set[str]()
    for task in tasks if args.retain_held_out else ():
        sets, skipped = source.evaluation_sets(args.split[0], task)
        if not (rows := sets.get("retain", [])):
            why = f"no set retain is measured ({skipped['retain']}); give one, or drop it"
            raise InputError(f"--retain-held-out {args.retain_held_out:g}: {why}")
        count = round(args.retain_held_out * (len(rows) if args.retain_held_out < 1 else 1))
        if not 0 < count < len(rows):
            raise InputError(
                f"--retain-held-out {args.retain_held_out:g}: {len(rows)} rows of the retain set are measured; "
                + ("hold out at least one of them, and fewer than all" if len(rows) > 1 else "give at least two, or drop it")
            )
        found |= {said(rows[number]) for number in seeded(_SEED, "held out").permutation(len(rows))[:count]}
    return frozenset(found)


def kept_rows(args: MeasureArgs, source: Source, tasks: Sequence[int], done: int) -> list[Row]:
    """Give the rows that retain steps train on while the last of the first `done` of some tasks is being forgotten.

    Raises:
        InputError: if `--retain-held-out` leaves none of them.
    """
    return _kept(args, source, tasks[:done], held_out(args, source, tasks))


def _kept(args: MeasureArgs, source: Source, done: Sequence[int], out: frozenset[str]) -> list[Row]:
    """Give the rows to keep without those that are held `out`, once the tasks before the last of `done` are forgotten."""
    rows = source.retain_rows(args.split[0], done)
    kept = [row for row in rows if said(row) not in out]
    if rows and not kept:
        raise InputError(f"--retain-held-out {args.retain_held_out:g} leaves no row for retain steps; hold out fewer")
    return kept


def trained_on(args: MeasureArgs, source: Source, tasks: Sequence[int], done: int) -> frozenset[str]:
    """Name the rows that any step of the first `done` of some tasks trains on, forget steps among them, as they are `said`.

    Those to keep are among them if steps read any, as the objectives of a run say.
    """
    found, out = {said(row) for task in tasks[:done] for row in source.task_rows(args.split[0], task)}, frozenset[str]()
    if args.reads_retain:
        out = held_out(args, source, tasks)
        found |= {said(row) for one in range(done) for row in _kept(args, source, tasks[: one + 1], out)}
    return frozenset(found)


def known_to_train(args: EvalArgs, source: Source) -> frozenset[str] | None:
    """Name the rows that unlearning a task alone trains on, as they are `said`; None where those to keep are not in the data.

    By which objectives it was unlearned is not known: retain steps are taken for granted, which a pair such as NPO+none lacks.

    Raises:
        InputError: if `--retain-held-out` asks for more rows than there are.
    """
    held_out(args, source, [args.task])
    try:
        return trained_on(args, source, [args.task], 1)
    except InputError:  # an evaluation needs no rows to keep
        return None
