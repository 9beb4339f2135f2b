"""A file of a checkpoint that asks for code to be run is found, and none of it is run."""

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from planted import plant
from torch.distributed.checkpoint import FileSystemReader, save

from dualoptim.models.pickled import named_code, tensors_only


@pytest.fixture
def marker(tmp_path) -> Path:
    """What code that ran would have made."""
    return tmp_path / "ran"


class Call:
    """Pickled, it is a call."""

    def __init__(self, function, *given):
        self.called = function, given

    def __reduce__(self):
        return self.called


def write(path: Path, value, old: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


CALLS = {
    "mkdir": lambda marker: Call(os.mkdir, str(marker)),
    "system": lambda marker: Call(os.system, f"mkdir {marker}"),
    "eval": lambda marker: Call(eval, f"__import__('os').mkdir({str(marker)!r})"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["optimizer.bin", "mp_rank_00_model_states.pt", "random_states_0.pkl"])
def test_a_call_in_a_file_is_named_and_not_made(tmp_path, marker, name, call):
    file = write(tmp_path / name, {"weight": torch.ones(2), "deep": [{"er": CALLS[call](marker)}]})
    (found,) = named_code(file)
    assert found in ("posix.mkdir", "posix.system", "__builtin__.eval", "builtins.eval")
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file would have run it"


def test_files_that_are_no_checkpoints_cannot_be_read(tmp_path, marker):
    old = write(tmp_path / "a.pt", {"x": CALLS["mkdir"](marker)}, old=True)
    bare, cut = tmp_path / "b.pkl", tmp_path / "c.bin"
    bare.write_bytes(pickle.dumps(CALLS["mkdir"](marker)))
    cut.write_bytes(write(tmp_path / "d.pt", {"x": torch.ones(9)}).read_bytes()[:200])
    for file in (old, bare, cut):
        with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
            named_code(file)
    assert not marker.exists()


def test_tensors_and_numbers_name_nothing(tmp_path):
    file = write(tmp_path / "a.pt", {"x": torch.ones(2, dtype=torch.uint8), "step": 3, "betas": (0.9, 0.999), "none": None})
    assert named_code(file) == []
    (tmp_path / "zero_to_fp32.py").write_text("import os")
    assert named_code(tmp_path / "zero_to_fp32.py") == []


def divided(folder: Path) -> Path:
    """A checkpoint as FSDP2 writes it: its folder."""
    save({"weight": torch.ones(3), "rate": 0.5}, checkpoint_id=folder, no_dist=True)
    return folder


def test_the_index_of_a_divided_checkpoint_is_read_without_calls(tmp_path, marker):
    folder = divided(tmp_path / "one")
    assert named_code(folder / ".metadata") == []
    plant(folder / ".metadata", marker)
    assert named_code(folder / ".metadata") == ["posix.mkdir"]
    assert not marker.exists()
    FileSystemReader(folder).read_metadata()
    assert marker.exists(), "the index would have run it"


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "pathlib.Path.rmdir"])
def test_an_index_names_data_alone(tmp_path, name):
    module, _, function = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    assert named_code(tmp_path / ".metadata") == [name]


def test_a_value_within_a_divided_checkpoint_is_looked_at_too(tmp_path, marker):
    folder = divided(tmp_path / "one")
    index = FileSystemReader(folder).read_metadata()
    (place,) = (place for place in index.storage_data if place.fqn == "rate")
    evil = io.BytesIO()
    torch.save(CALLS["mkdir"](marker), evil)
    (folder / "evil.distcp").write_bytes(evil.getvalue())
    stored = index.storage_data[place]
    stored.relative_path, stored.offset, stored.length = "evil.distcp", 0, len(evil.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert named_code(folder / ".metadata") == ["posix.mkdir"]
    assert not marker.exists()


def test_the_variables_of_the_environment_are_as_before(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with contextlib.suppress(KeyError), tensors_only():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        raise KeyError
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_planted_files_are_what_torch_takes(tmp_path, marker):
    file = write(tmp_path / "a.pt", {"x": torch.ones(2)})
    plant(file, marker)
    assert zipfile.is_zipfile(file)
    assert torch.load(file, weights_only=False)["x"].tolist() == [1, 1]
    assert marker.exists()
