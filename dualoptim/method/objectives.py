"""The objectives: what a forget step or a retain step minimizes, each a short function from token scores to a sum.

The loop divides a sum once, by the count over all micro-batches and processes of a step, so neither accumulation nor the
number of processes can change a gradient. `log p` below is the log-probability of a label given everything before it,
x a question, y its answer, `alt` another one, `idk` a refusal, `ref` the frozen model before unlearning, and sg(.) holds a
value constant.

To add an objective, write a function and give it one entry in `FORGET` or `RETAIN`. Checks, help, the memory plan and the
tables of the READMEs follow from the entry. Tensors come in through the scores, so this file needs no torch until it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dualoptim.errors import InputError
from dualoptim.method import bounded, steering

if TYPE_CHECKING:
    from torch import Tensor

    from dualoptim.method.scores import Batch, TokenScores

PUBLISHED_LAYER = 7  # of RMU in a model of 32 layers, counted from 0

TextKind = Literal["answer", "refusal", "alternative", "mismatch"]
ReferenceKind = Literal["log_prob", "logits", "hidden"]


def negative_log_likelihood(scores: TokenScores) -> Tensor:
    """Sum -log p over tokens: GD on an answer, IDK on a refusal in its place, ALT on a substitute that the row has.

    ALT is the forget side of ReLearn (arXiv 2502.11190) and of safety alignment on safe answers (arXiv 2605.21539).
    """
    return -scores.log_prob.sum()


def gradient_ascent(scores: TokenScores) -> Tensor:
    """GA (TOFU, arXiv 2401.06121): the negative of GD. It has no lower bound: few steps, small rates."""
    return scores.log_prob.sum()


def maximum_entropy(scores: TokenScores, floor: float = 0.0) -> Tensor:
    """ME (arXiv 2410.08109): KL(uniform || p) per token, zero exactly when the model finds all V tokens equally likely.

    KL(u || p) = sum_v (1/V) log((1/V) / p_v) = logsumexp(z) - mean(z) - log V, which needs no softmax. Released code takes
    log(softmax(z) + 1e-12), as ME-floor does: what lies below pulls no more (in large vocabularies: the README has numbers).
    """
    if floor:
        from dualoptim.method.floored import MeanLog

        return -(MeanLog.apply(scores.logits, floor) + math.log(scores.vocab_size)).sum()
    return (scores.logsumexp - scores.mean_logit - math.log(scores.vocab_size)).sum()


def weighted_gradient_ascent(scores: TokenScores, beta: float) -> Tensor:
    """WGA (arXiv 2502.19301): sg(p)^beta log p per token, so that a token which is forgotten pushes no further.

    beta = 0 is GA.
    """
    return ((beta * scores.log_prob.detach()).exp() * scores.log_prob).sum()


def saturation_importance(scores: TokenScores, beta: float, gamma: float) -> Tensor:
    """SatImp (arXiv 2505.11953): sg(p^beta (1 - p)^gamma) log p per token: neither what is forgotten nor what is certain.

    gamma = 0 is WGA.
    """
    p = scores.log_prob.detach().exp()
    return (p**beta * (1 - p) ** gamma * scores.log_prob).sum()


def negative_preference(scores: TokenScores, beta: float) -> Tensor:
    """NPO (arXiv 2404.05868): -(2/beta) log sigmoid(-beta (log p(y|x) - log ref(y|x))) per question.

    As beta goes to 0 its gradient goes to that of GA summed over each sequence; where the answer is already far less likely
    than before, it goes to zero.
    """
    ratio = scores.per_sequence(scores.log_prob - _reference(scores, "log_prob"))
    return (2 / beta) * _softplus(beta * ratio).sum()


def simple_negative_preference(scores: TokenScores, beta: float, gamma: float) -> Tensor:
    """SimNPO (arXiv 2410.07163): -(2/beta) log sigmoid(-beta (log p(y|x) / |y| + gamma)) per question: no reference."""
    per_token = scores.per_sequence(scores.log_prob) / scores.lengths()
    return (2 / beta) * _softplus(beta * (per_token + gamma)).sum()


def direct_preference(scores: TokenScores, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290) with the refusal preferred to the answer (arXiv 2404.05868), in pairs of answer and refusal.

    -(2/beta) log sigmoid(beta (log p(idk|x)/ref(idk|x) - log p(y|x)/ref(y|x))) per question. AltPO (arXiv 2409.13474) is the
    same with `alt`, a plausible other answer that the row itself has, for idk.
    """
    ratio = scores.per_sequence(scores.log_prob - _reference(scores, "log_prob"))
    return (2 / beta) * _softplus(-beta * (ratio[1::2] - ratio[0::2])).sum()


def self_distillation(scores: TokenScores, beta: float) -> Tensor:
    """UNDIAL (arXiv 2402.10052): cross-entropy per token against the reference with the label's logit lowered by beta.

    H(softmax(z_ref - beta 1_label), p); beta = 0 distils the reference itself.
    """
    reference = _reference(scores, "logits")

    def lowered(part: slice) -> Tensor:
        logits, labels = reference(part), scores.labels[part, None]
        return logits.scatter_add(-1, labels, logits.new_full(labels.shape, -beta))

    return scores.cross_entropy(lowered).sum()


