"""General ability by lm-eval, on a task that needs no network."""

import dataclasses
import json

import pytest

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.evaluate import evaluate


def test_general_ability_by_a_local_task_of_lm_eval(taught, tmp_path):
    """No network: the task and its rows lie in a folder."""
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    docs = [
        {"question": f"In which city was {name} born?", "choices": ["Lviv", "a violin"], "label": 0} for name in ("A", "B", "C")
    ]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "tasks" / "cities.yaml").write_text(f"""
task: cities
dataset_path: json
dataset_kwargs:
  data_files: {{"train": "{tmp_path / "docs.json"}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
""")
    args = EvalArgs(
        model=str(taught), data="demo", eval_rows=2, max_new_tokens=4, lm_eval_tasks=("cities",),
        lm_eval_path=str(tmp_path / "tasks"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    summary = evaluate(args)
    assert 0 <= summary["general"]["cities"]["acc"] <= 1
    written = json.loads((tmp_path / "out" / "eval" / "summary.json").read_text())
    assert written["general"] == summary["general"]
    unknown = dataclasses.replace(args, lm_eval_tasks=("no_such_task",), output_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"--lm-eval-tasks no_such_task: lm-eval has no such task and .* has none"):
        evaluate(unknown)
    with pytest.raises(InputError, match=r"--lm-eval-tasks no_such_task: lm-eval has no such task"):
        run(UnlearnArgs(model=str(taught), data="demo", lm_eval_tasks=("no_such_task",), output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
