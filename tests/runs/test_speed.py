"""What makes a step cheaper must not move its numbers: losses with and without each, from the same seed."""

import pytest
from support import plain_statistics, plain_targets

from dualoptim import UnlearnArgs, run
from dualoptim.method import scores
from dualoptim.models import launch, load

PAIRS = ("ME+GD", "IDK+AP", "NPO+KL", "DPO+GD", "UNDIAL+KLQ", "CE-U+GD", "PDU+GD")


def without(name, monkeypatch):
    """Switch one of them off; the changes to the arguments that this takes."""
    if name == "shared questions":
        monkeypatch.setattr(load, "keeps_apart", lambda *_, **__: False)
    elif name == "statistics with one gradient tensor":
        monkeypatch.setattr(scores.Statistics, "apply", plain_statistics)
    elif name == "targets some rows at a time":
        monkeypatch.setattr(scores.AgainstTargets, "apply", plain_targets)
    elif name == "sparse gradient of tied embeddings":
        monkeypatch.setattr(launch, "is_sharded", lambda _: True)
    return {"attn_implementation": "sdpa"} if name == "attention block by block" else {}


@pytest.fixture(scope="module")
def fast(taught, tmp_path_factory):
    return run(arguments(taught, tmp_path_factory.mktemp("fast"))).tasks


def arguments(taught, folder, **changes):
    common = {"model": str(taught), "data": "demo", "learning_rates": (1e-4,), "retain_freq": 1, "max_steps": 6, "eval": False}
    return UnlearnArgs(**common, forget_losses=PAIRS, output_dir=str(folder), **changes)


@pytest.mark.launch
@pytest.mark.parametrize(
    "name",
    [
        "attention block by block",
        "shared questions",
        "statistics with one gradient tensor",
        "targets some rows at a time",
        "sparse gradient of tied embeddings",
    ],
)
def test_the_losses_are_the_same_without(name, fast, taught, tmp_path, monkeypatch):
    slow = run(arguments(taught, tmp_path, **without(name, monkeypatch))).tasks
    for one, other in zip(fast, slow, strict=True):
        for record, expected in zip(one.log, other.log, strict=True):
            place = f"{one.losses}, step {record['step']}"
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5), place
            assert (record["count"], record["tokens"]) == (expected["count"], expected["tokens"]), place
