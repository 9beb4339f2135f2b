"""Tell everything about one task or evaluated model in the sections of a report."""

from collections.abc import Callable, Iterable, Sequence

import yaml

from dualoptim.evaluation.records import Record
from dualoptim.evaluation.summary import UNSEEN, Attacks, Point, Summary
from dualoptim.reporting import attack_tables, plots, tables
from dualoptim.reporting.page import Answers, Plot, Section
from dualoptim.reporting.runs import Outcome
from dualoptim.reporting.sequence import sequence, sequence_plot
from dualoptim.reporting.verdicts import verdict_section


def section(outcome: Outcome, examples: int) -> Section:
    """Tell of settings, scores, steps and attacks of one outcome, with so many example answers per evaluation set."""
    own = {} if outcome.task is None else {"model": str(outcome.folder / "model"), "task": outcome.task}
    settings = {**outcome.settings, **own} if outcome.settings else None
    verdict = verdict_section(outcome.before, outcome.after, settings)
    parts = [verdict, _settings(outcome), _scores(outcome), _figures(outcome), _attacks(outcome), _examples(outcome, examples)]
    return Section(outcome.label, _headline(outcome), parts=[*parts, _skipped(outcome)])


def utility_plot(name: str, outcomes: Sequence[Outcome]) -> list[Plot]:
    """Plot model utility against forget efficacy, before and after; nothing where neither was measured."""
    paths = []
    for outcome in outcomes:
        places = {t: (s.untargeted_forget_efficacy, s.model_utility) for t, s in _columns(outcome).items()}
        paths.append({title: (x, y) for title, (x, y) in places.items() if x is not None and y is not None})
    if not any(paths):
        return []
    says = "Model utility against forget efficacy, before and after unlearning"
    if len(outcomes) == 1:
        says += f": {outcomes[0].label} {_change(outcomes[0], lambda summary: summary.model_utility)}"
    else:
        says += "; the numbers are those of the table"
    return [Plot(f"{name}-utility", f"{says}.", plots.utility(paths))]


def _headline(outcome: Outcome) -> str:
    """Say what happened, in one or two sentences."""
    parts = []
    if outcome.training:
        losses, steps = tables.shown_value(outcome.setting("forget_losses")), outcome.training.steps
        seconds = f"{outcome.training.seconds:.0f} s"
        parts.append(f"Task {outcome.task} unlearned with {losses} in {steps} optimizer steps ({seconds}){outcome.ended}.")
    changes = {
        "probability of the forget set's true answers": _change(outcome, lambda s: _probability(s, "forget")),
        "of the retain set's": _change(outcome, lambda s: _probability(s, "retain")),
        "of those of its rows that no step trained on": _change(outcome, lambda s: _probability(s, UNSEEN)),
        "model utility": _change(outcome, lambda s: s.model_utility),
    }
    moved = ", ".join(f"{title} {change}" for title, change in changes.items() if change)
    parts += [f"{moved[0].upper()}{moved[1:]}."] if moved else []
    return " ".join(parts) or "Nothing was measured."


def _change(outcome: Outcome, score: Callable[[Summary], float | None]) -> str:
    """Write a score before and after, as `0.993 → 0.001`; nothing where there is none."""
    values = [score(summary) for summary in (outcome.before, outcome.after) if summary is not None]
    return " → ".join(tables.number(value) for value in values if value is not None)


def _probability(summary: Summary, name: str) -> float | None:
    return summary.sets.get(name, {}).get("probability")


def _columns(outcome: Outcome) -> tables.Columns:
    """Give the summaries that there are their titles; a model that was evaluated alone has one of its own."""
    columns = tables.side_by_side(outcome.before, outcome.after)
    return {"score" if title == "after" and outcome.task is None else title: found for title, found in columns.items()}


def _settings(outcome: Outcome) -> Section:
    if not outcome.settings:
        return Section("Settings")
    everything = yaml.safe_dump(dict(outcome.settings), sort_keys=False, allow_unicode=True)
    table = tables.setting_table(outcome.settings, outcome.kind)
    return Section("Settings", tables=[table], folded=("All settings and versions", everything))


def _scores(outcome: Outcome) -> Section:
    columns = _columns(outcome)
    shown = [
        *tables.benchmark_tables(columns),
        tables.aggregate_table(columns),
        tables.privacy_table(columns),
        tables.set_table(columns),
    ]
    notes = []
    if outcome.after is not None and outcome.after.retain_only is not None:
        notes = [f"The retain-only model is {outcome.after.retain_only.source or 'not named'}."]
    return Section("Scores", tables=shown, notes=notes)


def _figures(outcome: Outcome) -> Section:
    """Plot the steps of a task, and what they changed."""
    if outcome.training is None or outcome.task is None:
        return Section("Plots")
    figures, training = [], outcome.training
    if training.losses:
        says = f"Forget and retain loss over the {training.steps} optimizer steps."
        figures.append(Plot(f"{outcome.label}-losses", says, plots.losses(training.losses)))
    if training.gradient_norms:
        says = "Gradient norm of every step before clipping, on a logarithmic axis."
        figures.append(Plot(f"{outcome.label}-gradients", says, plots.gradient_norms(training.gradient_norms)))
    if outcome.on_the_way:
        figures.append(_on_the_way(outcome, training.steps))
    if outcome.watched:
        figures.append(_watched(outcome))
    figures += utility_plot(outcome.label, [outcome])
    if outcome.before is not None and outcome.after is not None:
        standings = sequence([outcome.task], [outcome.before], [outcome.after])
        says = "Probability of the true answers of the forget and the retain set, and model utility, before and after."
        figures.append(Plot(f"{outcome.label}-task", says, sequence_plot(standings)))
    return Section("Plots", plots=figures)


