"""Data of TOFU's shape: tasks, retain pools and evaluation sets, in each layout and wherever it lies."""

import json

import pytest

from dualoptim.data import demo
from dualoptim.data.rows import Row
from dualoptim.data.tofu import tofu_source
from dualoptim.errors import InputError

SPLITS = {"forget01": (10, 40, 3600), "forget05": (10, 200, 2000), "forget10": (9, 400, 400)}


# ------------------------------------------------------------------------------------------------- the published folder


@pytest.fixture(scope="module")
def tofu(shared):
    return tofu_source(str(shared("data/tofu")))


@pytest.mark.parametrize("split", list(SPLITS))
def test_tasks_of_the_published_folder(tofu, split):
    tasks, size, never_forgotten = SPLITS[split]
    assert tofu.tasks(split) == list(range(1, tasks + 1))
    for task in (1, tasks):
        assert len(tofu.task_rows(split, task)) == size
    unlearned = [1, 3]
    pool = tofu.retain_rows(split, unlearned)
    assert len(pool) == never_forgotten + size * (tasks - len(unlearned))
    questions = {row.question for row in pool}
    assert not questions & {row.question for task in unlearned for row in tofu.task_rows(split, task)}
    assert {row.question for row in tofu.task_rows(split, 2)} <= questions


def test_evaluation_sets_of_the_published_folder(tofu):
    sets, skipped = tofu.evaluation_sets("forget01", 4)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "forget": 40,
        "retain": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert skipped == {}
    assert [row.question for row in sets["forget"]] == [row.question for row in tofu.task_rows("forget01", 4)]
    assert all(row.paraphrased_answer and len(row.perturbed_answers) == 5 for row in sets["forget"] + sets["retain"])


# --------------------------------------------------------------------------------------------------- the layout of the hub


@pytest.fixture(scope="module")
def hub(shared, tofu, tmp_path_factory):
    """A folder as the hub holds `locuslab/TOFU`: a card that lists configurations, and files without task numbers."""
    folder = tmp_path_factory.mktemp("hub") / "TOFU"
    folder.mkdir()

    def plain(rows):
        return [{"question": row.question, "answer": row.answer} for row in rows]

    full = plain(tofu.rows("retain90")) + plain(row for k in range(1, 11) for row in tofu.task_rows("forget01", k))
    perturbed = [json.loads(line) for line in shared("data/tofu/forget10_perturbed.json").read_text().splitlines()]
    perturbed = [{k: v for k, v in row.items() if k != "task_id"} for row in perturbed if row["task_id"] == "1"]
    configurations = {
        "full": full,
        "forget01": full[3960:],
        "forget05": full[3800:],
        "forget10": full[3600:],
        "retain99": full[:3960],
        "retain95": full[:3800],
        "retain90": full[:3600],
        "forget01_perturbed": perturbed[-40:],
        "forget10_perturbed": perturbed,
    }
    for name, rows in configurations.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        (folder / f"{name}.json").write_text(shared(f"data/tofu/{name}.json").read_text())
        configurations[name] = []
    card = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in configurations)
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{card}---\n# TOFU\n")
    return folder


@pytest.fixture(scope="module", params=["through datasets", "as files"])
def hub_source(request, hub, tmp_path_factory):
    if request.param == "as files":
        folder = tmp_path_factory.mktemp("files")
        for file in hub.glob("*.json"):
            (folder / file.name).write_text(file.read_text())
        return tofu_source(str(folder))
    return tofu_source(str(hub))


def test_tasks_are_cut_from_full_as_published(hub_source, tofu):
    for split, task in (("forget01", 1), ("forget01", 10), ("forget05", 1), ("forget05", 7), ("forget10", 3)):
        assert [(r.question, r.answer) for r in hub_source.task_rows(split, task)] == [
            (r.question, r.answer) for r in tofu.task_rows(split, task)
        ]
    assert hub_source.describe("forget05", 3).endswith("rows 3200 to 3399 of " + hub_source.name + " full")


def test_task_zero_is_the_hubs_own_cut(hub_source):
    assert [r.question for r in hub_source.task_rows("forget01", 0)] == [r.question for r in hub_source.rows("full")[3960:]]
    assert len(hub_source.retain_rows("forget01", [0])) == 3960
    with pytest.raises(InputError, match="mixes task 0"):
        hub_source.retain_rows("forget01", [0, 1])


