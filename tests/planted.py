"""Plant code in a file of a checkpoint, as someone might who can write to its folder."""

import json
import os
import pickle
import zlib
from pathlib import Path

import torch


class _Made:
    """Pickled, it makes a folder where it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def plant(file: Path, marker: Path) -> None:
    """Have a file of a checkpoint make the folder `marker` when it is loaded, and be as good as before otherwise."""
    if file.name == ".metadata":
        index = pickle.loads(file.read_bytes())
        index.planner_data = {"planted": _Made(marker)}
        file.write_bytes(pickle.dumps(index))
        return
    state = torch.load(file, weights_only=False)
    torch.save({**state, "planted": _Made(marker)}, file)


def plant_whole(checkpoint: Path, name: str, marker: Path) -> None:
    """Plant code in one file of a checkpoint, and have its state.json say that this is what was written."""
    plant(checkpoint / name, marker)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][name] = zlib.crc32((checkpoint / name).read_bytes())
    (checkpoint / "state.json").write_text(json.dumps(state))
