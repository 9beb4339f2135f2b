"""Judge what an evaluation measured: forgotten or not, kept or not, against what, which aim was missed, what to try next.

The rule and the reasons for its levels stand in README.md. It reads summaries alone: no text or answer can stand in a verdict.
"""

import math
import re
from collections.abc import Iterable, Iterator

from dualoptim.data.wordings import OTHER_WORDS
from dualoptim.evaluation.judged import (
    AGAIN,
    COMPARE,
    ENOUGH,
    EVAL,
    LEFT,
    MARGIN,
    QUALITY,
    SHORT,
    UNKNOWN,
    Judged,
    move,
    telling,
)
from dualoptim.evaluation.keeping import judge_kept
from dualoptim.evaluation.looping import judge_answers
from dualoptim.evaluation.metrics import EFFICACY, MEMBERSHIP
from dualoptim.evaluation.past import Past
from dualoptim.evaluation.summary import Attacks, Scores, SetScores, Summary, Verdict

_HEADLINES = {
    "yes": "forgotten",
    "hidden": "hidden, not forgotten",
    "no": "not forgotten",
    "never known": "nothing to forget",
    "not measured": "forgetting not measured",
}
_KEPT = {"yes": "kept", "no": "not kept", "collapsed": "the model has collapsed", "not measured": "keeping not measured"}

_TRAINED = "Forgotten in the trained wording but not in others"
_LEAST, _MOST = 2, 10
"""How many times as strong as before forget steps are advised to be."""
_LESS = "To forget less: --eval-every N with --keep-best, a lower --forget-lr, or fewer --num-epochs."
_TEACH = "Compare the answers before with the true ones: are model, template and columns those that the rows were learned with?"
_ATTACK = f"Attack it before relying on this:{EVAL} --relearn 20 --quantize 8 4 --sample 8"
_HIDDEN = "What attacks bring back was hidden: keep the weights to yourself, or train again without these rows."


def judge(before: Summary | None, after: Summary, past: Past | None = None) -> Verdict:
    """Judge a model by its summary, by the one before unlearning where there is one, and by what else lies behind it."""
    judged = Judged(before, after, past or Past())
    forgotten = _forgotten(judged)
    if forgotten == "yes":
        forgotten = _attacked(judged)
    kept = judge_kept(judged)
    _earlier_tasks(judged)
    if forgotten != "never known":
        _too_far(judged)
        _membership(judged)
    judge_answers(judged)
    vain = {_ATTACK: kept == "collapsed", _LESS: forgotten == "hidden"}  # nobody relies on it; what comes back is still there
    judged.tries = [one for one in judged.tries if not vain.get(one)]
    return Verdict(forgotten, kept, _against(judged), judged.missed, judged.says, judged.tries)


def _against(judged: Judged) -> str:
    """Name what a model was compared with."""
    later = judged.first is not None or any(map(_is_earlier, judged.before.sets if judged.before else ()))
    models = [f"the model before {'this task' if later else 'unlearning'}"] if judged.before else []
    models += ["the one before the first task"] if judged.first else []
    models += ["the retain-only model"] if judged.after.retain_only else []
    return ", ".join([*models[:-2], " and ".join(models[-2:])]) or "fixed levels"


def _more(judged: Judged) -> str:
    """Say how to forget more: another run with the settings of the one that is judged, as strong as its scores ask for."""
    now, before = (scores.get("probability") for scores in (judged.after.sets.get("forget", {}), judged.were("forget")))
    aim = _aim(judged, "forget", "probability")
    if judged.past.ended_by == "keep_budget":
        longer = f"{AGAIN} --forget-strength 0.5 --num-epochs TWICE"
        return f"To forget more within the budget, gentler steps and twice as many:{longer}"
    if judged.past.ended_by == "forget_until":
        return f"To forget more, a lower limit:{AGAIN} --forget-until {max(min(aim, now or aim) / 2, 1e-6):.2g}"
    if now is None or now <= aim:
        return f"To forget more, stronger forget steps:{AGAIN} --forget-strength {_LEAST}"
    goal = max(aim / 2, 1e-6)  # half of it, for other rows and words are to reach it as well
    wanted, fell = (math.log((before or now) / value) for value in (goal, now))
    strength = math.ceil(wanted / fell) if fell > 0 else _MOST
    strong = f"--forget-strength {min(max(strength, _LEAST), _MOST)} --forget-until {goal:.2g}"
    return f"To forget more, stronger forget steps{ENOUGH}:{AGAIN} {strong}"


