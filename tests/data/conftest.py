"""What the tests of data share: the folder of reference data, where it is there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("DUALOPTIM_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a file of the reference folder, or skip where the folder is missing."""

    def find(path: str) -> Path:
        if not (FOLDER / path).exists():
            pytest.skip(f"reference folder not present: {FOLDER / path} (set DUALOPTIM_SHARED)")
        return FOLDER / path

    return find
