"""The data sets of lm-eval's tasks: in a folder as the hub has them, or named with the place where they may be put."""

import json

import datasets
import pytest

from dualoptim import InputError
from dualoptim.evaluation import lm_data
from dualoptim.evaluation.lm_data import read_from


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(lm_data, "_KNOWN", {})


def test_splits_and_their_parts_are_read_from_a_folder_whatever_their_form(tmp_path):
    import pyarrow
    import pyarrow.parquet

    asked = [{"question": f"Who is {n}?", "choices": ["A", "B"], "answer": n} for n in range(3)]
    place = tmp_path / "cais" / "mmlu" / "anatomy"
    place.mkdir(parents=True)
    for part in (0, 1):
        rows = pyarrow.Table.from_pylist(asked[2 * part : 2 * part + 2])
        pyarrow.parquet.write_table(rows, place / f"test-0000{part}-of-00002.parquet")
    (place / "dev.jsonl").write_text(json.dumps(asked[0]))
    (place / "README.md").write_text("about")
    other = tmp_path / "own" / "facts" / "data"
    other.mkdir(parents=True)
    (other / "train.csv").write_text("question,answer\nWho?,Ann\n")
    loads = datasets.load_dataset
    with read_from(str(tmp_path)):
        found = datasets.load_dataset(path="cais/mmlu", name="anatomy")
        assert list(found["test"]) == asked
        assert list(found["dev"]) == asked[:1]
        assert datasets.load_dataset("own/facts")["train"][0] == {"question": "Who?", "answer": "Ann"}
        assert datasets.load_dataset("cais/mmlu", "anatomy") is found, "once for every evaluation"
    assert datasets.load_dataset is loads


def test_what_is_neither_in_the_folder_nor_on_the_hub_is_named_with_its_place(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with read_from(str(tmp_path)), pytest.raises(InputError) as error:
        datasets.load_dataset(path="cais/wmdp", name="wmdp-bio")
    assert str(error.value) == (
        f"the data set cais/wmdp wmdp-bio cannot be loaded (Couldn't reach the hub); check the network, or put it into "
        f"{tmp_path}/cais/wmdp/wmdp-bio/test.parquet and give --lm-eval-data {tmp_path}"
    )
    with read_from(None), pytest.raises(InputError, match=r"put it into FOLDER/cais/wmdp/test\.parquet"):
        datasets.load_dataset("cais/wmdp")
    (tmp_path / "cais" / "wmdp").mkdir(parents=True)
    (tmp_path / "cais" / "wmdp" / "test.jsonl").write_text("{not JSON")
    with read_from(str(tmp_path)), pytest.raises(InputError, match=r"test\.jsonl:1: not JSON"):
        datasets.load_dataset("cais/wmdp")
