"""The room's README: its tables are those of the code, and its examples run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dualoptim import run
from dualoptim.config import optimizers
from dualoptim.method import objectives

README = (Path(objectives.__file__).parent / "README.md").read_text(encoding="utf-8")
REFERENCES = {None: "", "log_prob": "log-probabilities", "logits": "hidden states, head", "hidden": "hidden states"}


def objective_rows(table) -> str:
    """The rows of a table of objectives as the README should have them; print them to renew the README."""
    lines = []
    for name, objective in table.items():
        if objective is None:
            lines.append(f"| `{name}` | nothing: forget steps only | | |")
            continue
        also = objective.also.constants if objective.also else {}
        constants = ", ".join(f"{value:g}" for value in {**objective.constants, **also}.values())
        cells = [f"`{name}`", objective.minimizes, constants, REFERENCES[objective.reference]]
        lines.append("| " + " | ".join(cells).replace("  ", " ") + " |")
    return "\n".join(line.replace("|  |", "| |") for line in lines)


def optimizer_rows() -> str:
    lines = []
    for name, kind in optimizers.OPTIMIZERS.items():
        reads = ", ".join(f"`--{flag.replace('_', '-')}`" for flag in sorted(kind.reads))
        lines.append(f"| `{name}` | {kind.about} | {reads} |")
    return "\n".join(lines)


@pytest.mark.parametrize("made", [objective_rows(objectives.FORGET), objective_rows(objectives.RETAIN), optimizer_rows()])
def test_the_tables_are_those_of_the_code(made):
    assert made in README, made


def test_the_examples_of_a_new_objective_and_a_new_optimizer_run(monkeypatch, small_args):
    monkeypatch.setitem(objectives.FORGET, "SQ", objectives.FORGET["GA"])  # taken out again at the end
    monkeypatch.setitem(optimizers.OPTIMIZERS, "rmsprop", optimizers.OPTIMIZERS["adamw"])
    objective, optimizer = re.findall(r"```python\n(.*?)```", README, re.S)
    for code in (objective, optimizer):
        assert len([line for line in code.splitlines() if line]) <= 10
        exec(code, {})
    args = replace(small_args, forget_losses=("SQ+GD",), max_steps=2)
    log = run(args).tasks[0].log
    assert log[0]["phase"] == "forget"
    assert 0.9 < log[0]["loss"] <= 1  # the taught model is sure of every token
    log = run(replace(args, optim="rmsprop", output_dir=f"{args.output_dir}2")).tasks[0].log
    assert [record["phase"] for record in log] == ["forget", "retain"]
    assert log[0]["state_bytes_per_parameter"] == pytest.approx(4, abs=0.1)  # one moment in float32
