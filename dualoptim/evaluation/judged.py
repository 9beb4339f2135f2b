"""Hold what a judgement of a model has found so far, and the levels that it is judged by.

The rule and the reasons for its levels stand in README.md.
"""

from dataclasses import dataclass, field

from dualoptim.evaluation.past import Past
from dualoptim.evaluation.summary import Scores, Summary

BEYOND = "recall_beyond_question"
UNKNOWN = {"probability": 0.2, BEYOND: 0.5, "rouge_l_recall": 0.5}
"""Scores of the forget set up to which a model counts as one that never saw it, where no retain-only model says more.

ROUGE-L recall of all words stands in where that beyond the question was not measured (`telling`).
"""
MARGIN = 0.1
"""How far a score may lie from a retain-only model's, or an AUC from chance."""
LEFT = 0.9
"""The share of a score before that must be left of what is kept; a forget probability of which more is left did not fall."""
COLLAPSED = 0.5
"""The share of a score before of which less is left where a model has lost more than what it was to forget."""
QUALITY = 0.05
"""TOFU's forget quality, a p-value, from which on it cannot be told from a retain-only model's."""

# a command ends advice, on a line of its own; who shows it puts model, data and run in the place of the words in capitals
EVAL = "\ndualoptim eval --model MODEL --data DATA"
COMPARE = f"Compare with one that never saw these rows (dualoptim finetune on all others makes it):{EVAL} --retain-model ALONE"

AGAIN = "\ndualoptim unlearn --config CONFIG --output-dir FOLDER"
ENOUGH = " up to where enough is gone"
"""What advice says of `--forget-until`, which goes with the flag where a run cannot have it."""

SHORT = {
    "probability": "probability of the true answer",
    BEYOND: "ROUGE-L recall beyond the question",
    "rouge_l_recall": "ROUGE-L recall",
}


def telling(scores: Scores, beside: Scores) -> Scores:
    """Give those of a set's scores that tell whether a model knows it: words of the question in an answer tell nothing.

    They count where the recall beyond them was not measured, of these or of the scores `beside`, which these are compared with.
    """
    plain = any("rouge_l_recall" in one and BEYOND not in one for one in (scores, beside))
    return {name: scores[name] for name in ("probability", "rouge_l_recall" if plain else BEYOND) if name in scores}


@dataclass
class Judged:
    """Holds what was found so far."""

    before: Summary | None
    after: Summary
    past: Past = field(default_factory=Past)
    says: list[str] = field(default_factory=list)
    missed: dict[str, float] = field(default_factory=dict)
    tries: list[str] = field(default_factory=list)

    def miss(self, name: str, by: float, sentence: str, *tries: str) -> None:
        """Note an aim that was missed, a sentence about it, and what may help."""
        self.missed[name] = by
        self.say(sentence, *tries)

    def say(self, sentence: str, *tries: str) -> None:
        """Note a sentence, and what to try next."""
        self.says.append(sentence)
        self.tries += [one for one in tries if one not in self.tries]

    @property
    def first(self) -> Summary | None:
        """The scores before the first of several tasks, where that was not the task which is judged."""
        return None if self.past.first == self.before else self.past.first

    def were(self, name: str) -> Scores:
        """Give the scores of a set before unlearning, none where they are not known."""
        return self.before.sets.get(name, {}) if self.before else {}

    def retain_only(self, name: str) -> Scores:
        """Give the scores of a set by the retain-only model, none where there is no such model."""
        return self.after.retain_only.sets.get(name, {}) if self.after.retain_only else {}

    def telling(self, name: str, scores: Scores) -> Scores:
        """Give those of the scores of a set that tell whether a model knows it, and that the retain-only model has as well."""
        return telling(scores, self.retain_only(name))

    def level(self, name: str, metric: str) -> float:
        """Say up to which score a model counts as one that never saw a set."""
        known = self.retain_only(name).get(metric)
        return UNKNOWN[metric] if known is None else min(1.0, known + MARGIN)


def move(before: float | None, after: float) -> str:
    """Write a score before and after, as `0.993 → 0.001`."""
    return f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"
