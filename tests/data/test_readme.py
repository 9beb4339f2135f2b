"""What the README of `dualoptim/data` says must run."""

import re
from pathlib import Path

import dualoptim.data
from dualoptim.data.rows import Row
from dualoptim.data.splits import Splits
from dualoptim.data.tofu import TofuSource

README = (Path(dualoptim.data.__path__[0]) / "README.md").read_text(encoding="utf-8")


def test_the_layout_of_the_readme_is_a_source():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block.count("\n") <= 10
    names = {"Splits": Splits, "Row": Row}
    exec(block, names)
    source = TofuSource(names["Sums"]("sums"))
    assert source.tasks("forget01") == [1, 2]
    assert [row.answer for row in source.task_rows("forget01", 2)] == [f"It is {2 * n}." for n in range(5, 10)]
    assert len(source.retain_rows("forget01", [1])) == 80 + 5
    sets, skipped = source.evaluation_sets("forget01", 1)
    assert sets == {"forget": source.task_rows("forget01", 1)}
    assert list(skipped) == ["retain", "real_authors", "world_facts"]


def test_the_readme_names_every_file_and_field_there_is():
    folder = Path(dualoptim.data.__path__[0])
    for path in folder.glob("*.*"):
        assert path.name in README or path.name in ("__init__.py", "README.md"), path.name
    fields = "question answer task_id paraphrased_answer perturbed_answer paraphrased_question original_answer golden_answer"
    assert all(f"`{field}`" in README for field in fields.split())
