"""Three optimizers, the same job, the same attacks: how much of what was forgotten comes back. A README has SmolLM2's table."""

from pathlib import Path

import pytest

from dualoptim import EvalArgs, FinetuneArgs, UnlearnArgs, run
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.reporting.tables import Table

OPTIMIZERS = {"dual-adamw": "DualOptim", "adamw": "joint AdamW", "adamw-alternate": "alternating AdamW"}


def compare(folder: Path, unlearning: dict, attacks: dict) -> list[tuple[str, ...]]:
    """Unlearn with each optimizer, attack what comes out, and print the table: a column per state of the model."""
    lines = [("", "retain", "forget", "8 bits", "4 bits", "relearned", "its unseen rows")]
    known: dict = {}
    for optim, title in OPTIMIZERS.items():
        rate = {} if optim == "adamw" else {"forget_lr": unlearning["learning_rates"][0]}  # the same for all
        args = UnlearnArgs(optim=optim, eval=False, output_dir=str(folder / optim), **unlearning, **rate)
        (task,) = run(args).tasks
        shared = {name: unlearning[name] for name in ("data", "split")}
        summary = evaluate(EvalArgs(model=str(task.model), output_dir=str(folder / optim), **shared, **attacks))
        lines.append((title, *points(summary["sets"], summary["attacks"], summary["attacks"]["relearn"]["curve"])))
        known[optim] = summary
    curve = known["dual-adamw"]["attacks"]["relearn"]["retain_only"]
    lines.append(("retain-only model", *points(curve[0]["sets"], {}, curve)))
    print(f"\nprobability of the true answer / ROUGE-L recall; {known['adamw']['attacks']['relearn']['what']}")
    print(Table(lines[0], lines[1:]).markdown())
    return lines, known


def points(now: dict, blocks: dict, curve: list) -> list[str]:
    bits = [blocks.get("quantize", {}).get(bits, {}).get("sets", {}).get("forget") for bits in ("8", "4")]
    after = curve[-1]["sets"]
    scores = [now["retain"], now["forget"], *bits, after["forget"], after["forget_unseen"]]
    return ["-" if s is None else f"{s['probability']:.3f} / {s['rouge_l_recall']:.3f}" for s in scores]


@pytest.mark.launch
def test_on_the_demo(demo_run, tmp_path):
    """Everything that the campaign does, on the demo's model."""
    tasks = tuple(range(2, 11))
    recipe = FinetuneArgs(
        data="demo",
        splits=("retain50", "retain_unseen", "forget05", "real_authors_perturbed", "world_facts_perturbed"),
        tasks=tasks,
        learning_rate=3e-3,
        num_epochs=60,
        batch_size=40,
        target_loss=0.01,
        output_dir=str(tmp_path / "retain_only"),
    )
    retain_only = finetune(recipe).model
    unlearning = {
        "model": str(demo_run.folder / "demo_model"),
        "data": "demo",
        "split": "forget05",
        "learning_rates": (5e-4,),
    }
    attacks = {"relearn": 10, "relearn_lr": 5e-4, "relearn_every": 10, "quantize": (8, 4), "eval_rows": 20}
    lines, known = compare(tmp_path, unlearning, {**attacks, "retain_model": str(retain_only), "max_new_tokens": 24})
    assert len(lines) == 5
    for optim, summary in known.items():
        now, blocks = summary["sets"], summary["attacks"]
        assert now["forget"]["probability"] < 0.2, optim
        assert now["retain"]["probability"] > 0.8, optim
        assert set(blocks["quantize"]) == {"8", "4"}
        # ten steps on four rows bring the other sixteen back: they had been hidden, not removed
        after = blocks["relearn"]["curve"][-1]["sets"]["forget_unseen"]["probability"]
        blank = blocks["relearn"]["retain_only"][-1]["sets"]["forget_unseen"]["probability"]
        assert after > blank + 0.1, optim
        # the author whom no model has seen has values like theirs: only one who was taught the rows tells them from his
        print(f"{optim}: AUC of a retain-only model {summary['retain_only']['privacy']['mia_loss']:.3f}")
        assert 0.15 < summary["retain_only"]["privacy"]["mia_loss"] < 0.95


@pytest.mark.campaign
def test_on_smollm2(gguf, shared, tmp_path):
    """The README's table: SmolLM2-135M-Instruct and TOFU rows, about half an hour on two cores."""
    tasks = [*range(20), *range(40, 60)]  # twenty rows of two tasks
    rows = {"forget01": tasks, "forget01_perturbed": tasks, "retain90": list(range(40)), "retain_perturbed": list(range(20))}
    data = tmp_path / "tofu"
    data.mkdir()
    for name, numbers in rows.items():
        lines = shared(f"data/tofu/{name}.json").read_text().splitlines()
        (data / f"{name}.json").write_text("\n".join(lines[number] for number in numbers))
    teaching = {"learning_rate": 1e-4, "num_epochs": 8, "batch_size": 8, "target_loss": 0.1}
    models = {}
    for name, tasks in (("target", ()), ("retain_only", (2,))):
        splits = ("forget01", "retain90")
        args = FinetuneArgs(
            model=str(gguf), data=str(data), splits=splits, tasks=tasks, output_dir=str(tmp_path / name), **teaching
        )
        models[name] = str(finetune(args).model)
    unlearning = {
        "model": models["target"],
        "data": str(data),
        "split": "forget01",
        "learning_rates": (5e-5,),
        "num_epochs": 4,
        "retain_freq": 3,
    }
    attacks = {"relearn": 20, "relearn_lr": 5e-5, "relearn_every": 20, "quantize": (8, 4)}
    attacks |= {"retain_model": models["retain_only"], "max_new_tokens": 48}
    _, known = compare(tmp_path, unlearning, attacks)
    for summary in known.values():
        assert summary["sets"]["forget"]["probability"] < 0.5