def answer_preservation(scores: TokenScores, beta: float) -> Tensor:
    """AP (arXiv 2410.08109): keep preferring the answer over a refusal, without a reference model.

    -(1/beta) log sigmoid(beta (log p(y|x) - log p(idk|x))) per question, in pairs of answer and refusal; zero once y has won.
    """
    log_prob = scores.per_sequence(scores.log_prob)
    return _softplus(-beta * (log_prob[0::2] - log_prob[1::2])).sum() / beta


def divergence(scores: TokenScores) -> Tensor:
    """KL: KL(ref || p) per scored token, zero exactly where the model says what it said before.

    Published code also averages over question and padding: KLQ scores the question too, its equal where nothing is padded.
    """
    return scores.kl_divergence(_reference(scores, "logits")).sum()


def _softplus(values: Tensor) -> Tensor:
    """-log sigmoid(-x), elementwise."""
    from torch.nn.functional import softplus

    return softplus(values)


def _reference(scores: TokenScores, kind: ReferenceKind) -> Any:
    """One field of the reference, which whoever uses this objective has to provide."""
    found = getattr(scores.reference, kind, None)
    assert found is not None, f"this objective needs {kind} of the reference"
    return found


@dataclass(frozen=True)
class Objective:
    """A loss, with what its sum is divided by, the constants that it takes, and what it reads beside the scores.

    `constants` are the published values of the flags `--beta` and `--gamma`, as far as the function takes them. `per` is the
    unit of the mean (`later_token`: every scored token of a text but the first; `pair`: two texts of a micro-batch, in either
    order). `also` is a second loss of the same phase, on texts of its own and with a mean of its own.
    """

    loss: Callable[..., Tensor]
    minimizes: str = ""  # for the tables of objectives
    per: Literal["token", "later_token", "row", "pair"] = "token"
    constants: Mapping[str, float] = field(default_factory=dict)
    reference: ReferenceKind | None = None
    reads: tuple[TextKind, ...] = ("answer",)
    instead: TextKind | None = None  # whose tokens, again and again, are the labels of the text that is read
    needs_layer: bool = False
    layer: int | None = None  # which one, once it is known
    whole_text: bool = False  # the question is scored as well
    first_token: bool = False  # and so is the first token, which nothing predicts, by what a layer puts out there
    steers: bool = False  # in a direction, which several corpora have for themselves
    measured: bool = False  # beta is a share of how long the frozen model's states are in the phase's first step
    also: Objective | None = None

    def __call__(self, scores: TokenScores) -> Tensor:
        """The loss, summed over its units."""
        return self.loss(scores, **self.constants)

    def count(self, batch: Batch) -> int:
        """Count the units that the sum goes over, known before the forward pass because the division needs it then."""
        if self.per == "row":
            return batch.num_sequences // len(self.reads)
        if self.per == "pair":
            return batch.num_sequences * (batch.num_sequences - 1)
        return len(batch.labels) - (batch.num_sequences if self.per == "later_token" else 0)

    @property
    def flags(self) -> set[str]:
        """Name the flags that change this objective and may not change others."""
        asked = {"layer": self.needs_layer, "fix_ref_model": self.reference, "alternative_column": "alternative" in self.texts}
        asked |= dict.fromkeys(self.also.constants, True) if self.also else {}
        return {*self.constants, *(name for name, needed in asked.items() if needed)}

    @property
    def texts(self) -> set[TextKind]:
        """List all kinds of text that the objective reads."""
        return {*self.reads, *([self.instead] if self.instead else []), *(self.also.texts if self.also else ())}

    def resolved(self, given: Mapping[str, float | None], layer: int) -> Objective:
        """Give this objective the constants that a user gave (None: the published one), and the layer that it reads."""
        constants = {name: default if (value := given[name]) is None else value for name, default in self.constants.items()}
        also = self.also and self.also.resolved(given, layer)
        return replace(self, constants=constants, layer=layer if self.needs_layer else None, also=also)


_PAIR: tuple[TextKind, ...] = ("answer", "refusal")
_ANSWERS: tuple[TextKind, ...] = ("answer", "alternative")
_SIMNPO = {"beta": 2.5, "gamma": 0.0}
_STEERS: dict[str, Any] = {"needs_layer": True, "steers": True}
_EVERY: dict[str, Any] = {"whole_text": True, "first_token": True}
_ADAPTIVE: dict[str, Any] = {"constants": {"beta": 5.0}, "reference": "hidden", **_STEERS, **_EVERY}
_EMBED: dict[str, Any] = {"reference": "hidden", "needs_layer": True}
_APART = Objective(steering.apart, per="pair", constants={"beta": 1.0}, needs_layer=True, **_EVERY)
_MISMATCH = Objective(negative_log_likelihood, reads=("mismatch",))

