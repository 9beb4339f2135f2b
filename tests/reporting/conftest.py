"""A run with everything that a summary can hold, as its folder would have it, and a reader of the report about it."""

import json
from html.parser import HTMLParser

import pytest
import yaml

from dualoptim.report import ReportArgs, report

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
    "weight_decay": 0.0,
    "max_steps": 0,
    "environment": {"git_commit": "0123abc", "versions": {"torch": "2.6.0", "tokenizers": "0.21.1"}},
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
            "what": "4 of the 20 forget rows, drawn once",
            "rows": 10,
            "curve": [
                {"step": s, "sets": {"forget": {"probability": p}, "forget_unseen": {"probability": p / 2}}}
                for s, p in ((0, 0.012), (5, 0.234), (10, 0.456))
            ],
            "came_back": {"probability": 0.444},
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


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if isinstance(value, list) else json.dumps(value))


def _log(joint=False):
    """Twelve steps of a cycle of one forget and two retain steps, or of both losses together."""
    records = []
    for step in range(1, 13):
        phase = "joint" if joint else "retain" if step % 3 else "forget"
        record = {"step": step, "phase": phase, "loss": 2.0 / step, "lr": 1e-4, "grad_norm": 1.0 + step, "seconds": 0.25}
        records.append(record | ({"forget_loss": 3.0 - step / 10, "retain_loss": 0.1 * step} if joint else {}))
    return records


def _write_task(folder, before=BEFORE, after=AFTER, joint=False, **settings):
    """A task folder as train_unlearn.py leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **settings}, sort_keys=False))
    _write(folder / "log.jsonl", _log(joint))
    for part, scores in (("eval_before", before), ("eval", after)):
        if scores:
            _write(folder / part / "summary.json", scores)
            for name in scores["sets"]:
                rows = [
                    {"question": f"Who is {name} {n}?", "answer": f"{name} truth {n}", "generated": f"{part} says {n}"}
                    for n in range(2)
                ]
                _write(folder / part / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def before():
    """The `summary.json` of the run before unlearning."""
    return BEFORE


@pytest.fixture
def after():
    """The `summary.json` of the run after unlearning, with every part that there can be."""
    return AFTER


@pytest.fixture
def write_json():
    """Write one value, or a list as lines."""
    return _write


@pytest.fixture
def write_task():
    """Write a task folder: `write_task(folder, before, after, joint, **settings)`."""
    return _write_task


@pytest.fixture
def log():
    """The records of twelve steps, of one phase each; `log(joint=True)`: of both."""
    return _log


@pytest.fixture
def run(tmp_path):
    """The output folder of one run of one task, with everything that a summary can hold."""
    _write_task(tmp_path / "runs" / "one" / "ME+GD_lr0.0005" / "task1")
    (tmp_path / "runs" / "one" / "demo_model").mkdir()
    return tmp_path / "runs" / "one"


@pytest.fixture
def made():
    """Report on runs: the text of report.md and of report.html."""

    def make(*runs, **options):
        folder = report(ReportArgs(tuple(map(str, runs)), **options))
        return (folder / "report.md").read_text(), (folder / "report.html").read_text()

    return make


@pytest.fixture
def lines_of():
    """The lines of a text with single spaces."""
    return lambda text: [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def read_page():
    """Read a page as a browser would."""
    return Page


class Page(HTMLParser):
    """What a browser would see: every element with its attributes, the rows of its tables, and its text."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.rows, self.text, self.open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