def _on_the_way(outcome: Outcome, last: int) -> Plot:
    """Plot what the model knew after some steps, beginning and end included: where does unlearning go too far?"""
    points = {0: outcome.before, **outcome.on_the_way, last: outcome.after}
    known = {step: summary for step, summary in points.items() if summary is not None}
    curves = {
        "forget set": [_probability(summary, "forget") for summary in known.values()],
        "retain set": [_probability(summary, "retain") for summary in known.values()],
        plots.UTILITY: [summary.model_utility for summary in known.values()],
    }
    says = "Probability of the true answers of the forget and the retain set, and model utility, by optimizer steps."
    return Plot(f"{outcome.label}-steps", says, plots.tasks([*map(str, known)], curves, "optimizer step"))


def _watched(outcome: Outcome) -> Plot:
    """Plot what `--forget-until` and `--keep-budget` watched: where has it ended, and how near were the limits?"""
    titles = {"forget": "forget set", "kept": "retain set"}
    curves = {title: [known.get(kind) for known in outcome.watched] for kind, title in titles.items()}
    says = "Probability of the true answers of the rows that limits watched, by optimizer steps."
    steps = [f"{known['step']:g}" for known in outcome.watched]
    return Plot(f"{outcome.label}-watched", says, plots.tasks(steps, curves, "optimizer step"))


def _attacks(outcome: Outcome) -> Section:
    """Tell what brings the forget set back, and how each attack was made."""
    after, title = outcome.after, "Attacks: what brings it back"
    if after is None or after.attacks is None:
        return Section(title)
    figures = []
    for n, (name, relearned) in enumerate(after.attacks.relearned.items(), 1):
        taught, unseen = (_curve(relearned.curve, rows) for rows in ("forget", "forget_unseen"))
        before = _probability(outcome.before, "forget") if outcome.before is not None else None
        drawn = plots.relearning(plots.Relearning(taught, unseen, _curve(relearned.retain_only or (), "forget"), before))
        on = f"fine-tuned again ({name})" if name else "fine-tuned on a part of them again"
        says = f"Probability of the forget set's true answers while the model is {on}."
        figures.append(Plot(f"{outcome.label}-relearn{n if name else ''}", says, drawn))
    says = "Probability and ROUGE-L recall of the forget set before and after unlearning and under every attack."
    stages = attack_tables.stages(outcome.before, after)
    forget = [stage.sets.get("forget", {}) for stage in stages]
    scores = {
        "probability": [scores.get("probability") for scores in forget],
        "ROUGE-L recall": [scores.get("rouge_l_recall", scores.get("best_rouge_l_recall")) for scores in forget],
    }
    figures.append(Plot(f"{outcome.label}-attacks", says, plots.attacks([stage.title for stage in stages], scores)))
    table = attack_tables.attack_table(outcome.before, after)
    return Section(title, tables=[table], notes=list(_how(after.attacks)), plots=figures)


def _curve(points: Sequence[Point], name: str) -> plots.Points:
    """Follow the probability of a set through the steps of relearning."""
    values = ((point.step, point.sets.get(name, {}).get("probability")) for point in points)
    return [(step, value) for step, value in values if value is not None]


def _how(attacks: Attacks) -> Iterable[str]:
    """Say how each attack was made."""
    for what in dict.fromkeys(one.what for one in attacks.relearned.values() if one.what):
        yield f"Relearned on: {what.rstrip('.')}."
    for kind, quantized in (attacks.quantize or {}).items():
        if quantized.how:
            yield f"{kind}{' bits' if kind.isdecimal() else ''}: {quantized.how.rstrip('.')}."
    if attacks.sample and attacks.sample.temperature is not None:
        yield f"Samples: drawn at temperature {attacks.sample.temperature:g}; the best answer to each question counts."
        if (held := attacks.sample.sets.get("forget", {}).get("best_answer_held")) is not None:
            yield f"Some draw has the whole true answer to {held:.0%} of the questions."


def _examples(outcome: Outcome, count: int) -> Section:
    """Show the first answers of every set, before and after."""
    summary = outcome.after if outcome.after is not None else outcome.before
    if summary is None:
        return Section("Example answers")
    parts = []
    for name in summary.sets if count else ():
        found = outcome.answers(name, count)
        if any(row.answer is None for rows in found.values() for row in rows):
            return Section("Example answers", notes=["Texts were not kept (--no-texts)."])
        longest: list[Record] = max(found.values(), key=len)
        answers = []
        for index, row in enumerate(longest):
            pairs = [("truth", _clipped(row.answer))]
            pairs += [(title, _clipped(rows[index].generated)) for title, rows in found.items() if index < len(rows)]
            answers.append(Answers(row.question or tables.NO_QUESTION, pairs))
        parts.append(Section(tables.set_title(name, summary).capitalize(), answers=answers))
    return Section("Example answers", parts=parts)


def _clipped(text: str | None, length: int = 280) -> str:
    text = " ".join((text or "").split()) or "(nothing)"
    return text if len(text) <= length else f"{text[:length]} …"


def _skipped(outcome: Outcome) -> Section:
    """Say what was not measured, and why."""
    summary = next((summary for summary in (outcome.after, outcome.before) if summary is not None), Summary())
    table = tables.skipped_table(summary)
    rows = list(table.rows)
    for part, found in (("before", outcome.before), ("after", outcome.after)) if outcome.task is not None else ():
        if found is None:
            rows.append((f"every score {part}", "there is no evaluation (--no-eval, or the run was interrupted)"))
    return Section("Skipped", tables=[tables.Table(table.head, rows, left=2)])