def headline(verdict: Verdict) -> str:
    """Say a verdict in a few words."""
    return f"{_HEADLINES.get(verdict.forgotten, verdict.forgotten)}, {_KEPT.get(verdict.kept, verdict.kept)}"


# ------------------------------------------------------------------------------------------------------------ what went


def _forgotten(judged: Judged) -> str:
    """Judge whether the sets to forget are as in a model that never saw them."""
    named = {name: scores for name, scores in judged.after.sets.items() if judged.after.forgets(name) and not _is_earlier(name)}
    sets = {name: scores for name, scores in named.items() if "probability" in scores}
    if not sets:
        judged.say("Forgetting was not measured: there is no probability of a forget set.")
        return "not measured"
    known = [name for name in sets if _was_known(judged, name)]
    shown = "forget" if "forget" in (known or sets) else next(iter(known or sets))
    if not known:
        said = ", ".join(f"{SHORT[m]} {value:.3f}" for m, value in judged.telling(shown, judged.were(shown)).items())
        efficacy = judged.after.untargeted_forget_efficacy
        judged.say(
            "Nothing to forget: before unlearning the model knew no more of the forget set than one that never saw it "
            f"({said})" + (f", so a forget efficacy of {efficacy:.3f} says nothing." if efficacy is not None else "."),
            _TEACH,
        )
        return "never known"
    missing = {name: over for name in known if (over := _over(judged, name))}
    if not missing:
        asked = "When plainly asked forgotten" if judged.after.attacks else "Forgotten"
        judged.say(f"{asked if judged.before else f'{asked}, or never known'}: {_moves(judged, shown)}.")
    for name, over in missing.items():
        judged.missed |= {f"{name}.{metric}": by for metric, by in over.items()}
        what = "" if name == "forget" else f" ({name.removeprefix('forget_').replace('_', ' ')})"
        stays = sets[name]["probability"] > LEFT * judged.were(name).get("probability", math.inf)
        why = "the probability of the true answer hardly fell: " if stays else ""
        said = _TRAINED if name == OTHER_WORDS and "forget" in known and "forget" not in missing else f"Not forgotten{what}"
        judged.say(f"{said}: {why}{_moves(judged, name, over)}.", _more(judged))
    _other_words(judged, known, missing)
    return "no" if missing else "yes"


def _other_words(judged: Judged, known: Iterable[str], missing: Iterable[str]) -> None:
    """Say whether questions in other words were forgotten too, or why they show nothing."""
    if OTHER_WORDS in judged.after.skipped:
        judged.say("Whether it is forgotten in other words was not measured: passages are asked nothing.")
    elif OTHER_WORDS in judged.after.sets and OTHER_WORDS not in known:
        judged.say("Other words show nothing: before unlearning the model did not know the answers in those either.")
    elif OTHER_WORDS in known and OTHER_WORDS not in missing and "forget" not in missing:
        judged.say(f"In other words too: {_moves(judged, OTHER_WORDS)}.")


def _is_earlier(name: str) -> bool:
    return re.fullmatch(r"forget_task\d+", name) is not None


def _was_known(judged: Judged, name: str) -> bool:
    """Tell whether the model before unlearning knew a set; where there is none, it is taken to have."""
    found = [value > judged.level(name, metric) for metric, value in judged.telling(name, judged.were(name)).items()]
    return any(found) or not found


def _aim(judged: Judged, name: str, metric: str) -> float:
    """Say up to which score a set counts as forgotten; a fixed level of probability is at most half of what it was before."""
    level, before = judged.level(name, metric), judged.were(name).get(metric)
    fixed = metric == "probability" and metric not in judged.retain_only(name)
    return min(level, before / 2) if fixed and before is not None else level


