"""Judge whether what a model was to keep is still there: after its task, and after all of several tasks."""

from collections.abc import Iterable, Iterator

from dualoptim.data.rows import OPTION_SETS
from dualoptim.evaluation.judged import AGAIN, COLLAPSED, COMPARE, ENOUGH, LEFT, SHORT, Judged, move, telling
from dualoptim.evaluation.metrics import AGGREGATES
from dualoptim.evaluation.summary import PARTS, SEEN, UNSEEN, BenchmarkScores, RetainOnly, Summary

_KEEP = f"To keep more, steps half as strong and twice as many{ENOUGH}:{AGAIN} --forget-strength 0.5 --num-epochs TWICE"
_RETAIN = "Give rows to keep (--retain-file), and a pair that trains on them, such as ME+GD."
_OWN = "To keep facts of your own and see whether they are: give them as --retain-file."


def judge_kept(judged: Judged) -> str:
    """Judge whether what is kept is as it was before, or as in a retain-only model."""
    unseen = [UNSEEN] if SEEN in judged.after.sets else []  # else these are all rows of the retain set
    own = dict.fromkeys(["retain", *unseen, *OPTION_SETS, *(judged.after.benchmark or BenchmarkScores()).keeps])
    both = judged.after, judged.before or judged.after.retain_only
    now, other = (dict(_kept_scores(one, own, beside)) for one, beside in (both, both[::-1]))
    shared = {name: (other[name], value) for name, value in now.items() if other.get(name, 0.0) > 0}  # of nothing none is lost
    if not shared:
        measured = ", ".join(f"{_title(name)} {value:.3f}" for name, value in now.items())
        why = f"there is nothing to compare with ({measured})" if now else "no set that is kept was measured"
        judged.say(f"Keeping cannot be judged: {why}.", COMPARE if now else _RETAIN)
        return "not measured"
    lost = {name: LEFT * old - new for name, (old, new) in shared.items() if new < LEFT * old}
    judged.missed |= lost
    than = "before" if judged.before else "the retain-only model's"
    shown = ", ".join(f"{_title(name)} {move(*shared[name])}" for name in (lost or shared))
    judged.say(
        f"{'Not kept' if lost else 'Kept'}: {shown} (aim: {LEFT:.0%} of {than} at least).",
        *([_more_kept(judged)] if lost else []),
    )
    drifted = _drifted(judged, own)
    if judged.after.retain_from:
        judged.say(
            "The rows to keep were made from the model: its words of before count, and facts of your own were not measured.",
            _OWN,
        )
    if any(shared[name][1] < COLLAPSED * shared[name][0] for name in lost if not name.startswith(OPTION_SETS)):
        return "collapsed"
    return "no" if lost or drifted else "yes"


def _more_kept(judged: Judged) -> str:
    """Say how to keep more: the run again, with steps that are gentler and end where enough is gone."""
    return _KEEP + ("" if judged.past.ended_by else f" --forget-until {judged.level('forget', 'probability') / 2:.2g}")


def _drifted(judged: Judged, kept: Iterable[str]) -> bool:
    """Judge whether several tasks, of which each may have kept enough, have together lost too much since the first model."""
    if judged.first is None:
        return False
    names = [name for name in kept if name != UNSEEN]  # other rows are unseen after each task
    same = [name for name in names if judged.first.rows.get(name) == judged.after.rows.get(name)]
    both = judged.first, judged.after
    was, now = (dict(_kept_scores(one, same, beside)) for one, beside in (both, both[::-1]))
    shared = {name: (was[name], value) for name, value in now.items() if was.get(name, 0.0) > 0}
    lost = {name: LEFT * old - new for name, (old, new) in shared.items() if new < LEFT * old}
    judged.missed |= {name: max(by, judged.missed.get(name, 0.0)) for name, by in lost.items()}
    shown = ", ".join(f"{_title(name)} {move(*shared[name])}" for name in (lost or shared))
    said = f"{'Not kept' if lost else 'Kept'} over all tasks so far: {shown}"
    judged.say(f"{said} (aim: {LEFT:.0%} of before the first at least).", *([_more_kept(judged)] if lost else []))
    return bool(lost)


def _kept_scores(
    summary: Summary | RetainOnly | None, kept: Iterable[str], beside: Summary | RetainOnly | None
) -> Iterator[tuple[str, float]]:
    """Name the scores that should stay: of the sets that are kept, of all of it together, and of general ability.

    `beside` is the summary that they are compared with.
    """
    if summary is None:
        return
    if summary.model_utility is not None:
        yield "model_utility", summary.model_utility
    sets, others = summary.sets, beside.sets if beside else {}
    found = {name: telling(sets.get(name, {}), others.get(name, {})) for name in kept}
    yield from ((f"{name}.{m}", value) for name, scores in found.items() for m, value in scores.items())
    if isinstance(summary, Summary):
        own, general = summary.benchmark or BenchmarkScores(), summary.general or {}
        for task in (task for task in general if not own.should.get(task, "").startswith("fall")):  # WMDP's are to be forgotten
            yield from ((f"general.{task}.{n}", v) for n, v in general[task].items() if n in ("acc", "exact_match"))
        scores = {name: value for name, value in own.scores.items() if name not in general}
        yield from ((f"benchmark.{n}", v) for n, v in scores.items() if own.should.get(n) == "stay")


def _title(name: str) -> str:
    block, _, rest = name.partition(".")
    if rest in SHORT and block != "benchmark":
        return f"{PARTS[block]}: {SHORT[rest]}" if block in PARTS else f"{block.replace('_', ' ')} {SHORT[rest]}"
    return AGGREGATES[name].title if name in AGGREGATES else rest.replace(".", " ").replace("_", " ")
