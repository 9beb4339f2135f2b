"""Data sets in the hub's layout as own data, here as folders, which the library reads in the same way."""

import json
import os
import time

import pytest
from accelerate.utils import compare_versions

from dualoptim import UnlearnArgs
from dualoptim.config import waiting
from dualoptim.data.hub import HubData
from dualoptim.data.own import open_source
from dualoptim.data.readers import Columns, read_named
from dualoptim.data.rows import Row
from dualoptim.data.tofu import tofu_source
from dualoptim.errors import InputError

CARD = "---\nconfigs:\n- config_name: full\n  data_files: full.json\n- config_name: few\n  data_files: few.json\n---\n"


def write(folder, name, count):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": f"{n}?", "answer": f"It is {n}."}) for n in range(count)]
    (folder / name).write_text("\n".join(lines))


@pytest.fixture(params=["plain", "br[ac]ket*s"])
def two(request, tmp_path):
    """Two configurations; the library reads no path with brackets by itself."""
    folder = tmp_path / request.param
    write(folder, "full.json", 5)
    write(folder, "few.json", 2)
    (folder / "README.md").write_text(CARD)
    return folder


def test_a_configuration_is_own_data(two, tmp_path):
    few = [Row("0?", "It is 0."), Row("1?", "It is 1.")]
    assert read_named("--forget-file", f"{two}:few", Columns()) == few
    assert read_named("--forget-file", f"{two}:few:train", Columns()) == few
    write(tmp_path, "more.jsonl", 1)
    args = UnlearnArgs(model="m", forget_file=(f"{two}:few", str(tmp_path / "more.jsonl")), retain_file=f"{two}:full")
    source = open_source(args)
    assert source.task_rows("any", 1) == [*few, few[0]]
    assert len(source.retain_rows("any", [1])) == 5
    assert source.describe("any", 1) == f"task 1: 3 rows of {two}:few, {tmp_path / 'more.jsonl'}"


def test_data_in_the_layout_of_tofu_lie_in_any_folder(two):
    assert len(tofu_source(str(two)).rows("few")) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"--forget-file .*: its configurations are full, few; give one, such as .*:full"),
        (":some", "--forget-file .*: configuration 'some' cannot be loaded|BuilderConfig 'some' not found"),
        (":few:test", "--forget-file .*: configuration 'few' cannot be loaded"),
    ],
)
def test_what_cannot_be_chosen_is_named(two, name, message):
    with pytest.raises(InputError, match=message) as error:
        read_named("--forget-file", f"{two}{name}", Columns())
    assert "\n" not in str(error.value)


def test_a_data_set_without_a_card(tmp_path):
    write(tmp_path / "one", "data/train-00000-of-00001.jsonl", 3)
    assert len(read_named("--retain-file", str(tmp_path / "one"), Columns())) == 3
    write(tmp_path / "both", "train.jsonl", 3)
    write(tmp_path / "both", "test.jsonl", 2)
    with pytest.raises(InputError, match=r"its splits are train, test; give one, such as .*/both:default:train"):
        read_named("--retain-file", str(tmp_path / "both"), Columns())
    assert len(read_named("--retain-file", f"{tmp_path}/both:default:test", Columns())) == 2


def test_an_id_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"--holdout-file nobody/nothing:few:train: .*cannot be loaded .*; check the name and the"
    ):
        read_named("--holdout-file", "nobody/nothing:few:train", Columns())
    with pytest.raises(InputError, match=r"^data/none\.csv: cannot be read"):
        read_named("--holdout-file", "data/none.csv", Columns())
    write(tmp_path, "a:b.jsonl", 1)
    assert len(read_named("--holdout-file", "a:b.jsonl", Columns())) == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_hub_that_takes_long_is_named_meanwhile_by_one_process(rank, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "_SECONDS", 0.01)
    monkeypatch.setenv("RANK", rank)

    def slow(place, cache_dir):
        time.sleep(0.2)
        return ["full"]

    monkeypatch.setattr("datasets.get_dataset_config_names", slow)
    assert HubData("--data", "me/rows", "me/rows").configurations() == ["full"]
    assert capsys.readouterr().err == ("asking the hub for me/rows ...\n" if rank == "0" else "")


def test_a_readme_that_is_no_file_is_none_and_code_beside_rows_never_runs(tmp_path):
    write(tmp_path, "forget01.json", 1)
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('it ran')")
    (tmp_path / "dataset_infos.json").write_text("{")
    os.mkfifo(tmp_path / "README.md")
    assert tofu_source(str(tmp_path))._splits.has("forget01")
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("nowhere")
    assert tofu_source(str(tmp_path))._splits.has("forget01")


def test_rows_of_a_folder_leave_no_copy_in_the_home(tmp_path, monkeypatch):
    import datasets

    caches, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: caches.append(more["cache_dir"]) or load(*args, **more))
    write(tmp_path, "few.json", 2)
    write(tmp_path, "full.json", 5)
    (tmp_path / "README.md").write_text(CARD)
    tofu_source(str(tmp_path)).rows("full")
    assert caches
    assert not any(cache is None or os.path.exists(cache) for cache in caches)


def test_a_readme_is_a_card_only_where_it_begins_with_configurations(tmp_path):
    mark = b"\xef\xbb\xbf" if compare_versions("huggingface_hub", ">=", "2.3") else b""  # older ones read no card with it
    for number, (text, rows) in enumerate(
        (
            (b"# Mine\n\nconfigs:\n- none\n", 1),
            (b"# Donn\xe9es\n", 1),
            (b"---\ntitle: x\n---\n\nconfigs:\n- none\n", 1),
            (b"---\nmine:\n  configs:\n  - none\n---\n", 1),
            (b"\n---\nconfigs:\n---\n", 1),
            (b"---\nconfigs: []\n---\n", 1),
            (b"---\nconfigs: [\n---\n", 1),
            (b"---\nmine: |\n  x\n  configs:\n---\n", 1),
            (b"---\nconfigs: [a]\nmine: \xe9\n---\n", 1),
            (mark + CARD.replace("\n", "\r\n").encode(), 2),
        )
    ):
        folder = tmp_path / str(number)
        write(folder, "few.json", 2)
        write(folder, "full.json", 5)
        write(folder, "forget01.json", 1)
        (folder / "README.md").write_bytes(text)
        splits = tofu_source(str(folder))._splits
        assert (1 if splits.has("forget01") else 2) == rows, text