def _over(judged: Judged, name: str) -> Scores:
    """Say by how much the scores of a set lie over their aims, of those that do."""
    over = {
        metric: value - _aim(judged, name, metric) for metric, value in judged.telling(name, judged.after.sets[name]).items()
    }
    return {metric: by for metric, by in over.items() if by > 0}


def _moves(judged: Judged, name: str, metrics: Iterable[str] = ()) -> str:
    """Write scores of a forget set before and after, with their aims."""
    now, before = judged.after.sets[name], judged.were(name)
    shown = metrics or judged.telling(name, now)
    return ", ".join(f"{SHORT[m]} {move(before.get(m), now[m])} (aim: {_aim(judged, name, m):.3f} at most)" for m in shown)


def _earlier_tasks(judged: Judged) -> None:
    """Look whether what was unlearned before has come back."""
    for name in filter(_is_earlier, judged.after.sets):
        for metric, before in telling(judged.were(name), judged.after.sets[name]).items():
            value = judged.after.sets[name].get(metric, 0.0)
            if (by := value - max(UNKNOWN[metric], before + MARGIN)) > 0:
                task = name.removeprefix("forget_task")
                judged.miss(
                    f"{name}.{metric}", by, f"Task {task} comes back: {SHORT[metric]} {move(before, value)}.", _more(judged)
                )


def _too_far(judged: Judged) -> None:
    """Look whether more is gone than a retain-only model lacks, which shows that something was removed."""
    scores, alone = judged.after.sets.get("forget", {}), judged.retain_only("forget")
    short = {
        m: alone[m] - MARGIN - scores[m]
        for m in judged.telling("forget", scores)
        if m in alone and scores[m] < alone[m] - MARGIN
    }
    if short:
        judged.missed |= {f"forget.{metric}": by for metric, by in short.items()}
        compared = ", ".join(f"{SHORT[metric]} {scores[metric]:.3f} against {alone[metric]:.3f}" for metric in short)
        further = f"further than in the retain-only model ({compared})"
        judged.say(f"Over-forgetting: forgotten {further}: that something was removed shows.", _LESS)
    value, other = judged.after.score(EFFICACY), judged.after.retain_only
    most = other.score(EFFICACY) if other else None
    if value is not None and most is not None and value > most:
        judged.missed |= {EFFICACY: value - most - MARGIN} if value > most + MARGIN else {}
        judged.say(f"Over-forgetting: a forget efficacy of {value:.3f}, and the retain-only model has {most:.3f}.", _LESS)
    quality = judged.after.score("tofu.forget_quality")
    if quality is not None and quality < QUALITY:
        sentence = f"Truth ratios are not the retain-only model's (forget quality {quality:.2g}, aim: {QUALITY} at least)."
        judged.miss("tofu.forget_quality", QUALITY - quality, sentence)


def _membership(judged: Judged) -> None:
    """Look whether rows that were forgotten can be told from rows that were never seen."""
    after, rows = judged.after, judged.after.rows
    alone = after.retain_only.privacy if after.retain_only else {}
    counts = rows.get("members", rows.get("forget", 0)), rows.get("holdout", 0)
    # the deviation of an AUC by chance alone (Mann and Whitney 1947)
    chance = math.sqrt((sum(counts) + 1) / (12 * math.prod(counts))) if all(counts) else 0.0
    off = {n: after.privacy[n] - alone.get(n, 0.5) for n in MEMBERSHIP if n in after.privacy}
    worst = max(off, key=lambda name: abs(off[name]), default="")
    margin = max(MARGIN, 2 * chance)
    if worst and abs(off[worst]) > margin:
        aim = f"{alone.get(worst, 0.5):.3f} ± {margin:.2f}"
        shows = "shows to whoever has them and rows that no model has seen"
        seen = shows if off[worst] > 0 else "shows the other way round: they are less likely than rows that no model has seen"
        auc = f"AUC {after.privacy[worst]:.3f}, aim: {aim}"
        sentence = f"Membership of the forget rows {seen} ({MEMBERSHIP[worst].title.removeprefix('membership ')}: {auc})."
        helps = _LESS if off[worst] < 0 else _more(judged) if alone else COMPARE
        judged.miss(f"privacy.{worst}", abs(off[worst]) - margin, sentence, helps)


