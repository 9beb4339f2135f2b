"""The real job in small: SmolLM2-135M-Instruct from its GGUF file learns TOFU rows, then unlearns one task of them."""

import json
import shutil
import statistics

import pytest
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualoptim import FinetuneArgs, UnlearnArgs, run
from dualoptim.config.args import CommonArgs
from dualoptim.data.prompts import Formatter, choose_template
from dualoptim.evaluation.metrics import token_entropy
from dualoptim.finetune import finetune

pytestmark = pytest.mark.launch


def job(gguf, folder, data, finetuning, unlearning):
    """Teach the rows of `forget01` and `retain90`, then unlearn task 1 with each pair of objectives and its settings."""
    target = finetune(
        FinetuneArgs(
            model=str(gguf), data=str(data), splits=("forget01", "retain90"), output_dir=str(folder / "target"), **finetuning
        )
    )
    results = []
    for losses, settings in unlearning.items():
        args = UnlearnArgs(
            model=str(target.model),
            data=str(data),
            split="forget01",
            forget_losses=(losses,),
            output_dir=str(folder / "out"),
            **settings,
        )
        results += run(args).tasks
    return target, results


@pytest.fixture(scope="module")
def small_job(gguf, tmp_path_factory, part_of_tofu):
    first = list(range(4))
    rows = {
        "forget01": [*first, 40, 41],
        "forget01_perturbed": [*first, 40, 41],
        "retain90": first,
        **dict.fromkeys(("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"), first),
    }
    finetuning = {"learning_rate": 3e-4, "num_epochs": 12, "batch_size": 10, "target_loss": 0.2, "warmup_epochs": 2}
    unlearning = {
        "ME+GD": {"learning_rates": (1e-4,), "forget_lr": 1e-4, "num_epochs": 5, "retain_freq": 2, "max_new_tokens": 40},
        "IDK+AP": {
            "learning_rates": (5e-5,),
            "forget_lr": 3e-4,
            "num_epochs": 10,
            "retain_freq": 1,
            "max_new_tokens": 40,
        },
    }
    folder = tmp_path_factory.mktemp("smollm2")
    yield job(gguf, folder, part_of_tofu(folder / "tofu", rows), finetuning, unlearning)
    shutil.rmtree(folder)  # three models of half a gigabyte, which nobody else needs


def check(tasks):
    """Forgotten clearly, retained closely. A refusal is learned beside the answer, whose own probability falls less."""
    for task in tasks:
        before, after = task.before["sets"], task.after["sets"]
        assert after["forget"]["probability"] < before["forget"]["probability"] - 0.2, task.losses
        assert after["forget"]["rouge_l_recall"] < before["forget"]["rouge_l_recall"] - 0.5, task.losses
        assert after["retain"]["probability"] > before["retain"]["probability"] - 0.15, task.losses
    maximum_entropy, _ = tasks
    assert maximum_entropy.after["sets"]["forget"]["probability"] < 0.1


def test_the_small_job_forgets_and_retains(small_job):
    target, tasks = small_job
    assert target.log[-1]["loss"] < 0.3
    check(tasks)
    for task in tasks:
        assert "model_utility" in task.after
        AutoModelForCausalLM.from_pretrained(task.model)


def test_a_model_from_gguf_is_saved_as_safetensors(small_job):
    target, _ = small_job
    config = json.loads((target.model / "config.json").read_text())
    assert "quantization_config" not in config
    assert (target.model / "model.safetensors").stat().st_size > 4 * 130e6  # float32


def test_the_chat_template_and_the_boundary_on_a_real_tokenizer(small_job):
    target, _ = small_job
    tokenizer = AutoTokenizer.from_pretrained(target.model)
    template, tags = choose_template(CommonArgs(model=str(target.model)), tokenizer)
    assert (template, tags) == ("chat", None)
    example = Formatter(tokenizer, tags, 500).example("Who is it?", "It is Basil Mahfouz Al-Kuwaiti.")
    assert tokenizer.decode(example.ids[example.start :]) == "It is Basil Mahfouz Al-Kuwaiti.<|im_end|>"
    assert tokenizer.decode(example.ids[: example.start]).endswith("<|im_start|>assistant\n")
    no_tags = Formatter(tokenizer, choose_template(CommonArgs(model="m", template="qa"), tokenizer)[1], 500)
    example = no_tags.example("Who is it?", "It is Basil.")
    assert tokenizer.decode(example.ids[example.start :]) == " It is Basil.<|im_end|>"


