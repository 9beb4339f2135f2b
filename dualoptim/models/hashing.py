"""Hash the weights of a model, by which stores, resumes and evaluations know it: once for each weights, on all cores.

A hash of a new kind gets a new `KIND`: what was stored under another one is of other weights, as far as anyone can tell.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dualoptim.models.sharding import is_divided, own_share, whole_tensors

KIND = "v2"  # the first was one hash over all bytes, which no second core can share
_THREADS = min(8, os.cpu_count() or 1)  # as many tensors lie on the host at once

_Places = list[tuple[str, int, int]]
_Files = tuple[tuple[str, int, int, int], ...]
_HASHES: WeakKeyDictionary[torch.nn.Module, tuple[_Places, torch.dtype | None, str]] = WeakKeyDictionary()
_LOADED: WeakKeyDictionary[torch.nn.Module, tuple[_Places, _Files]] = WeakKeyDictionary()
_OF_FILES: dict[tuple[_Files, frozenset[torch.dtype]], str] = {}


def weights_hash(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hash with SHA-256 name, type, shape and bytes of every tensor of a model, or of its weights rounded to `dtype`.

    Of one that is divided all processes ask for it.

    It is computed once for a model, until its tensors are others or PyTorch has counted a change of one, and once for models
    that are loaded from the same files (`loaded_from`). What changes them behind that count calls `weights_changed`.
    """
    places = _places(model)
    if model in _HASHES and _HASHES[model][:2] == (places, dtype):
        return _HASHES[model][2]
    types = _types(model)
    then, files = _LOADED.get(model, ([], ()))
    key = (files, frozenset({dtype} if dtype else types)) if then == places else None
    found = (key and _OF_FILES.get(key)) or _computed(model, None if types == {dtype} else dtype)
    if key:
        _OF_FILES[key] = found
    _HASHES[model] = places, dtype, found
    return found


def _computed(model: torch.nn.Module, dtype: torch.dtype | None) -> str:
    def line(name: str, tensor: Tensor) -> str:
        digest = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}\n"

    # what lies on the host already is no copy, and of a divided model gone when the next tensor comes
    ahead = 1 if is_divided(model) else _THREADS
    lines, waiting = list[str](), deque[Future[str]]()
    with ThreadPoolExecutor(_THREADS) as threads:
        for name, tensor in whole_tensors(model):
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            waiting.append(threads.submit(line, name, tensor.cpu()))
            if len(waiting) == ahead:
                lines.append(waiting.popleft().result())
    lines += [one.result() for one in waiting]
    return f"{KIND}-{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def weights_changed(model: torch.nn.Module) -> None:
    """Forget the hash of a model, before and after training, which changes weights where PyTorch does not count it."""
    _HASHES.pop(model, None)
    _LOADED.pop(model, None)


def loaded_from(model: torch.nn.Module, folder: str) -> None:
    """Take note that a model, whole as it stands, is what the files of a folder say, if `folder` is one."""
    paths = sorted(path for path in Path(folder).glob("*") if path.is_file() and path.suffix != ".md")  # cards say nothing
    if paths and not is_divided(model):  # where processes hold shares, all of them have to compute a hash, or none
        found = [(str(path), path.stat()) for path in paths]
        files, places = tuple((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in found), _places(model)
        _LOADED[model] = places, files
        if model in _HASHES and _HASHES[model][0] == places:
            _, dtype, known = _HASHES[model]
            _OF_FILES[files, frozenset({dtype} if dtype else _types(model))] = known


@contextmanager
def hashed_meanwhile(model: torch.nn.Module, dtype: torch.dtype, folder: str) -> Iterator[None]:
    """Hash a model in a thread while it is saved to a folder: nothing waits for its hash later, or for that of its files."""
    thread = Thread(target=weights_hash, args=(model, dtype))
    thread.start()
    try:
        yield
    finally:
        thread.join()
    loaded_from(model, folder)


def _places(model: torch.nn.Module) -> _Places:
    shares = [(name, own_share(tensor)) for name, tensor in sorted(model.state_dict(keep_vars=True).items())]
    return [(name, tensor.data_ptr(), tensor._version) for name, tensor in shares if torch.is_tensor(tensor)]


def _types(model: torch.nn.Module) -> set[torch.dtype]:
    tensors = model.state_dict(keep_vars=True).values()
    return {one.dtype for one in tensors if torch.is_tensor(one) and one.is_floating_point()}