# ------------------------------------------------------------------------------------------------------------- attacks


def _attacked(judged: Judged) -> str:
    """Look whether an attack brings back what was forgotten."""
    if judged.after.attacks is None:
        judged.tries.append(_ATTACK)
        return "yes"
    known, back = judged.after.sets.get("forget", {}), False
    for name, what, scores, alone in _under_attack(judged.after.attacks):
        aims = {metric: max(_aim(judged, "forget", metric), known.get(metric, 0.0) + MARGIN) for metric in UNKNOWN}
        aims = {metric: max(aim, alone.get(metric, 0.0) + MARGIN) for metric, aim in aims.items()}
        over = [metric for metric, value in judged.telling("forget", scores).items() if value > aims[metric]]
        judged.missed |= {f"attacks.{name}.{metric}": scores[metric] - aims[metric] for metric in over}
        if over:
            back = True
            moves = (
                f"{SHORT[m]} {move(known.get(m), scores[m])} (aim: {aims[m]:.3f} at most{_beside(judged, alone, m)})"
                for m in over
            )
            judged.say(f"Comes back {what}: {', '.join(moves)}.", _HIDDEN)
    if not back:
        judged.say("No attack that was made brings it back.")
    return "hidden" if back else "yes"


def _beside(judged: Judged, alone: Scores, metric: str) -> str:
    """Name the scores to compare with: before unlearning, and of the retain-only model under the same attack."""
    known = {"before unlearning": judged.were("forget").get(metric), "retain-only under the same": alone.get(metric)}
    return "".join(f"; {who}: {value:.3f}" for who, value in known.items() if value is not None)


def _under_attack(attacks: Attacks) -> Iterator[tuple[str, str, Scores, Scores]]:
    """Give the forget set's scores under each attack, by name and in words, and a retain-only model's under the same."""
    if attacks.paraphrase:
        alone = (attacks.paraphrase.retain_only or {}).get("forget", {})
        yield "paraphrase", "when asked in other words", attacks.paraphrase.sets.get("forget", {}), alone
    for name, hinted in (("few_shot", attacks.few_shot), ("prefix", attacks.prefix)):
        if hinted and hinted.retain_only is not None:  # without, nobody knows what the hint itself gives away
            yield name, f"when asked {hinted.what}", hinted.sets.get("forget", {}), hinted.retain_only.get("forget", {})
    if attacks.sample:
        best, other = (_best(sets or {}) for sets in (attacks.sample.sets, attacks.sample.retain_only))
        held = attacks.sample.sets.get("forget", {}).get("best_answer_held")
        many = f"in the best of {attacks.sample.samples or 'several'} samples"
        yield "sample", many + (f", which have {held:.0%} of the answers whole" if held else ""), best, other
    for kind, quantized in (attacks.quantize or {}).items():
        what = f"in {kind} bits" if kind.isdecimal() else f"as {kind}"
        yield f"quantize.{kind}", f"with weights {what}", quantized.sets.get("forget", {}), {}
    if (relearned := attacks.relearn) and (peak := relearned.peak):
        beside, name = relearned.peak_retain_only, relearned.counts
        which = next((f" ({key})" for key, one in (attacks.relearnings or {}).items() if one == relearned), "")
        what = f"after {peak.step} steps of relearning{which}" + (", in rows that were not taught" if name != "forget" else "")
        yield "relearn", what, peak.sets.get(name, {}), beside.sets.get(name, {}) if beside else {}


def _best(sets: SetScores) -> Scores:
    best = sets.get("forget", {})
    return {name: best[f"best_{name}"] for name in UNKNOWN if f"best_{name}" in best}
