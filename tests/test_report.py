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
from dualoptim.reporting import plots
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
    "weight_decay": 0.0,
    "max_steps": 0,
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


@pytest.fixture
def run(tmp_path):
    """The output folder of one run of one task, with everything that a summary can hold."""
    write_task(tmp_path / "runs" / "one" / "ME+GD_lr0.0005" / "task1")
    (tmp_path / "runs" / "one" / "demo_model").mkdir()
    return tmp_path / "runs" / "one"


def made(*runs, **options):
    folder = report(ReportArgs(tuple(map(str, runs)), **options))
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def lines_of(markdown):
    return [" ".join(line.split()) for line in markdown.splitlines()]


class Page(HTMLParser):
    """What a browser would see: every element with its attributes, the rows of its tables, and its text."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.rows, self.text, self.open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# ---------------------------------------------------------------------------------------------------------- what it says


SCORES = [
    ["model utility", "0.654", "0.643", "0.621", "stay"],
    ["forget efficacy, untargeted", "0.123", "0.901", "0.876", "rise"],
    ["forget efficacy, targeted (refusals)", "-", "0.789", "-", "rise"],
    ["TOFU forget quality (p-value against retain-only)", "-", "0.054", "-", "rise"],
    ["arc: acc", "-", "0.333", "-", "stay"],
    ["membership by loss (AUC)", "-", "0.487", "0.499", "like retain-only"],
    ["PrivLeak, in percent", "-", "-3.210", "-", "0"],
    ["forget set", "probability of the true answer", "0.987", "0.012", "0.101", "fall"],
    ["forget set", "truth ratio", "0.013", "0.988", "0.899", "rise"],
    ["retain set", "ROUGE-L recall of its own answer", "0.976", "0.965", "0.954", "stay"],
    ["before unlearning", "0.987", "", "0.987", "", "0.976"],
    ["relearned (10 steps)", "0.456", "+0.444", "-", "-", "-"],
    ["relearned (10 steps), rows not taught", "0.228", "+0.222", "-", "-", "-"],
    ["retain-only, taught the same (10 steps)", "0.345", "", "-", "", "-"],
    ["weights in 8 bits", "0.013", "+0.001", "-", "-", "0.900"],
    ["weights in 4 bits", "0.314", "+0.302", "0.271", "+0.259", "0.812"],
    ["asked in other words", "0.021", "+0.009", "0.032", "+0.020", "-"],
    ["best of 8 samples", "-", "-", "0.222", "+0.210", "-"],
    ["cosine_similarity, entailment_score", "needs a sentence encoder"],
]


def test_a_run_is_told_the_same_on_both_pages(run):
    markdown, html = made(run)
    page, lines = Page(html), lines_of(markdown)
    for row in SCORES:
        cells = [{"rise": "↑ rise", "fall": "↓ fall"}.get(cell, cell) for cell in row]
        assert cells in page.rows
        assert " ".join(f"| {' | '.join(row)} |".replace("_", "\\_").split()) in lines
    headline = (
        "Task 1 unlearned with ME+GD in 12 optimizer steps (3 s). Probability of the forget set's true answers 0.987 → 0.012"
    )
    assert headline in page.text
    assert headline in markdown
    for text in (
        "Who is forget 0?",
        "eval_before says 1",
        "eval says 1",
        "retain truth 0",
        "Relearned on: 4 of the 20 forget rows, drawn once.",
        "4 bits: NF4 in blocks of 64.",
        "The retain-only model is runs/retain/model.",
    ):
        assert text in page.text
        assert text.replace("_", "\\_") in markdown
    assert "| optim | dual-adamw |" in lines
    assert "| weight decay | 0 |" in lines
    assert not [line for line in lines if line.startswith(("| max steps", "| use lora"))]  # off
    assert "git_commit: 0123abc" in page.text


def test_the_plots_are_files_and_a_part_of_the_page_in_both_themes(run):
    markdown, html = made(run)
    plots = re.findall(r"!\[(.+)\]\((report/.+\.png)\)", markdown)
    names = ("losses", "gradients", "utility", "task", "relearn", "attacks")
    assert [path for _, path in plots] == [f"report/ME+GD_lr0.0005-task1-{name}.png" for name in names]
    for _, path in plots:
        assert (run / path).read_bytes().startswith(b"\x89PNG")
    page = Page(html)
    images, sources = page.all("img"), page.all("source")
    assert [image["alt"].replace("_", "\\_") for image in images] == [says for says, _ in plots]
    for image, source in zip(images, sources, strict=True):
        assert source["media"] == "(prefers-color-scheme: dark)"
        light, dark = (base64.b64decode(text.partition(",")[2]) for text in (image["src"], source["srcset"]))
        assert b"<svg" in light
        assert b"<svg" in dark
        assert b"#1c1e21" in light
        assert b"#1c1e21" not in dark
        assert b"#ffffff" not in dark  # no white ground behind a plot on a dark page


def test_a_page_needs_nothing_but_itself(run):
    _, html = made(run)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name, "data:")
            assert value.startswith("data:" if tag != "a" else "#"), (tag, value)
    assert "url(" not in html.split("<style>")[1].split("</style>")[0]


def test_the_same_results_give_the_same_bytes(run, tmp_path):
    def all_bytes(folder):
        made(run, output_dir=str(folder))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first, second = all_bytes(tmp_path / "a"), all_bytes(tmp_path / "b")
    assert len(first) == 8
    assert first == second


def test_text_of_models_is_text(run):
    rows = [{"question": EVIL, "answer": EVIL, "generated": EVIL}]
    write(run / "ME+GD_lr0.0005" / "task1" / "eval" / "forget.jsonl", rows)
    markdown, html = made(run)
    assert EVIL in Page(html).text
    assert not Page(html).all("script")
    assert "<script>alert" not in markdown.replace("\\<", "")
    assert "- after: \\<script\\>alert('x')\\</script\\> \\| a \\`tick\\` \\& \\*stars\\*" in markdown


def test_joint_steps_have_both_losses(tmp_path):
    task = write_task(tmp_path / "out" / "ME+GD_lr0.0005" / "task1", joint=True, optim="adamw")
    (state,) = find_states(tmp_path / "out")
    from matplotlib.figure import Figure

    from dualoptim.reporting import plots

    figure = Figure()
    plots.losses(state.log)(figure)
    curves = {axes.get_title(loc="center"): axes.lines[0].get_xydata().tolist() for axes in figure.axes}
    assert curves["forget loss"] == [[step, 3.0 - step / 10] for step in range(1, 13)]
    assert curves["retain loss"] == [[step, 0.1 * step] for step in range(1, 13)]
    markdown, _ = made(task)
    assert "| retain freq" not in markdown  # has no effect there


def test_what_is_missing_is_said(tmp_path):
    write_task(tmp_path / "out" / "GA+none_lr1e-05" / "task1", before=None, after=None)
    markdown, html = made(tmp_path / "out")
    assert "| every score after | there is no evaluation (--no-eval, or the run was interrupted) |" in lines_of(markdown)
    assert "Task 1 unlearned with ME+GD in 12 optimizer steps" in Page(html).text
    assert "## Scores" not in markdown
    assert markdown.count("![") == 2  # losses and gradient norms


# ---------------------------------------------------------------------------------------------------- what it is given


def test_tasks_are_told_in_the_order_in_which_they_were_unlearned(tmp_path):
    again = {**AFTER, "sets": {**AFTER["sets"], "forget_task10": {"probability": 0.077}}}
    for task, after in ((2, again), (10, AFTER)):
        write_task(tmp_path / "out" / "ME+GD_lr0.0005" / f"task{task}", after=after, task_list=[10, 2])
    assert [state.task for state in find_states(tmp_path / "out")] == [10, 2]
    markdown, html = made(tmp_path / "out")
    assert ["10", "0.012", "-", "0.012", "0.965", "0.643", "0.901"] in Page(html).rows
    assert ["2", "0.077", "0.012", "0.044", "0.965", "0.643", "0.901"] in Page(html).rows
    assert "report/ME+GD_lr0.0005-tasks.png" in markdown
    assert ["task 10, unlearned before", "probability of the true answer", "-", "0.077", "-", "stay forgotten"] in Page(
        html
    ).rows


def test_runs_are_compared(run, tmp_path):
    write_task(tmp_path / "runs" / "two" / "NPO+GD_lr1e-05" / "task1", after=BEFORE, forget_losses=["NPO+GD"], beta=0.1)
    write(tmp_path / "runs" / "three" / "eval" / "summary.json", AFTER)
    markdown, html = made(run, tmp_path / "runs" / "two", tmp_path / "runs" / "three", output_dir=str(tmp_path / "both"))
    rows = Page(html).rows
    assert ["1", "one/ME+GD_lr0.0005/task1", "0.012", "0.012", "0.965", "0.965", "0.643", "0.901", "0.054"] in rows
    assert ["2", "two/NPO+GD_lr1e-05/task1", "0.987", "0.987", "0.976", "0.976", "0.654", "0.123", "-"] in rows
    assert ["3", "three", "0.012", "0.012", "0.965", "0.965", "0.643", "0.901", "0.054"] in rows
    assert ["", "result", "forget losses", "beta"] in rows
    assert ["2", "two/NPO+GD_lr1e-05/task1", "NPO+GD", "0.1"] in rows
    assert (tmp_path / "both" / "report" / "comparison-utility.png").is_file()
    assert lines_of(markdown)[0] == "# Unlearning report: one, two, three"
    assert not (run / "report.md").exists()


def test_a_task_folder_a_sweep_and_an_evaluation_are_runs(run, tmp_path):
    (alone,) = find_states(run / "ME+GD_lr0.0005" / "task1")
    assert (alone.label, alone.task) == ("ME+GD_lr0.0005/task1", 1)
    for seed in (1, 2):
        write_task(tmp_path / "sweep" / f"a_seed{seed}" / "ME+GD_lr0.0005" / "task1", seed=seed)
    assert [s.label for s in find_states(tmp_path / "sweep")] == [f"a_seed{n}/ME+GD_lr0.0005/task1" for n in (1, 2)]
    write(tmp_path / "evaluated" / "eval" / "summary.json", AFTER)
    (tmp_path / "evaluated" / "eval" / "config.yaml").write_text("model: org/other\n")
    markdown, html = made(tmp_path / "evaluated")
    assert ["model utility", "0.643", "0.621", "stay"] in Page(html).rows
    assert ["score", "score", "retain-only", "should"] in Page(html).rows
    assert "| model | org/other |" in lines_of(markdown)


def test_a_tiny_p_value_keeps_its_size_and_an_attack_needs_no_before(tmp_path):
    write(tmp_path / "e" / "eval" / "summary.json", {**AFTER, "tofu": {"forget_quality": 1.23e-11}})
    rows = Page(made(tmp_path / "e")[1]).rows
    assert ["TOFU forget quality (p-value against retain-only)", "1e-11", "-", "↑ rise"] in rows
    assert ["without an attack", "0.012", "", "0.012", "", "0.965"] in rows


def test_very_many_results_are_compared_alone(tmp_path):
    for seed in range(21):
        write_task(tmp_path / "sweep" / f"a_seed{seed}" / "ME+GD_lr0.0005" / "task1", seed=seed)
    markdown, html = made(tmp_path / "sweep")
    assert ["21", "a_seed20/ME+GD_lr0.0005/task1", "20"] in Page(html).rows
    assert "21 results are too many for a part about each" in markdown
    assert len(Page(html).all("img")) == 1


def test_the_demo_from_the_command_line(demo_run, tmp_path):
    command = [sys.executable, "-m", "dualoptim.report", str(demo_run.folder), "--output-dir", str(tmp_path), "--examples", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr
    (task,) = demo_run.tasks
    row = json.loads((task.folder / "eval" / "forget.jsonl").read_text().splitlines()[0])
    page = Page((tmp_path / "report.html").read_text())
    assert row["question"] in page.text
    assert len([text for text in page.all("div") if text.get("class") == "example"]) == 4
    assert f"{task.before['model_utility']:.3f} → {task.after['model_utility']:.3f}" in page.text


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("log.jsonl", '{"step": 1}\n{"st', "log.jsonl:2: not JSON"),
        ("log.jsonl", "[1]\n", "log.jsonl:1: not a JSON object"),
        ("eval/summary.json", "", "summary.json: not JSON"),
        ("eval/forget.jsonl", "{}}\n", "forget.jsonl:1: not JSON"),
        ("config.yaml", "a: [", "config.yaml: not YAML"),
        ("config.yaml", "text", "config.yaml: holds no `name: value` lines"),
    ],
)
def test_a_broken_file_is_named(file, text, message, run):
    (run / "ME+GD_lr0.0005" / "task1" / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        made(run)
    assert not (run / "report.md").exists()


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--output-dir: .*file.* cannot be written"):
        made(run, output_dir=str(tmp_path / "file"))


def test_a_joint_run_with_nothing_to_retain_has_a_forget_loss():
    log = [{"step": n, "phase": "joint", "loss": 1.0 / n, "grad_norm": 1.0} for n in (1, 2)]
    assert plots._points(log, "forget") == [(1, 1.0), (2, 0.5)]
    assert plots._points(log, "retain") == []
    plots.render(plots.losses(log))
