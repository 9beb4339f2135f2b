"""General ability by lm-eval, on a task that needs no network."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import lm_harness


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


def process(number, processes=2):
    """One process of a launch, as far as sharing out asks of it."""
    return SimpleNamespace(share=(number, processes), in_step=contextlib.nullcontext, accelerator=None, divided=False)


def test_every_process_answers_whole_questions_and_has_all_answers_in_order(monkeypatch):
    requests = [SimpleNamespace(task_name="t", doc_id=doc, text=f"{doc}{letter}") for doc in range(3) for letter in "ABCD"]
    asked, told = [], [[], []]

    def of_all(accelerator, answers):
        told[len(asked) - 1] = answers
        return told

    def answer(mine):
        asked.append([request.text for request in mine])
        return [request.text.lower() for request in mine]

    monkeypatch.setattr(lm_harness, "of_all", of_all)
    with pytest.raises(KeyError):  # the other has not answered yet
        lm_harness.shared_out(process(0), requests, answer)
    assert lm_harness.shared_out(process(1), requests, answer) == [request.text.lower() for request in requests]
    assert asked == [["0A", "0B", "0C", "0D", "2A", "2B", "2C", "2D"], ["1A", "1B", "1C", "1D"]]


def test_a_process_that_fails_ends_all_with_one_line(monkeypatch):
    told = []
    monkeypatch.setattr(lm_harness, "of_all", lambda _, value: told.append(value) or ["no memory", value])
    args = UnlearnArgs(model="m", lm_eval_tasks=("cities",))
    monkeypatch.setattr(lm_harness, "_run_tasks", lambda *_: {})
    with pytest.raises(InputError, match=r"^no memory$"):
        lm_harness.general_ability(process(1), args)

    def broken(*_):
        raise KeyError("choices")

    monkeypatch.setattr(lm_harness, "_run_tasks", broken)
    with pytest.raises(InputError, match=r"^--lm-eval-tasks cities: lm-eval cannot run them \('choices'\); check their data$"):
        lm_harness.general_ability(process(0), args)
    assert told == [[], "--lm-eval-tasks cities: lm-eval cannot run them ('choices'); check their data"]
