"""Compute evaluation metrics: texts and numbers in, numbers out, no model and no file. Tables below say what each is for.

Losses are mean negative log-likelihoods per token of an answer (natural logarithm). Sources: TOFU (arXiv 2401.06121),
A Closer Look at Machine Unlearning (arXiv 2410.08109), OpenUnlearning (arXiv 2506.12618).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Literal

import numpy as np

from dualoptim.evaluation.comparisons import COMPARISONS, OF_BENCHMARKS

if TYPE_CHECKING:
    from dualoptim.evaluation.records import Record

RETAINED_SETS = ("retain", "real_authors", "world_facts")
"""The sets whose scores should survive; together they make the model utility."""

# --------------------------------------------------------------------------------------------------- of one row


def token_entropy(tokens: Sequence[object]) -> float:
    """Divide the entropy of a text's token frequencies by log2 of its length: 1 if no token repeats, near 0 for loops.

    Texts of fewer than two tokens score 0 (arXiv 2410.08109, which uses the model's own tokenizer).
    """
    if len(tokens) < 2:
        return 0.0
    shares = np.array(list(Counter(tokens).values())) / len(tokens)
    return float(-(shares * np.log2(shares)).sum() / math.log2(len(tokens)))


def option_probability(answer_loss: float, perturbed_losses: Sequence[float]) -> float:
    """Compute an answer's probability among options: p / (p + sum of the wrong ones), each p = exp(-loss) per token."""
    options = np.exp(-np.array([answer_loss, *perturbed_losses]))
    return float(options[0] / options.sum())


def truth_ratio(paraphrased_loss: float, perturbed_losses: Sequence[float]) -> float:
    """Compute how much likelier wrong answers are than the right one: 0 knows the truth, 1 cannot tell, above 1 is misled.

    The geometric mean of the wrong answers' probabilities over the right one's: exp(paraphrased - mean(perturbed)), as in
    TOFU's published aggregation (its `utils.py` takes the arithmetic mean of probabilities instead).
    """
    with np.errstate(over="ignore"):
        return float(np.exp(paraphrased_loss - fmean(perturbed_losses)))


def forget_truth_ratio(ratios: Iterable[float]) -> float:
    """Compute TOFU's aggregate on the forget set: mean of min(r, 1/r). 1 means that truth and lies are equally likely."""
    return fmean(min(ratio, 1 / ratio) if ratio else 0.0 for ratio in ratios)


def retain_truth_ratio(ratios: Iterable[float]) -> float:
    """Compute TOFU's aggregate on the other sets: mean of max(0, 1 - r). 1 means that the truth is always preferred."""
    return fmean(max(0.0, 1 - ratio) for ratio in ratios)


def exact_memorization(correct: Sequence[bool]) -> float:
    """Compute the share of answer tokens that are the model's first choice after all tokens before (OpenUnlearning)."""
    return fmean(correct)


def extraction_strength(correct: Sequence[bool]) -> float:
    """Compute 1 - k/n, with k the shortest prefix of the n answer tokens after which first choices complete it exactly.

    OpenUnlearning's definition, which gives 1/n (not 0) when even the last token is wrong.
    """
    wrong = [position for position, right in enumerate(correct) if not right]
    prefix = min(wrong[-1] + 1, len(correct) - 1) if wrong else 0
    return 1 - prefix / len(correct)


# ------------------------------------------------------------------------------------------- what each metric is for

Aim = Literal["fall", "rise", "stay"]
"""Where unlearning should take a score."""


@dataclass(frozen=True)
class Metric:
    """What is known of one score of a row, whose mean over a set stands in `summary.json`."""

    title: str
    forget: Aim  # on the forget set; on every other set it should stay
    says: str = ""  # its definition
    aggregates: tuple[str, ...] = ()  # the names of the `AGGREGATES` that it enters
    comes_back: int = 0  # its place among the scores that attacks report because they rise with knowledge; 0: none of them
    row: int = 100  # its place in tables; in `summary.json` metrics stand in the order of `METRICS`
    needs: str = ""  # why it may be missing, and which flag gives it
    judge: Literal["", "encoder", "entailment", "gibberish"] = ""  # without which of `judges.Judges` it is named as skipped
    of: "Callable[[Record], float | None] | None" = None  # reads it from a row; without it, the row's field of its name


@dataclass(frozen=True)
class Aggregate:
    """What is known of one score over several metrics or sets; a dot in its name is a block of `summary.json`."""

    title: str
    aim: Aim
    needs: str


@dataclass(frozen=True)
class Membership:
    """What is known of one membership attack: an AUC between the forget set's rows and rows that no model has seen."""

    title: str
    field: str  # of a row: higher where the row is less likely to have been learned
    needs: str = ""


_UTILITY, _NINE = "model_utility", "tofu.model_utility"
EFFICACY, _TARGETED = "untargeted_forget_efficacy", "targeted_forget_efficacy"

_ENTAILMENT = "needs a model of entailment; give --entailment-model"

METRICS = {
    "rouge_l_recall": Metric(
        "ROUGE-L recall of its own answer",
        "fall",
        "how much of the true answer is in the model's own, greedy answer",
        (_UTILITY, _NINE, EFFICACY),
        comes_back=2,
        row=2,
    ),
    "probability": Metric(
        "probability of the true answer",
        "fall",
        "exp(-loss per token) of the true answer; on real authors and world facts normalized over the options",
        (_UTILITY, _NINE, EFFICACY),
        comes_back=1,
        row=1,
    ),
    "truth_ratio": Metric(
        "truth ratio",
        "rise",
        "forget: mean min(r, 1/r), others: mean max(0, 1-r), with r = how much likelier wrong answers are than the paraphrased "
        "right one",
        (_UTILITY, _NINE, EFFICACY),
        row=3,
        needs="the rows have no paraphrased and perturbed answers",
    ),
    "token_entropy": Metric(
        "token entropy of its answer",
        "stay",
        "variety of the tokens in the model's own answer: 1 none repeats, near 0 it loops",
        (_UTILITY, _TARGETED),
        row=6,
    ),
    "cosine_similarity": Metric(
        "similarity of its answer to the true one",
        "fall",
        "of the embeddings of the true and the own answer, 0 if negative",
        (_UTILITY, EFFICACY),
        row=7,
        needs="needs a sentence encoder; give --sentence-encoder",
        judge="encoder",
    ),
    "entailment_score": Metric(
        "entailment between the true and its answer",
        "fall",
        "share of rows where the true answer entails the own one (forget set and real-world scenario: the own entails the true "
        "one); ROUGE-L recall below 0.1 counts as not",
        (_UTILITY, EFFICACY),
        row=8,
        needs=_ENTAILMENT,
        judge="entailment",
    ),
    "refusal_entailment_score": Metric(
        "its answer entails a refusal",
        "rise",
        "share of the forget rows whose own answer entails a refusal of `--idk-file`, drawn once from the row's number alone",
        (_TARGETED,),
        row=9,
        needs=_ENTAILMENT,
    ),
    "clean_probability": Metric(
        "its answer is no gibberish",
        "stay",
        "probability that a classifier of gibberish gives the own answer of being clean",
        row=9,
        needs="needs a classifier of gibberish; give --gibberish-model",
        judge="gibberish",
    ),
    "extraction_strength": Metric(
        "extraction strength",
        "fall",
        "share of the answer that the model completes after the shortest sufficient prefix",
        comes_back=3,
        row=5,
    ),
    "exact_memorization": Metric(
        "exact memorization",
        "fall",
        "share of answer tokens that are the model's first choice",
        comes_back=4,
        row=4,
    ),
}

_BEYOND = "the same of the true answer's words that the question does not hold (of all, if it holds all): the verdict counts it"
METRICS["recall_beyond_question"] = Metric("ROUGE-L recall beyond the question", "fall", _BEYOND, comes_back=5, row=2)

METRICS |= {
    name: Metric(one.title, one.forget, one.says, row=10, needs=f"`--metrics {name}`") for name, one in COMPARISONS.items()
}
METRICS |= {name: Metric(title, aim, says, row=11, needs="`--benchmark`") for name, (title, aim, says) in OF_BENCHMARKS.items()}

_SETS_MISSING = f"needs scores of the sets {', '.join(RETAINED_SETS)}"
NO_RETAIN = (
    "needs a model that never saw the forget set (dualoptim finetune on the retain split); evaluate it and give its "
    "folder as --retain-logs, or give it to dualoptim eval as --retain-model"
)

AGGREGATES = {
    _UTILITY: Aggregate("model utility", "stay", _SETS_MISSING),
    EFFICACY: Aggregate("forget efficacy, untargeted", "rise", "needs scores of the forget set"),
    _TARGETED: Aggregate(
        "forget efficacy, targeted (refusals)", "rise", "needs entailment_score of refusals; give --entailment-model"
    ),
    _NINE: Aggregate("TOFU model utility", "stay", _SETS_MISSING),
    "tofu.forget_truth_ratio": Aggregate("TOFU truth ratio of the forget set", "rise", METRICS["truth_ratio"].needs),
    "tofu.forget_quality": Aggregate("TOFU forget quality (p-value against retain-only)", "rise", NO_RETAIN),
}

MEMBERSHIP = {
    "mia_loss": Membership("membership by loss", "loss"),
    "mia_zlib": Membership("membership by loss over compressed size", "zlib"),
    "mia_min_k": Membership("membership by Min-K%", "min_k"),
    "mia_min_k_plus_plus": Membership("membership by Min-K%++", "min_k_plus_plus"),
    "mia_gradnorm": Membership("membership by gradient norm", "gradnorm", "needs a backward pass per row; give --mia-gradnorm"),
    "mia_reference": Membership(
        "membership against a reference model",
        "reference",
        "needs another model's losses; give --reference-model to dualoptim eval",
    ),
}
"""Membership attacks by OpenUnlearning's names."""


def metrics_in(aggregate: str) -> list[str]:
    """Name the metrics that enter one of the `AGGREGATES`."""
    return [name for name, metric in METRICS.items() if aggregate in metric.aggregates]


def coming_back() -> list[str]:
    """Name the forget set's scores that rise when knowledge comes back, in the order in which attacks report them."""
    return sorted((name for name, metric in METRICS.items() if metric.comes_back), key=lambda name: METRICS[name].comes_back)


def in_tables() -> list[str]:
    """Name all metrics in the order in which tables show them."""
    return sorted(METRICS, key=lambda name: METRICS[name].row)


# ---------------------------------------------------------------------------------------------------------- aggregates


def _harmonic(values: Sequence[float]) -> float | None:
    return float(harmonic_mean(values)) if values else None


def model_utility(sets: Mapping[str, Mapping[str, float]]) -> float | None:
    """Compute the harmonic mean of the values {retain, real authors, world facts} x {six metrics} that are there."""
    return _harmonic([sets[s][m] for s in RETAINED_SETS for m in metrics_in(_UTILITY) if m in sets.get(s, {})])


def tofu_model_utility(sets: Mapping[str, Mapping[str, float]]) -> float | None:
    """Compute TOFU's harmonic mean of nine: ROUGE-L, probability and truth ratio on three sets; None if one is missing."""
    values = [sets[s][m] for s in RETAINED_SETS for m in metrics_in(_NINE) if m in sets.get(s, {})]
    return float(harmonic_mean(values)) if len(values) == 9 else None


def untargeted_forget_efficacy(forget: Mapping[str, float]) -> float | None:
    """Compute 1 - mean of the forget set's scores (arXiv 2410.08109), the truth ratio as 1 - mean(min(r, 1/r))."""
    values = [1 - forget[m] if m == "truth_ratio" else forget[m] for m in metrics_in(EFFICACY) if m in forget]
    return 1 - fmean(values) if values else None


def targeted_forget_efficacy(forget: Mapping[str, float]) -> float | None:
    """Compute the harmonic mean of the forget answers' token entropy and the share that entails a refusal (arXiv 2504.15827).

    None if one is missing.
    """
    values = [forget[m] for m in metrics_in(_TARGETED) if m in forget]
    return float(harmonic_mean(values)) if len(values) == len(metrics_in(_TARGETED)) else None


def forget_quality(truth_ratios: Sequence[float], retain_truth_ratios: Sequence[float]) -> float:
    """Compute TOFU's p-value that both models' truth ratios of the forget rows are of one distribution (two-sample KS test)."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(truth_ratios, retain_truth_ratios).pvalue)
