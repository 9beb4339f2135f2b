"""Compute the scores of a benchmark from a summary, as its declaration says what they are made of.

A score is arithmetic on names and numbers: `1 - forget_task1_qa.exact_match` (set.metric), `privacy.mia_loss` (a membership
attack), `general.mmlu.acc` (a task of lm-eval and its metric), a score above it, with + - * / and abs, mean, harmonic_mean.
"""

import ast
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from dualoptim.data.benchmark import Benchmark
from dualoptim.data.declaration import Declaration, ScoreOf
from dualoptim.data.own import Source
from dualoptim.errors import InputError
from dualoptim.evaluation.comparisons import COMPARISONS, OF_BENCHMARKS
from dualoptim.evaluation.metrics import MEMBERSHIP, METRICS, in_tables
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
        should={name: score.should or _direction(score.of, declared) for name, score in shown.items()},
        forgets=[name for name in summary.sets if declared.forgets(name)],
        keeps=[name for name in declared.kept() if name in summary.sets],
        published=declared.published.results,
        source=declared.published.source or declared.source,
    ), missing


def _direction(formula: str, declared: Declaration) -> str:
    """Say where a score should go of which that is not said: a bare SET.METRIC as it should there, anything else up."""
    block, _, metric = formula.strip().partition(".")
    if not block.isidentifier() or metric not in METRICS:
        return "rise"
    if declared.forgets(block):
        return METRICS[metric].forget
    return "not rise" if OF_BENCHMARKS.get(metric, ("", ""))[1] == "rise" else "stay"  # of a loss more is worse


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


def check_benchmark(source: Source) -> str:
    """Make sure that the scores of a benchmark can be computed of the rows that were read, and say what lacks a set.

    Raises:
        InputError: as `check_scores` does.
    """
    if not isinstance(source, Benchmark):
        return ""
    check_scores(source.declared, source.groups())
    return source.lacks_retain and f"Model utility lacks what is kept: {source.lacks_retain}"


def check_scores(declared: Declaration, groups: Sequence[str] = ()) -> None:
    """Make sure that every formula can be read, and names what the benchmark can measure; `groups` are sets that rows make.

    Raises:
        InputError: naming the score and the name, or a metric that there is not.
    """
    where = f"--benchmark {declared.name}"
    for name, entry in declared.rows.items():
        for metric in entry.metrics:
            if metric in METRICS and metric not in COMPARISONS | OF_BENCHMARKS:
                remedy = "; ".join(filter(None, ["take it away, and `only` where that stands", METRICS[metric].needs]))
                raise InputError(f"{where}: rows.{name}.metrics has {metric!r}, which every set has by itself; {remedy}")
            if metric not in (known := COMPARISONS | OF_BENCHMARKS):
                raise InputError(f"{where}: rows.{name}.metrics has {metric!r}; take {', '.join(known)}")
    for name, of in declared.open_unlearning.metrics.items():
        if not _can_be_measured(of, declared.measure) or of.partition(".")[0] not in declared.measure:
            measured_sets = ", ".join(declared.measure)
            raise InputError(f"{where}: open_unlearning.metrics.{name} is {of!r}; give SET.METRIC of {measured_sets}")
    sets, above = [*dict.fromkeys([*declared.sets(), *groups])], dict[str, ScoreOf]()
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
            if one not in above and not _can_be_measured(one, sets):
                raise InputError(f"{where}: scores.{name} has {one!r}; {_instead_of(one, sets)}")
        if score.instead_of and score.instead_of not in above:
            raise InputError(f"{where}: scores.{name}.instead_of is {score.instead_of!r}; name a score above it")
        above[name] = score


_ATTACKS = [*MEMBERSHIP, "privleak"]


def _can_be_measured(name: str, sets: Sequence[str]) -> bool:
    block, _, metric = name.partition(".")
    if block == "privacy":
        return metric in _ATTACKS
    return (block == "general" and bool(metric)) or (block in sets and metric in METRICS)


def _instead_of(name: str, sets: Sequence[str]) -> str:
    """Say what to write in place of a name that nothing is measured by."""
    block, _, metric = name.partition(".")
    if metric and (block == "privacy" or block in sets):
        known = _ATTACKS if block == "privacy" else in_tables()
        near = get_close_matches(metric, known, n=1)
        return f"{block} has no {metric}{f' (did you mean {near[0]}?)' if near else ''}; take {', '.join(known)}"
    return f"take a score above it, or SET.METRIC of {', '.join(sets)}"


def _reason(name: str) -> str:
    """Say what would give a name that has no value."""
    block, _, rest = name.partition(".")
    if block == "general":
        return f"needs {rest.partition('.')[0]}; give --lm-eval-tasks {rest.partition('.')[0]}"
    comparison = COMPARISONS.get(rest)
    return comparison.needs if comparison and not comparison.can() else f"needs {name}, which was not measured"


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