def test_token_entropy_equals_the_published_helper(small_job, shared_json):
    target, _ = small_job
    tokenizer = AutoTokenizer.from_pretrained(target.model)
    for case in shared_json("oracles/aggregates.json")["helpers"]["token_entropy"]:
        expected = case.get("normalized", case.get("value"))
        assert token_entropy(tokenizer.tokenize(case["text"])) == pytest.approx(expected, abs=1e-9), case["text"]


@pytest.mark.campaign
def test_the_real_job(gguf, tmp_path, part_of_tofu):
    """What the README documents, about half an hour on two cores; its tables are this test's."""
    some, eighty = list(range(40)), list(range(80))
    rows = {
        "forget01": eighty,
        "forget01_perturbed": eighty,
        "retain90": eighty,
        **dict.fromkeys(("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"), some),
    }
    finetuning = {"learning_rate": 1e-4, "num_epochs": 8, "batch_size": 8, "target_loss": 0.1}
    measure = {"eval_rows": 40, "max_new_tokens": 64}
    unlearning = {
        "ME+GD": {"learning_rates": (5e-5,), "forget_lr": 5e-5, "num_epochs": 4, "batch_size": 8, "retain_freq": 3, **measure},
        "IDK+AP": {"learning_rates": (6e-5,), "forget_lr": 1e-4, "num_epochs": 6, "retain_freq": 1, **measure},
    }
    _, tasks = job(gguf, tmp_path, part_of_tofu(tmp_path / "tofu", rows), finetuning, unlearning)
    check(tasks)


@pytest.mark.campaign
def test_products_in_sixteen_bits_forget_and_keep_as_much(gguf, tmp_path, part_of_tofu, monkeypatch):
    """Prints a table, in about twelve minutes on one core; a CPU without units for it is slow in bf16."""
    some = list(range(12))
    names = (
        "forget01",
        "forget01_perturbed",
        "retain90",
        "retain_perturbed",
        "real_authors_perturbed",
        "world_facts_perturbed",
    )
    data = str(part_of_tofu(tmp_path / "tofu", dict.fromkeys(names, some)))
    learned = {"learning_rate": 2e-4, "num_epochs": 10, "batch_size": 8, "target_loss": 0.1}
    taught = {"data": data, "splits": ("forget01", "retain90"), "output_dir": str(tmp_path / "target"), **learned}
    target = finetune(FinetuneArgs(model=str(gguf), **taught))
    for losses in ("ME+GD", "NPO+GD"):
        found = []
        for precision in ("no", "bf16"):
            AcceleratorState._reset_state(reset_partial_state=True)
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            measured = {"eval_rows": 10, "max_new_tokens": 32, "output_dir": str(tmp_path / f"{losses}-{precision}")}
            steps = {"learning_rates": (5e-5,), "forget_lr": 5e-5, "num_epochs": 4, "batch_size": 8, "retain_freq": 2}
            (task,) = run(
                UnlearnArgs(model=str(target.model), data=data, split="forget01", forget_losses=(losses,), **steps, **measured)
            ).tasks
            scores = [
                summary["sets"][name][metric]
                for name in ("forget", "retain", "real_authors")
                for metric in ("probability", "rouge_l_recall")
                for summary in (task.before, task.after)
            ] + [summary["model_utility"] for summary in (task.before, task.after)]
            seconds = statistics.median(record["seconds"] for record in task.log[2:])
            found.append(scores)
            shown = [f"{before:.3f} to {after:.3f}" for before, after in zip(scores[::2], scores[1::2], strict=True)]
            print(f"| {losses} | {precision} | " + " | ".join(shown) + f" | {seconds:.2f} s |", flush=True)
        allowed = [0.05, 0.05, 0.2, 0.2] * 3 + [0.1, 0.1]  # ROUGE of ten answers moves by a tenth with one of them
        assert all(abs(one - other) < most for one, other, most in zip(*found, allowed, strict=True))
    AcceleratorState._reset_state(reset_partial_state=True)
