"""Plant code in a file of a model, as someone might who can write to its folder."""

import os
from pathlib import Path

import torch


class _Made:
    """Pickled, it makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def plant(file: Path, marker: Path) -> None:
    """Have a file make the folder `marker` when it is loaded as a pickle, and be as good as before otherwise."""
    torch.save({**torch.load(file, weights_only=False), "planted": _Made(marker)}, file)
