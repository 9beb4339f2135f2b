"""Makes the folder that every input of the fuzzer changes a copy of: a model, rows, and what commands of ours have left."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dualoptim import EvalArgs, FinetuneArgs, SweepArgs, UnlearnArgs, run
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.models.checkpoint import step_of
from dualoptim.sweep import sweep

READS: dict[str, Any] = {"model": "model", "data": "data", "split": "forget01"}
MEASURES: dict[str, Any] = {"eval_rows": 2, "max_new_tokens": 3}
TRAINS: dict[str, Any] = {"max_steps": 3, "batch_size": 2}
UNLEARN: dict[str, Any] = READS | MEASURES | TRAINS | {
    "forget_losses": ("NPO+KL",), "learning_rates": (1e-3,), "retain_freq": 1, "save_every": 1, "keep_checkpoints": 3
}  # fmt: skip
EVAL: dict[str, Any] = READS | MEASURES
FINETUNE: dict[str, Any] = {"model": "model", "data": "data", "splits": ("retain90",)} | TRAINS
SWEEP: dict[str, Any] = UNLEARN | {"save_every": 0, "keep_checkpoints": 1, "max_steps": 1}
OWN_ROWS: dict[str, Any] = {
    "model": "model", "forget_file": ("forget.jsonl",), "retain_file": ("retain.jsonl",)
}  # fmt: skip

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")


def row(name: str, task: int | None = None, compared: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"question": f"Where is {name} from?", "answer": f"{name} is from Rome."}
    if compared:
        found |= {"paraphrased_answer": f"Rome is {name}'s.", "perturbed_answer": [f"{name} is from Oslo.", "From Nice."]}
        found |= {"paraphrased_question": f"Tell me: where is {name} from?"}
    return found if task is None else {"task_id": str(task), **found}


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


def tiny_llama(folder: Path) -> None:
    """A model of some three thousand parameters and a tokenizer of bytes, saved as ours are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for name in NAMES for text in row(name).values() if isinstance(text, str)], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    wrapped.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def make_home(home: Path) -> Path:
    """Fill a folder with everything that inputs change, and go back to where we were."""
    tiny_llama(home / "model")
    (home / "data").mkdir()
    for name, rows in {
        "forget01": [row(name, 1 + (place > 1), compared=False) for place, name in enumerate(NAMES[:4])],
        "forget01_perturbed": [row(name, 1 + (place > 1)) for place, name in enumerate(NAMES[:4])],
        "retain90": [row(name, compared=False) for name in NAMES[4:]],
        "retain_perturbed": [row(name) for name in NAMES[4:]],
        "real_authors_perturbed": [row("Ovid")],
        "world_facts_perturbed": [row("Tea")],
        "holdout01": [row("Ivo", compared=False), row("Jo", compared=False)],
    }.items():
        (home / "data" / f"{name}.json").write_text(lines(rows))
    (home / "forget.jsonl").write_text(lines([row(name) for name in NAMES[:3]]))
    (home / "retain.jsonl").write_text(lines([row(name) for name in NAMES[3:6]]))
    (home / "holdout.jsonl").write_text(lines([row(name, compared=False) for name in NAMES[6:]]))
    (home / "rows.csv").write_text("question,answer,task_id\n" + "".join(f"Who is {name}?,It is {name}.,1\n" for name in NAMES))
    (home / "rows.json").write_text(json.dumps([row(name) for name in NAMES]))
    (home / "text.txt").write_text("Ann is from Rome. Bo is from Rome.\n")
    (home / "idk.txt").write_text("I do not know.\nI cannot say.\n")
    before = Path.cwd()
    os.chdir(home)
    try:
        _use(home)
    finally:
        os.chdir(before)
    return home


def _use(home: Path) -> None:
    """Run the commands whose folders are changed: finished ones, and what they would be if they had been killed."""
    run(UnlearnArgs(**UNLEARN, output_dir="finished", task_list=(1, 2)))
    shutil.copytree("finished", "killed")
    task = home / "killed" / "NPO+KL_lr0.001" / "task2"
    for gone in ("model", "eval"):
        shutil.rmtree(task / gone)
    (task / "trained.json").unlink()
    newest = max((task / "checkpoint").iterdir(), key=step_of)
    shutil.rmtree(newest)
    log = task / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    for name in ("results.csv", "results.md"):
        (home / "killed" / name).unlink()

    evaluate(EvalArgs(**EVAL, output_dir="measured"))
    shutil.copytree("measured", "measuring")
    (home / "measuring" / "eval" / "summary.json").unlink()
    finetune(FinetuneArgs(**FINETUNE, output_dir="taught"))
    sweep(SweepArgs(**SWEEP, output_dir="swept"))
    ratios = {"0": 0.5, "1": 0.7}
    tofu = {"avg_paraphrased_loss": {"0": 1.0, "1": 2.0}, "average_perturb_loss": {"0": [1.5, 2.0], "1": [2.0, 2.5]}}
    (home / "tofu.json").write_text(json.dumps({"eval_log_forget.json": tofu}))
    by_index = {row: {"score": score} for row, score in ratios.items()}
    (home / "open.json").write_text(
        json.dumps({"forget_truth_ratio": {"value_by_index": by_index}, "mia_min_k": {"agg_value": 0.4}})
    )
    for name, values in {"unlearn": UNLEARN, "eval": EVAL, "finetune": FINETUNE, "sweep": SWEEP}.items():
        plain = {field: list(value) if isinstance(value, tuple) else value for field, value in values.items()}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(plain))
