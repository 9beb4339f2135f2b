"""The reference folder, as the tests of this room need it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("DUALOPTIM_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A file of the reference folder, or a skip where the folder is missing."""

    def find(path: str) -> Path:
        if not (SHARED / path).exists():
            pytest.skip(f"reference folder not present: {SHARED / path} (set DUALOPTIM_SHARED)")
        return SHARED / path

    return find


@pytest.fixture(scope="session")
def shared_json(shared: Callable[[str], Path]) -> Callable[[str], Any]:
    """A JSON file of the reference folder."""
    return lambda path: json.loads(shared(path).read_text())
