"""The room's README: its table of metrics is that of the code, and its example runs."""

import re
from pathlib import Path

from dualoptim.evaluation import metrics
from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summarize import set_scores
from dualoptim.evaluation.summary import Attacks, Summary

README = (Path(metrics.__file__).parent / "README.md").read_text(encoding="utf-8")


def metric_table() -> str:
    """The table of metrics as the README should have it; print it to renew the README."""
    lines = ["| metric | what it says | forget set | enters | needs |", "|---|---|---|---|---|"]
    for name in metrics.in_tables():
        metric = metrics.METRICS[name]
        enters = ", ".join(f"`{aggregate}`" for aggregate in metric.aggregates)
        needs = ", ".join(f"`{flag}`" for flag in re.findall(r"--[\w-]+", metric.needs))
        lines.append(f"| `{name}` | {metric.says} | {metric.forget} | {enters} | {needs} |")
    return "\n".join(lines)


def test_the_table_of_metrics_is_that_of_the_code():
    assert metric_table() in README, metric_table()


def test_every_aggregate_and_attack_is_defined():
    for name in (*metrics.AGGREGATES, *metrics.MEMBERSHIP, *vars(Attacks()), *vars(Summary())):
        assert f"`{name}`" in README, name
    for name in vars(Record(None, "")):
        assert f"`{name}`" in README, name


def test_the_example_of_a_new_metric_runs(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    monkeypatch.setattr("dualoptim.evaluation.summarize.METRICS", metrics.METRICS)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 10
    exec(code, {})
    records = [Record("Who?", "I.", generated="I."), Record("Who?", "I.", generated="You.")]
    assert set_scores("forget", records, {}) == {"same_answer": 0.5}
    assert metrics.in_tables()[-1] == "same_answer"
