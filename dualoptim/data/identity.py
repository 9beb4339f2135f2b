"""Hash rows and prompts, so that a run that goes on, or a sweep that skips what is finished, sees that they have changed."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dualoptim.data.prompts import Formatter
from dualoptim.data.rows import Row


def rows_hash(rows: Iterable[Row], *others: Any) -> str:
    """Compute the SHA-256 of rows to learn, in their order, and of JSON values beside them; what only measures is left out."""
    return _hash([replace(row, asking=row.asking.taught) if row.asking else row for row in rows], others)


def _hash(rows: Iterable[Row], others: Sequence[Any]) -> str:
    """The SHA-256 of rows in their order, and of JSON values beside them. What a row does not have is left out."""
    digest = hashlib.sha256(json.dumps(others).encode())
    for row in rows:
        said = {name: value for name, value in row.content().items() if value not in (None, ())}
        digest.update(json.dumps(said).encode())
    return digest.hexdigest()


def prompts_hash(rows: Iterable[Row], formatter: Formatter) -> str:
    """Compute the SHA-256 of the token ids of all texts of rows, and of where each answer begins."""
    digest = hashlib.sha256()
    for row in rows:
        for text in row.texts():
            example = formatter.of_row(row, text)
            digest.update(json.dumps([example.start, *example.ids]).encode())
    return digest.hexdigest()


def sets_hash(sets: Mapping[str, Sequence[Row]], formatter: Formatter, *others: Any) -> str:
    """Compute the SHA-256 of evaluation sets, their names, rows and prompts, and of JSON values beside them."""
    rows = [row for own in sets.values() for row in own]
    return _hash(rows, ({name: len(own) for name, own in sets.items()}, prompts_hash(rows, formatter), *others))
