"""Cut the texts of a benchmark to the tokens that count, as its own code does."""

from collections.abc import Sequence
from dataclasses import replace

from dualoptim.data.declaration import RowsOf
from dualoptim.data.prompts import Formatter
from dualoptim.data.rows import Row
from dualoptim.errors import InputError


def cut_rows(rows: list[Row], entry: RowsOf, formatter: Formatter) -> list[Row]:
    """Cut passages that are joined into pieces, others to their beginning, and true answers; what has been cut stays.

    Raises:
        InputError: naming a passage of which nothing could be predicted.
    """
    if entry.join is not None and rows and not rows[0].ids:
        return _pieces(entry.join.join(row.answer for row in rows), rows[0], formatter)
    if entry.cut:
        return [row if row.ids else _beginning(row, entry.cut, formatter) for row in rows]
    if entry.answer_tokens:
        return [replace(row, answer=_answer(row.answer, entry, formatter)) for row in rows]
    return rows


def _answer(answer: str, entry: RowsOf, formatter: Formatter) -> str:
    """Cut a true answer to the tokens that count, with the one that the tokenizer puts first among them."""
    ids = formatter.tokenizer(answer)["input_ids"][: entry.answer_tokens]
    cut: str = formatter.tokenizer.decode(ids, skip_special_tokens=True)
    return cut


def _beginning(row: Row, size: int, formatter: Formatter) -> Row:
    """Cut a passage to its first tokens, those that the tokenizer adds by itself among them; the rest of it is left out."""
    tokenizer, size = formatter.tokenizer, min(size, formatter.max_length)
    ids = tokenizer(row.answer, truncation=True, max_length=size, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise InputError(f"{row.place}: the model's tokenizer makes {len(ids)} token of {row.answer[:60]!r}; raise longer_than")
    return replace(row, answer=tokenizer.decode(ids, skip_special_tokens=True), ids=tuple(ids))


def _pieces(text: str, like: Row, formatter: Formatter) -> list[Row]:
    """Make rows of the pieces of a long text."""
    tokenizer = formatter.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    pieces = pieces_of(ids, begin, formatter.max_length)
    return [replace(like, answer=tokenizer.decode(piece, skip_special_tokens=True), ids=tuple(piece)) for piece in pieces]


def pieces_of(ids: Sequence[int], begin: Sequence[int], size: int) -> list[list[int]]:
    """Cut tokens into pieces of `size`, each with `begin` before it; the last is filled up from the first (MUSE's rule)."""
    room = size - len(begin)
    pieces = [[*begin, *ids[start : start + room]] for start in range(0, len(ids), room)]
    pieces[-1] = (pieces[-1] + pieces[0])[:size]
    return pieces
