"""The report: what it finds in the folders of runs, what it says, and that a page needs nothing but itself."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from dualoptim import InputError
from dualoptim.report import ReportArgs, find_states, report

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "model": "org/base",
    "data": "demo",
    "split": "forget05",
    "forget_losses": ["ME+GD"],
    "optim": "dual-adamw",
    "learning_rates": [0.0005],
    "forget_freq": 1,
    "retain_freq": 5,
    "task_list": [1],
    "use_lora": False,
    "environment": {"git_commit": "0123abc", "versions": {"torch": "2.6.0"}},
}


def summary(forget, retain, utility, efficacy, **more):
    """A `summary.json` with these probabilities."""
    return {
        "sets": {
            "forget": {"probability": forget, "rouge_l_recall": forget, "truth_ratio": 1 - forget},
            "retain": {"probability": retain, "rouge_l_recall": retain},
        },
        "rows": {"forget": 2, "retain": 2},
        "model_utility": utility,
        "untargeted_forget_efficacy": efficacy,
        "skipped": {"cosine_similarity": "needs a sentence encoder", "entailment_score": "needs a sentence encoder"},
        **more,
    }


BEFORE = summary(0.987, 0.976, 0.654, 0.123)
AFTER = summary(
    0.012,
    0.965,
    0.643,
    0.901,
    targeted_forget_efficacy=0.789,
    tofu={"model_utility": 0.632, "forget_truth_ratio": 0.711, "forget_quality": 0.054},
    privacy={"mia_loss": 0.487, "mia_min_k_plus_plus": 0.512, "privleak": -3.21},
    retain_only={**summary(0.101, 0.954, 0.621, 0.876, privacy={"mia_loss": 0.499}), "from": "runs/retain/model"},
    attacks={
        "relearn": {
            "what": "fine-tuned on half of the forget set",
            "rows": 10,
            "curve": [{"step": s, "sets": {"forget": {"probability": p}}} for s, p in ((0, 0.012), (5, 0.234), (10, 0.456))],
            "retain_only": [{"step": s, "sets": {"forget": {"probability": p}}} for s, p in ((0, 0.101), (10, 0.345))],
        },
        "quantize": {
            "8": {
                "how": "round to nearest, per row",
                "sets": {"forget": {"probability": 0.013}, "retain": {"probability": 0.9}},
            },
            "4": {
                "how": "NF4 in blocks of 64",
                "sets": {"forget": {"probability": 0.314, "rouge_l_recall": 0.271}, "retain": {"probability": 0.812}},
                "came_back": {"probability": 0.302, "rouge_l_recall": 0.259},
            },
        },
        "paraphrase": {
            "sets": {"forget": {"probability": 0.021, "rouge_l_recall": 0.032}},
            "came_back": {"probability": 0.009},
        },
        "sample": {
            "samples": 8,
            "temperature": 1.0,
            "sets": {"forget": {"best_rouge_l_recall": 0.222}},
            "came_back": {"rouge_l_recall": 0.21},
        },
    },
    general={"arc": {"acc": 0.333}},
)
EVIL = "<script>alert('x')</script> | a `tick` & *stars*"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if isinstance(value, list) else json.dumps(value))


def log(joint=False):
    """Twelve steps of a cycle of one forget and two retain steps, or of both losses together."""
    records = []
    for step in range(1, 13):
        phase = "joint" if joint else "retain" if step % 3 else "forget"
        record = {"step": step, "phase": phase, "loss": 2.0 / step, "lr": 1e-4, "grad_norm": 1.0 + step, "seconds": 0.25}
        records.append(record | ({"forget_loss": 3.0 - step / 10, "retain_loss": 0.1 * step} if joint else {}))
    return records


def write_task(folder, before=BEFORE, after=AFTER, joint=False, **settings):
    """A task folder as train_unlearn.py leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}, sort_keys=False))
    write(folder / "log.jsonl", log(joint))
    for part, scores in (("eval_before", before), ("eval", after)):
        if scores:
            write(folder / part / "summary.json", scores)
            for name in scores["sets"]:
                rows = [
                    {"question": f"Who is {name} {n}?", "answer": f"{name} truth {n}", "generated": f"{part} says {n}"}
                    for n in range(2)
                ]
                write(folder / part / f"{name}.jsonl", rows)
    return folder