FORGET: dict[str, Objective] = {
    "GA": Objective(gradient_ascent, "mean log p per token"),
    "ME": Objective(maximum_entropy, "KL(uniform ‖ p) per token"),
    "ME-floor": Objective(partial(maximum_entropy, floor=1e-12), "KL(uniform ‖ p + 1e-12) per token: ME as released"),
    "IDK": Objective(negative_log_likelihood, "-log p of a refusal, per token", reads=("refusal",)),
    "ALT": Objective(negative_log_likelihood, "-log p of the row's other answer, per token", reads=("alternative",)),
    "NPO": Objective(negative_preference, "-(2/β) log σ(-β log p(y)/ref(y)) per question", "row", {"beta": 0.1}, "log_prob"),
    "DPO": Objective(direct_preference, "NPO of the answer against a refusal", "row", {"beta": 0.1}, "log_prob", _PAIR),
    "AltPO": Objective(direct_preference, "DPO with the row's other answer", "row", {"beta": 0.1}, "log_prob", _ANSWERS),
    "SimNPO": Objective(simple_negative_preference, "-(2/β) log σ(-β (log p(y)/length + γ)) per question", "row", _SIMNPO),
    "WGA": Objective(weighted_gradient_ascent, "sg(p)^β log p per token", constants={"beta": 1.0}),
    "SatImp": Objective(saturation_importance, "sg(p^β (1-p)^γ) log p per token", constants={"beta": 5.0, "gamma": 1.0}),
    "UNDIAL": Objective(self_distillation, "H(ref with the label's logit - β, p) per token", "token", {"beta": 10.0}, "logits"),
    "CE-U": Objective(bounded.cross_entropy_unlearning, "H(sg(p) without the label, p) per token but the first", "later_token"),
    "PDU": Objective(bounded.logit_margin, "(largest logit - mean logit)² per token"),
    "JensUn": Objective(bounded.towards_refusal, "JSD(p ‖ a refusal's token) per token of the answer", instead="refusal"),
    "IHL": Objective(bounded.inverted_hinge, "1 + p(label) - the largest other p, per token"),
    "RMU": Objective(steering.steer_away, "‖h - β u‖²/H per token, h of `--layer`", constants={"beta": 2.0}, **_STEERS),
    "RMUQ": Objective(
        steering.steer_away, "RMU over every token of question and answer", constants={"beta": 2.0}, **_STEERS, **_EVERY
    ),
    "ARMU": Objective(steering.steer_away_per_token, "RMUQ with β ‖h_ref‖ of each token for β", **_ADAPTIVE),
    "ARMU-once": Objective(steering.steer_away, "RMUQ with β ‖h_ref‖ of the first step for β", measured=True, **_ADAPTIVE),
    "CB": Objective(steering.break_circuits, "max(0, cos(h, h_ref)) per token, h of `--layer`", **_EMBED),
    "CBQ": Objective(steering.break_circuits, "CB over every token of question and answer", **_EMBED, **_EVERY),
    "CBQ-orth": Objective(
        steering.break_circuits, "CBQ, and β max(0, cos) of two rows' states", also=_APART, **_EMBED, **_EVERY
    ),
    # LLMU (arXiv 2310.10683) also learns another question's answer; with KL as its retain side it is complete
    "LLMU": Objective(gradient_ascent, "GA, and -log p of another question's answer per token", also=_MISMATCH),
}
RETAIN: dict[str, Objective | None] = {
    "GD": Objective(negative_log_likelihood, "-log p per token"),
    "AP": Objective(answer_preservation, "-(1/β) log σ(β log p(y)/p(idk)) per question", "row", {"beta": 0.1}, reads=_PAIR),
    "KL": Objective(divergence, "KL(ref ‖ p) per token of the answer", reference="logits"),
    "KLQ": Objective(divergence, "KL(ref ‖ p) per token of question and answer", reference="logits", whole_text=True),
    "JSD": Objective(bounded.halved_divergence, "JSD(ref ‖ p) per token of the answer", reference="logits"),
    "EMBED": Objective(steering.matching_embedding, "‖h - h_ref‖²/H per token, h of `--layer`", **_EMBED),
    "EMBEDQ": Objective(steering.matching_embedding, "EMBED over every token of question and answer", **_EMBED, **_EVERY),
    "EMBEDQ-norm": Objective(steering.matching_norm, "‖h - h_ref‖ per token of question and answer", **_EMBED, **_EVERY),
    "none": None,
}


def split_objectives(pair: str) -> tuple[Objective, Objective | None]:
    """Look up the two objectives of `"ME+GD"`; with `none` there is nothing to retain.

    Raises:
        InputError: if one of them is unknown.
    """
    forget, plus, retain = pair.partition("+")
    if not plus or forget not in FORGET or retain not in RETAIN:
        raise InputError(
            f"--forget-losses {pair!r} is not FORGET+RETAIN; forget is one of {', '.join(FORGET)}, "
            f"retain one of {', '.join(RETAIN)}, for example ME+GD"
        )
    return FORGET[forget], RETAIN[retain]


def flags_of(objectives: Iterable[Objective | None]) -> set[str]:
    """Name the flags that these objectives have and others may not."""
    return {name for objective in objectives if objective for name in objective.flags}
