"""A model that lies divided among processes is measured as a whole one is, whoever has how many rows of a set."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from support import launch

from dualoptim import EvalArgs, InputError, UnlearnArgs, run
from dualoptim.data.demo import splits
from dualoptim.evaluate import Measures, evaluate
from dualoptim.evaluation.judges import Judges
from dualoptim.models import measured
from dualoptim.models.load import load_model
from dualoptim.models.loaded import Loading


def rows(count, start=0):
    """Questions of the demo with all of their answers."""
    found = splits()["forget05_perturbed"][start : start + count]
    return [[row["question"], row["answer"], row["paraphrased_answer"], row["perturbed_answer"]] for row in found]


def passages(count):
    """Texts without a question, of unequal length."""
    answers = [row["answer"] for row in splits()["full"]]
    return [[None, " ".join(answers[n : 2 * n + 1])] for n in range(count)]


def same(one, other, tolerance, where):
    """Make sure that two lines of a file say the same, and count their numbers."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float) or key == "perturbed_losses":
            assert other[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (where, key)
        elif tolerance <= 1e-5:
            assert other[key] == value, (where, key)
    return sum(isinstance(value, float) for value in one.values())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        whole, divided = (lines(tmp_path / choice / f"{name}.jsonl") for choice in ("no", "yes"))
        assert len(whole) == len(sets.get(name, sets["forget"]))
        numbers += sum(same(one, other, 1e-5, name) for one, other in zip(whole, divided, strict=True))
    assert numbers > 80
    assert len(set((tmp_path / "yes" / "drawn.jsonl").read_text().splitlines())) == 5
    for name in sets:  # the two are taken for one evaluation
        whole, divided = (json.loads((tmp_path / way / "finished.json").read_text())[name] for way in ("no", "yes"))
        assert all(whole[what] == divided[what] for what in ("weights", "inputs"))


TASK = """
task: cities
dataset_path: json
dataset_kwargs:
  data_files: {{"train": "{rows}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Everything that can be asked of a divided model, asked of a whole one by one process."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tasks").mkdir()
    asked = [{"question": f"In which city was {name} born?", "choices": ["Lviv", "Oslo"], "label": 0} for name in "ABC"]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, asked)))
    (folder / "tasks" / "cities.yaml").write_text(TASK.format(rows=folder / "rows.json"))
    args = EvalArgs(
        model=str(tiny),
        data="demo",
        eval_rows=3,
        max_new_tokens=6,
        retain_model=str(tiny),
        reference_model=str(tiny),
        relearn=2,
        relearn_every=2,
        relearn_lr=1e-4,
        relearn_rows="retain",
        sample=2,
        lm_eval_tasks=("cities",),
        lm_eval_path=str(folder / "tasks"),
        threads=1,
        output_dir=str(folder / "one"),
    )
    return args, evaluate(args)


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_the_whole_evaluation_of_a_divided_model_equals_one_process(config, alone, tmp_path):
    """Membership, another reference, a retain-only model, relearning, drawn answers and lm-eval."""
    if config == "zero3":
        pytest.importorskip("deepspeed")
    args, summary = alone
    two = dataclasses.replace(args, relearn_batch_size=2, evaluate_sharded="yes", output_dir=str(tmp_path))
    done = launch(config, {"evaluation": dataclasses.asdict(two)}, script="divided_worker.py")
    assert done.stdout.count("is measured divided among 2 processes; the whole takes") == 4
    one = Path(args.output_dir)
    files = sorted(path.relative_to(one) for path in one.rglob("*.jsonl"))
    numbers = 0
    for file in files:
        if file.name != "log.jsonl":  # after relearning, Adam has turned rounding of small gradients into shares of the rate
            pairs = zip(lines(one / file), lines(tmp_path / file), strict=True)
            numbers += sum(same(first, second, 1e-3 if "relearn" in str(file) else 1e-5, file) for first, second in pairs)
    assert {"sample", "step2", "retain_only"} <= {file.parent.name for file in files}
    assert numbers > 200
    found = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert found["general"] == summary["general"]
    assert found["privacy"] == pytest.approx(summary["privacy"], abs=1e-9)


@pytest.mark.launch
@pytest.mark.parametrize("config", ["zero3", pytest.param("fsdp2", marks=pytest.mark.campaign)])
def test_relearning_in_16_bits_by_two_processes_equals_one(config, tiny, tmp_path, sixteen_bits):
    """Divided when it is taught and when it is measured: losses of every step, and what comes back."""
    if config == "zero3":
        pytest.importorskip("deepspeed")
    relearning = {"relearn": 8, "relearn_every": 4, "relearn_lr": 1e-3, "relearn_rows": "retain", "relearn_batch_size": 4}
    one = EvalArgs(
        model=str(tiny), data="demo", eval_rows=4, max_new_tokens=4, threads=1, output_dir=str(tmp_path / "one"), **relearning
    )
    two = dataclasses.replace(one, relearn_batch_size=2, evaluate_sharded="yes", output_dir=str(tmp_path / "two"))
    evaluate(one)
    launch(config, {"evaluation": dataclasses.asdict(two)}, script="divided_worker.py", precision="bf16")
    folders = [tmp_path / name / "eval" for name in ("one", "two")]
    first, second = ([step["loss"] for step in lines(folder / "attacks" / "relearn" / "log.jsonl")] for folder in folders)
    assert second == pytest.approx(first, rel=1e-3)
    first, second = (
        [
            scores["probability"]
            for point in json.loads((folder / "summary.json").read_text())["attacks"]["relearn"]["curve"]
            for scores in point["sets"].values()
        ]
        for folder in folders
    )
    assert second == pytest.approx(first, rel=5e-3)
    assert max(first) > 2 * first[0], "nothing was learned"


def test_what_needs_the_whole_model_is_refused_in_one_line(tiny):
    args = EvalArgs(model=str(tiny), data="demo", evaluate_sharded="yes")
    loaded = load_model(args, Accelerator(cpu=True))
    for change, flag in (({"mia_gradnorm": True}, "--mia-gradnorm"), ({"quantize": (8, 4)}, "--quantize 8 4")):
        measures = Measures(dataclasses.replace(args, **change), Judges())
        measures.check(loaded)
        with pytest.raises(InputError, match=rf"^{flag} needs the whole model in every process; drop it, or give "):
            measures.check(dataclasses.replace(loaded, divided=True))


def test_a_launch_that_divides_nothing_measures_nothing_divided(tiny, tmp_path):
    common = {"model": str(tiny), "data": "demo", "evaluate_sharded": "yes", "output_dir": str(tmp_path / "out")}
    for act in (lambda: evaluate(EvalArgs(**common)), lambda: run(UnlearnArgs(**common))):
        with pytest.raises(InputError, match=r"^--evaluate-sharded yes needs a launch that divides models; use zero3.yaml or"):
            act()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "width"), [("no", 4), ("bf16", 2)])
def test_a_model_is_measured_whole_where_that_takes_at_most_half_of_the_memory(precision, width, monkeypatch):
    model = torch.nn.Linear(1000, 1000, bias=False, device="meta")
    here = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"), num_processes=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    how = Loading(torch.float32, divided=True)
    for memory, auto in ((4 * width * 10**6, False), (4 * width * 10**6 - 4, True)):  # of both processes
        monkeypatch.setattr(measured.os, "sysconf", {"SC_PHYS_PAGES": memory // 4, "SC_PAGE_SIZE": 4}.get)
        for choice, divided in (("auto", auto), ("yes", True), ("no", False)):
            args = EvalArgs(evaluate_sharded=choice)
            assert measured.chosen(how, args, here, model).divided == divided
            assert not measured.chosen(Loading(torch.float32), args, here, model).divided, "what cannot be divided"
