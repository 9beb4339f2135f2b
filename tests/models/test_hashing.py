"""The hash of a model's weights: what it tells apart, and how seldom it is computed."""

import dataclasses

import pytest
import torch

from dualoptim import UnlearnArgs
from dualoptim.data import demo
from dualoptim.models import hashing
from dualoptim.models.export import export_model
from dualoptim.models.hashing import loaded_from, weights_changed, weights_hash
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model


def counted(monkeypatch):
    """A list that grows by one whenever a hash is computed."""
    hashed, compute = [], hashing._computed
    monkeypatch.setattr(hashing, "_computed", lambda *given: hashed.append(1) or compute(*given))
    return hashed


@pytest.mark.parametrize("change", ["value", "name", "type"])
def test_a_hash_tells_weights_apart(change):
    model, same = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    same.load_state_dict(model.state_dict())
    assert weights_hash(model) == weights_hash(same)
    if change == "value":
        with torch.no_grad():
            same.weight[2, 1] = torch.nextafter(same.weight[2, 1], torch.tensor(9.0))
    elif change == "name":
        same = torch.nn.Sequential(same)
    else:
        same = same.double()
    assert weights_hash(model) != weights_hash(same)


def test_a_model_is_hashed_once_until_it_changes(monkeypatch):
    hashed = counted(monkeypatch)
    model = torch.nn.Linear(2, 2)
    seen = [weights_hash(model)]
    assert weights_hash(model) == seen[0]
    assert len(hashed) == 1
    with torch.no_grad():
        model.weight[0, 0] += 1
    seen.append(weights_hash(model))
    model.weight = torch.nn.Parameter(torch.zeros(2, 2))
    seen.append(weights_hash(model))
    model.load_state_dict({name: value + 3 for name, value in model.state_dict().items()})
    seen.append(weights_hash(model))
    model.weight.data += 1  # which PyTorch does not count
    weights_changed(model)
    seen.append(weights_hash(model))
    assert len(set(seen)) == len(hashed) == 5


def test_models_of_the_same_files_are_hashed_once(monkeypatch, tmp_path):
    """As they are or rounded; not one that has changed since, nor one of files that have."""
    monkeypatch.setattr(hashing, "_OF_FILES", {})
    hashed = counted(monkeypatch)

    def load(dtype=torch.float32):
        model = torch.nn.Linear(2, 2)
        model.load_state_dict(torch.load(tmp_path / "weights"))
        model.to(dtype)
        loaded_from(model, str(tmp_path))
        return model

    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights")
    whole = {weights_hash(load()), weights_hash(load())}
    rounded = {weights_hash(load(), torch.bfloat16), weights_hash(load(torch.bfloat16), torch.bfloat16)}
    rounded.add(weights_hash(load(torch.bfloat16)))
    assert (len(whole), len(rounded), len(hashed)) == (1, 1, 2)
    changed = load()
    with torch.no_grad():
        changed.weight += 1
    trained = load()
    trained.weight.data += 2
    weights_changed(trained)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights")
    assert len({*whole, weights_hash(changed), weights_hash(trained), weights_hash(load())}) == 4
    assert len(hashed) == 5


def test_a_trained_model_is_hashed_while_it_is_saved(tiny, tmp_path, monkeypatch):
    """Nothing waits for its hash afterwards, nor for that of the files, also with a card that is written later."""
    args = UnlearnArgs(model=str(tiny), data="demo", output_dir=str(tmp_path))
    loaded = load_model(args, start_accelerator(args))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight += 1
    weights_changed(loaded.model)
    export_model(loaded, tmp_path / "model", "a card")
    (tmp_path / "model" / "README.md").write_text("another card")
    hashed = counted(monkeypatch)
    known = loaded.weights_hash()
    again = load_model(dataclasses.replace(args, model=str(tmp_path / "model")), loaded.accelerator)
    assert again.weights_hash() == known
    assert hashed == []
    assert hashing._computed(again.model, None) == known


@pytest.mark.parametrize("threads", [1, 3])
def test_a_hash_does_not_depend_on_how_many_cores_compute_it(monkeypatch, threads):
    model = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(5)))
    found = hashing._computed(model, None)
    monkeypatch.setattr(hashing, "_THREADS", threads)
    assert hashing._computed(model, None) == found
    assert found.startswith(hashing.KIND)


def test_a_hash_is_that_of_a_file_loaded_again(tiny):
    args = UnlearnArgs(model=str(tiny), data="demo")
    assert weights_hash(load_model(args, start_accelerator(args)).model) == weights_hash(demo.tiny_model(0)[0])
