"""A model that lies divided among processes is measured as a whole one is, whoever has how many rows of a set."""

import json

import pytest
from support import launch

from dualoptim.data.demo import splits


def rows(count, start=0):
    """Questions of the demo with all of their answers."""
    found = splits()["forget05_perturbed"][start : start + count]
    return [[row["question"], row["answer"], row["paraphrased_answer"], row["perturbed_answer"]] for row in found]


def passages(count):
    """Texts without a question, of unequal length."""
    answers = [row["answer"] for row in splits()["full"]]
    return [[None, " ".join(answers[n : 2 * n + 1])] for n in range(count)]


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_a_divided_model_is_measured_as_a_whole_one(config, tiny, tmp_path):
    """Fewer rows than processes, unequal shares, passages and questions, membership and drawn answers."""
    if config == "zero3":
        pytest.importorskip("deepspeed")
    sets = {"forget": rows(5), "retain": rows(1, 5), "holdout": rows(3, 6), "passages": passages(3)}
    launch(config, {"model": str(tiny), "output": str(tmp_path), "rows": sets}, script="divided_worker.py")
    numbers = 0
    for name in (*sets, "drawn"):
        whole, divided = (
            [json.loads(line) for line in (tmp_path / choice / f"{name}.jsonl").read_text().splitlines()]
            for choice in ("no", "yes")
        )
        assert len(whole) == len(sets.get(name, sets["forget"]))
        for one, other in zip(whole, divided, strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                if isinstance(value, float):
                    assert other[key] == pytest.approx(value, abs=1e-5), (name, key)
                    numbers += 1
                else:
                    assert other[key] == pytest.approx(value, abs=1e-5) if key == "perturbed_losses" else other[key] == value
    assert numbers > 80
    assert len(set((tmp_path / "yes" / "drawn.jsonl").read_text().splitlines())) == 5
    for name in sets:  # the two are taken for one evaluation
        whole, divided = (json.loads((tmp_path / way / "finished.json").read_text())[name] for way in ("no", "yes"))
        assert all(whole[what] == divided[what] for what in ("weights", "inputs"))
