"""Launches in 16 bits: what is trained are float32 weights, and what is saved does not depend on the launch.

pytest -m campaign -s tests/runs/test_sixteen_bits.py      # prints the table of accelerate_configs/README.md
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from support import FOLDER, RATE, arguments, difference, launch, rows_of, state_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import EvalArgs, run
from dualoptim.data.demo import splits
from dualoptim.evaluate import evaluate
from dualoptim.method import loop

LAUNCHES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]


@pytest.mark.launch
@pytest.mark.parametrize("config", LAUNCHES)
def test_masters_are_the_loaded_weights(config, tiny):
    if config.startswith("zero"):
        pytest.importorskip("deepspeed")
    done = launch(config, str(tiny), script="masters_worker.py", precision="bf16")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"divided')))
    assert found["divided"] == (config in ("zero3", "fsdp2"))
    for moment in ("prepared", "stepped"):
        assert found[moment]["tensors"] > 10
        assert found[moment]["rounded"] > 0, "rounding would not show"
        assert found[moment]["differing"] == 0, moment


@pytest.mark.campaign
@pytest.mark.parametrize("config", LAUNCHES)
def test_two_processes_end_near_one_in_16_bits(config, tiny, tmp_path):
    """After 24 steps, against one process that computes with the same 16 bits."""
    pytest.importorskip("deepspeed")
    runs = {
        name: arguments(tiny, tmp_path / name, optim, batch_size=4 // processes)
        for name, processes, optim in (("one", 1, "dual-adamw"), ("wrong", 1, "adamw-alternate"), ("two", 2, "dual-adamw"))
    }
    alone = config if config.startswith("zero") else "cpu"
    for where, processes, names in ((alone, 1, ("one", "wrong")), (config, 2, ("two",))):
        launch(where, {"runs": [dataclasses.asdict(runs[name]) for name in names]}, processes, precision="bf16")
    ends = {name: state_of(tmp_path / name / FOLDER / "model") for name in runs}
    types = {dtype for dtype, _ in stored(tmp_path / "two" / FOLDER / "model")[0].values()}
    found = [difference(ends["two"], other) for other in (ends["one"], ends["wrong"], state_of(tiny))]
    print(
        f"| {config} | " + " | ".join(f"{largest / RATE:.1e}, {mean / RATE:.1e}" for largest, mean in found) + f" | {types} |"
    )
    (_, mean), (_, wrong), (_, moved) = found
    assert types == {"F32"}
    assert mean < 0.1 * moved
    assert mean < 0.3 * wrong, "mixed-up banks would pass"


def stored(folder):
    """Names, types and shapes of the tensors of a saved model, and the type that its configuration names."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    return found, config.get("dtype")


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """A checkpoint in bfloat16, as nearly all on the hub are."""
    folder = tmp_path_factory.mktemp("tiny") / "half"
    shutil.copytree(tiny, folder)
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(half, tmp_path_factory):
    """The task folder of a run that trained and was measured in 16 bits, divided among two processes."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("written")
    args = arguments(half, folder, "dual-adamw", batch_size=2, max_steps=6, eval=True, eval_rows=6, max_new_tokens=4)
    launch("zero3", {"runs": [dataclasses.asdict(dataclasses.replace(args, evaluate_sharded="yes"))]}, precision="bf16")
    return folder / FOLDER


@pytest.mark.launch
def test_what_is_saved_is_the_same_for_every_launch(half, written, tmp_path):
    """The same names, shapes and types from one process in float32 and from two by every strategy in 16 bits."""
    settings = {"batch_size": 2, "max_steps": 2}
    alone = arguments(half, tmp_path / "alone", "dual-adamw", **settings)
    run(alone)
    wanted = stored(tmp_path / "alone" / FOLDER / "model")
    assert {dtype for dtype, _ in wanted[0].values()} == {"BF16"}
    assert wanted[1] == "bfloat16"
    assert stored(written / "model") == wanted, "zero3"
    for config in ("ddp", "zero2", "fsdp2"):
        args = arguments(half, tmp_path / config, "dual-adamw", **settings)
        launch(config, {"runs": [dataclasses.asdict(args)]}, precision="bf16")
        assert stored(tmp_path / config / FOLDER / "model") == wanted, config


@pytest.mark.parametrize(("asked", "type_"), [("auto", "BF16"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_type_is_the_checkpoints_or_the_one_asked_for(half, tmp_path, asked, type_):
    result = run(arguments(half, tmp_path / "out", "dual-adamw", max_steps=1, save_dtype=asked))
    tensors, config = stored(result.tasks[0].model)
    assert {dtype for dtype, _ in tensors.values()} == {type_}
    named = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}[type_]
    assert config == named
    assert f"Saved in {named}" in (result.tasks[0].model / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(result.tasks[0].model).dtype == getattr(torch, named)


def test_an_adapter_is_saved_in_float32_unless_asked_otherwise(half, tmp_path):
    for asked, type_ in (("auto", "F32"), ("bfloat16", "BF16")):
        args = arguments(half, tmp_path / asked, "dual-adamw", max_steps=1, use_lora=True, save_dtype=asked)
        tensors, _ = stored(run(args).tasks[0].model)
        assert {dtype for dtype, _ in tensors.values()} == {type_}


def test_what_is_saved_is_what_was_measured(half, tmp_path):
    args = arguments(half, tmp_path / "out", "dual-adamw", max_steps=2, eval=True, eval_rows=3, max_new_tokens=4)
    task = run(args).tasks[0]
    again = evaluate(
        EvalArgs(model=str(task.model), data="demo", eval_rows=3, max_new_tokens=4, output_dir=str(tmp_path / "again"))
    )
    assert again["sets"] == task.after["sets"]


def test_a_sequence_goes_on_from_what_was_trained_and_not_from_what_was_rounded(half, tmp_path):
    """The saved types must not show in the weights that the second task ends at, whether it is resumed or not."""
    settings = {"max_steps": 3, "task_list": (1, 2)}
    whole = run(arguments(half, tmp_path / "whole", "dual-adamw", save_dtype="float32", **settings))
    wanted = state_of(whole.tasks[1].model)
    args = arguments(half, tmp_path / "parts", "dual-adamw", save_dtype="bfloat16", **settings)
    first = run(dataclasses.replace(args, task_list=(1,)))
    assert not (first.tasks[0].folder / "masters").exists(), "no task follows"
    shutil.rmtree(tmp_path / "parts")
    rounded = run(args)
    assert [(task.folder / "masters").exists() for task in rounded.tasks] == [False, False], "removed once they are of no use"
    saved = state_of(rounded.tasks[1].model)
    assert all(torch.equal(saved[name], weight.bfloat16()) for name, weight in wanted.items())


@pytest.mark.parametrize("moment", ["before the second task", pytest.param("within it", marks=pytest.mark.launch)])
def test_a_sequence_is_resumed_from_what_was_trained(half, tmp_path, monkeypatch, moment):
    args = arguments(half, tmp_path / "out", "dual-adamw", max_steps=4, task_list=(1, 2), save_every=2)
    whole = run(dataclasses.replace(args, output_dir=str(tmp_path / "whole")))
    steps = loop.take_step
    taken = iter(range(4 if moment == "before the second task" else 7))

    def stopping(*given):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return steps(*given)

    monkeypatch.setattr(loop, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(args)
    monkeypatch.undo()
    assert (tmp_path / "out" / FOLDER / "masters" / "model.safetensors").is_file()
    again = run(dataclasses.replace(args, resume="newest"))
    one, other = (state_of(result.tasks[1].model) for result in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    finished = run(dataclasses.replace(args, resume="newest"))  # nothing is begun anew for want of the masters
    assert all(torch.equal(one[name], weight) for name, weight in state_of(finished.tasks[1].model).items())


# ------------------------------------------------------------------------------------------------ read by other programs


def asked(question):
    return f"Question: {question}\nAnswer:"


@pytest.mark.launch
def test_plain_transformers_gives_the_losses_that_were_measured(written):
    """Row by row, with nothing of this package between."""
    model = AutoModelForCausalLM.from_pretrained(written / "model")
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    assert model.dtype == torch.bfloat16
    moved = 0.0
    for name in ("forget", "retain", "real_authors", "world_facts"):
        for row, before in zip(rows_of(written, name), rows_of(written, name, "eval_before"), strict=True):
            question = asked(row["question"])
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor([tokenizer(f"{question} {row['answer']}<|end|>")["input_ids"]])
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
            assert row["tokens"] == len(ids[0]) - start
            assert float(losses[start - 1 :].mean()) == pytest.approx(row["loss"], rel=2e-3), (name, row["question"])
            moved = max(moved, abs(before["loss"] / row["loss"] - 1))
    assert moved > 0.05, "the weights before would pass"


@pytest.mark.launch
def test_lm_eval_scores_options_as_they_were_measured(written, tmp_path):
    """The rows of a set as a multiple-choice task, whose options end as our texts do."""
    lm_eval = pytest.importorskip("lm_eval")
    facts = {row["question"]: [row["answer"], *row["perturbed_answer"]] for row in splits()["world_facts_perturbed"]}
    rows = rows_of(written, "world_facts")
    docs = [{"asked": asked(row["question"]), "options": [f"{one}<|end|>" for one in facts[row["question"]]]} for row in rows]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "facts.yaml").write_text(f"""
task: facts
dataset_path: json
dataset_kwargs:
  data_files: {{"train": "{tmp_path / "docs.json"}"}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{asked}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
""")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(written / "model")},
        tasks=["facts"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(written / "model")
    right = []
    for row, sample in zip(rows, sorted(found["samples"]["facts"], key=lambda one: one["doc_id"]), strict=True):
        losses = [row["loss"], *row["perturbed_losses"]]
        tokens = [len(tokenizer(f" {option}")["input_ids"]) for option in sample["doc"]["options"]]
        ours = [-loss * count for loss, count in zip(losses, tokens, strict=True)]
        # lm-eval adds them up in bfloat16, which has 8 bits
        assert [likelihood for likelihood, _ in sample["filtered_resps"]] == pytest.approx(ours, rel=5e-3)
        right.append(ours[0] == max(ours))
    assert found["results"]["facts"]["acc,none"] == sum(right) / len(right)
