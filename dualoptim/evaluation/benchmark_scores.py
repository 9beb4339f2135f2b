"""Compute the scores of a benchmark from a summary, as its declaration says what they are made of.

A score is arithmetic on names and numbers: `1 - forget_task1_qa.exact_match` (set.metric), `privacy.mia_loss` (a membership
attack), `general.mmlu.acc` (a task of lm-eval and its metric), a score above it, with + - * / and abs, mean, harmonic_mean.
"""

import ast
import math
import operator
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from dualoptim.data.declaration import Declaration, ScoreOf
from dualoptim.errors import InputError
from dualoptim.evaluation.comparisons import COMPARISONS
from dualoptim.evaluation.metrics import MEMBERSHIP, METRICS
from dualoptim.evaluation.summary import BenchmarkScores, Summary

_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

_FUNCTIONS: dict[str, Callable[..., float]] = {
    "abs": abs,
    "mean": lambda *values: statistics.fmean(values),
    "harmonic_mean": lambda *values: float(statistics.harmonic_mean(values)),
}

Values = Mapping[str, float]
"""What was measured by the names that formulas have for it."""


def benchmark_scores(declared: Declaration, summary: Summary) -> tuple[BenchmarkScores, dict[str, str]]:
    """Compute all scores of a benchmark, and say why those that are missing are."""
    known = measured(summary)
    scores: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, score in declared.scores.items():
        if score.instead_of in scores:
            continue
        try:
            scores[name] = value_of(score.of, known | scores)
        except KeyError as error:
            missing[f"{declared.name}.{name}"] = _reason(error.args[0])
        except (ZeroDivisionError, statistics.StatisticsError, ValueError) as error:
            missing[f"{declared.name}.{name}"] = f"cannot be computed ({error})"
    shown = {name: declared.scores[name] for name in scores}
    return BenchmarkScores(
        name=declared.name,
        scores=scores,
        titles={name: score.title or name.replace("_", " ") for name, score in shown.items()},
        should={name: score.should for name, score in shown.items()},
        published=declared.published.results,
        source=declared.published.source or declared.source,
    ), missing


def measured(summary: Summary) -> dict[str, float]:
    """Name everything that a summary has measured as formulas do."""
    found = {f"{name}.{metric}": value for name, scores in summary.sets.items() for metric, value in scores.items()}
    found |= {f"privacy.{name}": value for name, value in summary.privacy.items()}
    general = (summary.general or {}).items()
    return found | {f"general.{task}.{metric}": value for task, scores in general for metric, value in scores.items()}


def value_of(formula: str, known: Values) -> float:
    """Compute a formula.

    Raises:
        KeyError: with a name that is not known.
        ValueError: if it is no formula, or has no finite value.
    """
    value = _value(_parsed(formula), known)
    if not math.isfinite(value):
        raise ValueError("it is not finite")
    return value


def check_scores(declared: Declaration) -> None:
    """Make sure that every formula can be read, and names what the benchmark can measure.

    Raises:
        InputError: naming the score and the name, or a metric that there is not.
    """
    where = f"--benchmark {declared.name}"
    for name, entry in declared.rows.items():
        for metric in entry.metrics:
            if metric not in COMPARISONS:
                raise InputError(f"{where}: rows.{name}.metrics has {metric!r}; take {', '.join(COMPARISONS)}")
    above: dict[str, ScoreOf] = {}
    for name, score in declared.scores.items():
        try:
            tree = _parsed(score.of)
            names = _names(tree)
            _value(tree, dict.fromkeys(names, 0.5))
        except (ValueError, ZeroDivisionError, statistics.StatisticsError) as error:
            raise InputError(
                f"{where}: scores.{name}.of is {score.of[:60]!r} ({error}); write as data/README.md does"
            ) from None
        for one in names:
            if one not in above and not _can_be_measured(one, declared):
                sets = ", ".join(declared.sets())
                raise InputError(f"{where}: scores.{name} has {one!r}; take a score above it, or SET.METRIC of {sets}")
        if score.instead_of and score.instead_of not in above:
            raise InputError(f"{where}: scores.{name}.instead_of is {score.instead_of!r}; name a score above it")
        above[name] = score


def _can_be_measured(name: str, declared: Declaration) -> bool:
    block, _, metric = name.partition(".")
    if block == "privacy":
        return metric in MEMBERSHIP or metric == "privleak"
    return (block == "general" and bool(metric)) or (block in declared.sets() and metric in METRICS)


def _reason(name: str) -> str:
    """Say what would give a name that has no value."""
    block, _, rest = name.partition(".")
    if block == "general":
        return f"needs {rest.partition('.')[0]}; give --lm-eval-tasks {rest.partition('.')[0]}"
    return f"needs {name}, which was not measured"


def _parsed(formula: str) -> ast.expr:
    try:
        return ast.parse(formula.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it cannot be read") from None


def _names(tree: ast.expr) -> list[str]:
    """List the names in a formula, without those of functions."""
    if isinstance(tree, (ast.Name, ast.Attribute)):
        return [ast.unparse(tree)]
    parts = (
        tree.args if isinstance(tree, ast.Call) else [one for one in ast.iter_child_nodes(tree) if isinstance(one, ast.expr)]
    )
    return [name for part in parts for name in _names(part)]


def _value(tree: Any, known: Values) -> float:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, (int, float)):
        return float(tree.value)
    if isinstance(tree, (ast.Name, ast.Attribute)):
        return known[ast.unparse(tree)]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, known)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        return _OPERATORS[type(tree.op)](_value(tree.left, known), _value(tree.right, known))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS and not tree.keywords:
        try:
            return _FUNCTIONS[tree.func.id](*(_value(one, known) for one in tree.args))
        except TypeError:
            raise ValueError(f"{tree.func.id} takes other numbers") from None
    raise ValueError(f"{ast.unparse(tree)} is none of + - * / {' '.join(_FUNCTIONS)}")
