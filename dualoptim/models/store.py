"""Keep values of texts on disk, in files that several launches may add to, and read them back text by text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualoptim.atomic import beside
from dualoptim.data.prompts import Example


def text_key(example: Example) -> bytes:
    """Identify a text by: its tokens and where scoring starts."""
    return hashlib.sha256(np.asarray([example.start, *example.ids], dtype=np.int64).tobytes()).digest()[:16]


class Store:
    """Values [n, ...] of texts with n scored tokens, in the files of one folder; values are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read which texts the folder holds; it need not exist. A file that is none of a store's is `broken`, as if absent."""
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors"))
        self.broken: list[Path] = []
        self._places: dict[bytes, tuple[Any, int, int]] = {}
        for path in self.files:
            try:
                part = safe_open(path, framework="pt")
                keys, ends = part.get_tensor("keys"), [0, *part.get_tensor("ends").tolist()]
                if ends != sorted(ends) or ends[-1:] != part.get_slice("values").get_shape()[:1]:
                    raise ValueError
                places = zip(keys.numpy(), ends, ends[1:], strict=False)
                self._places |= {key.tobytes(): (part, start, end) for key, start, end in places}
            except Exception:  # of the library, by its version
                self.broken.append(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __getitem__(self, key: bytes) -> Tensor:
        part, start, end = self._places[key]
        return part.get_slice("values")[start:end]

    def write(self, name: str, texts: Sequence[bytes], values: Sequence[Tensor]) -> None:
        """Add a file, whole or not at all; a store that is opened afterwards has it."""
        keys = torch.from_numpy(np.stack([np.frombuffer(key, dtype=np.uint8) for key in texts]))
        ends = torch.tensor([len(value) for value in values]).cumsum(0)
        with beside(self.folder / f"{name}.safetensors") as place:
            save_file({"keys": keys, "ends": ends, "values": torch.cat(list(values))}, place)