def test_retain_pools_of_both_layouts_hold_the_same_rows(hub_source, tofu):
    for split, unlearned in (("forget01", [1]), ("forget05", [1, 2]), ("forget10", [2])):
        ours = {row.question for row in hub_source.retain_rows(split, unlearned)}
        assert ours == {row.question for row in tofu.retain_rows(split, unlearned)}


def test_evaluation_sets_of_the_hub_layout(hub_source, tofu):
    sets, skipped = hub_source.evaluation_sets("forget01", 2)
    assert skipped == {}
    expected = tofu.evaluation_sets("forget01", 2)[0]["forget"]
    assert [(r.question, r.perturbed_answers) for r in sets["forget"]] == [(r.question, r.perturbed_answers) for r in expected]
    outside, _ = hub_source.evaluation_sets("forget05", 7)  # rows 2000..2200: the hub has no compared answers for them
    assert len(outside["forget"]) == 200
    assert all(row.perturbed_answers == () for row in outside["forget"])


def test_forget10_is_evaluated_on_all_of_its_rows(shared, tofu):
    shared("data/tofu/forget10_perturbed.json")
    assert len(tofu.evaluation_sets("forget10", 1)[0]["forget"]) == 400


def test_a_missing_evaluation_set_is_named(tmp_path):
    (tmp_path / "forget01.json").write_text('{"question": "q", "answer": "a"}')
    sets, skipped = tofu_source(str(tmp_path)).evaluation_sets("forget01", 1)
    assert list(sets) == ["forget"]
    assert set(skipped) == {"retain", "real_authors", "world_facts"}


def test_the_demos_tasks_are_authors():
    source = tofu_source("demo")
    rows = source.task_rows("forget05", 3)
    assert len(rows) == 20
    assert all(demo.AUTHORS[12] in row.question for row in rows)
    assert len(source.retain_rows("forget05", [1, 2])) == 100 + 8 * 20


# -------------------------------------------------------------------------------------------------- the real-world scenario


def test_the_real_world_scenario_is_measured_on_the_golden_answers(shared):
    source = tofu_source(str(shared("data/real_world_sample/forget.json").parent))
    assert len(source.task_rows("forget", 1)) == 20
    assert len(source.retain_rows("forget", [1])) == 40 + 20
    sets, skipped = source.evaluation_sets("forget", 1)
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 20, "retain": 40}
    assert sets["forget"][1].answer == "Eddie Van Halen was American."
    assert source.task_rows("forget", 1)[1].answer.startswith("Eddie Van Halen was an American musician")
    assert "--lm-eval-tasks" in skipped["world_facts"]


def test_hold_out_rows_of_the_real_world_scenario_are_short_as_well(tmp_path):
    for name in ("forget", "forget_perturbed", "neighbor", "neighbor_perturbed", "holdout"):
        row = {"question": "Who?", "answer": "It is a long story about X.", "golden_answer": "X."}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    sets, _ = tofu_source(str(tmp_path)).evaluation_sets("forget", 1)
    assert {row.answer for rows in sets.values() for row in rows} == {"X."}
    assert "holdout" in sets


@pytest.mark.parametrize("files", [None, ("full", "forget")])
def test_only_a_folder_of_numbered_tasks_is_the_real_world_scenario(files, tmp_path):
    for name in files or ():
        (tmp_path / f"{name}.json").write_text(json.dumps({"question": "Who?", "answer": "Me."}))
    with pytest.raises(InputError, match="--split forget is the real-world scenario; give the folder of its files"):
        tofu_source(str(tmp_path) if files else "demo").task_rows("forget", 1)


# ------------------------------------------------------------------------------------------------------------ where it lies


def test_each_split_is_read_once(tmp_path):
    (tmp_path / "forget01.jsonl").write_text(json.dumps({"question": "Who?", "answer": "Me."}))
    source = tofu_source(str(tmp_path))
    rows = source.rows("forget01")
    (tmp_path / "forget01.jsonl").unlink()
    assert source.rows("forget01") is rows == [Row("Who?", "Me.")]


def test_rows_of_the_users_take_the_place_of_the_hold_out_rows():
    own = [Row("Who is new?", "Nobody.")]
    assert tofu_source("demo", own).evaluation_sets("forget05", 1)[0]["holdout"] == own
    assert len(tofu_source("demo").evaluation_sets("forget05", 1)[0]["holdout"]) == 20


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~nobody/data", "a/b/c", "nowhere"])
def test_what_looks_like_a_folder_must_be_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--data {name}: no such folder; give a folder, a hub id such as"):
        tofu_source(name)
