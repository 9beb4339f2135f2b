"""Put what attacks bring back into a table: for the console, the model card, and the report."""

from collections.abc import Iterator
from dataclasses import dataclass

from dualoptim.evaluation.summary import Attacks, Point, Relearned, Scores, SetScores, Summary
from dualoptim.reporting.tables import Cells, Table, number


@dataclass(frozen=True)
class Stage:
    """A state of a model that attacks compare: scores by set, and what came back, which is None where nothing attacked.

    `above` is how far the forget set's scores lie above those of a retain-only model under the same attack, if one was.
    """

    title: str
    sets: SetScores
    came_back: Scores | None = None
    above: Scores | None = None

    @property
    def rouge(self) -> str:
        """The name of its ROUGE-L score: of several samples the best counts."""
        return "best_rouge_l_recall" if "best_rouge_l_recall" in self.sets.get("forget", {}) else "rouge_l_recall"


def stages(before: Summary | None, after: Summary) -> list[Stage]:
    """Line the states of a model up: before unlearning, after it, and under every attack of `after`."""
    found = [Stage("before unlearning", before.sets)] if before else []
    found.append(Stage("after unlearning" if before else "without an attack", after.sets))
    return [*found, *(_attacked(after.attacks) if after.attacks else ())]


def _attacked(attacks: Attacks) -> Iterator[Stage]:
    for name, relearned in attacks.relearned.items():
        yield from _relearned(relearned, f"relearned on {name}" if name else "relearned")
    for kind, quantized in (attacks.quantize or {}).items():
        title = f"weights in {kind} bits" if kind.isdecimal() else f"weights as {kind}"
        yield Stage(title, quantized.sets, quantized.came_back)
    for one in filter(None, (attacks.paraphrase, attacks.few_shot, attacks.prefix)):
        yield Stage(f"asked {one.what or 'in other words'}", one.sets, one.came_back, one.above_retain_only)
    if attacks.sample:
        title = f"best of {attacks.sample.samples or 'several'} samples"
        yield Stage(title, attacks.sample.sets, attacks.sample.came_back, attacks.sample.above_retain_only)


def _relearned(relearned: Relearned, title: str) -> Iterator[Stage]:
    """Show the peak of relearning, of the forget rows that were not taught, and of the retain-only model."""
    if peak := relearned.peak:
        title, above = f"{title} ({_steps(peak, relearned.curve[-1])})", relearned.above_retain_only
        unseen = relearned.counts == "forget_unseen"
        yield Stage(title, peak.sets, _up_to(peak, relearned, "forget"), None if unseen else above)
        if unseen:
            change = _up_to(peak, relearned, "forget_unseen")
            yield Stage(f"{title}, rows not taught", {"forget": peak.sets["forget_unseen"]}, change, above)
    if relearned.retain_only and (peak := relearned.peak_retain_only):
        yield Stage(f"retain-only, taught the same ({_steps(peak, relearned.retain_only[-1])})", peak.sets)


def _up_to(peak: Point, relearned: Relearned, name: str) -> Scores:
    """Compute how far a set's scores rose by the peak: in older summaries `came_back` is of the last step."""
    known = relearned.curve[0].sets.get(name, {})
    return {key: value - known[key] for key, value in peak.sets.get(name, {}).items() if key in known}


def _steps(peak: Point, last: Point) -> str:
    return f"{last.step} steps" if peak.step == last.step else f"{peak.step} of {last.step} steps"


def attack_table(before: Summary | None, after: Summary) -> Table:
    """Show what attacks bring back: the forget set's scores before, after and under every attack; empty without any."""
    found = stages(before, after) if after.attacks else []
    rows, known = list[Cells](), after.sets.get("forget", {})
    compared = any(stage.above for stage in found)
    for stage in found:
        forget, cells = stage.sets.get("forget", {}), []
        for metric in ("probability", stage.rouge):
            cells += [number(forget.get(metric)), _came_back(stage, metric, known)]
            if compared:
                cells.append(_change((stage.above or {}).get(metric.removeprefix("best_"))))
        rows.append((stage.title, *cells, number(stage.sets.get("retain", {}).get("probability"))))
    more = ("above retain-only",) if compared else ()
    head = ("state", "probability", "came back", *more, "ROUGE-L", "came back", *more, "retain probability")
    return Table(head, rows).measured()


def _came_back(stage: Stage, metric: str, known: Scores) -> str:
    """Say how far a score of the forget set rose under an attack, from what is `known` without it."""
    if stage.came_back is None:
        return ""
    forget, plain = stage.sets.get("forget", {}), metric.removeprefix("best_")
    change = stage.came_back.get(metric, stage.came_back.get(plain))
    if change is None and metric in forget and plain in known:
        change = forget[metric] - known[plain]
    return _change(change) or "-"


def _change(change: float | None) -> str:
    return "" if change is None else f"{change:+.3f}"
