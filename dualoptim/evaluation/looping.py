"""Judge whether answers repeat themselves: those of a forget set for a verdict, and a single one before it is kept."""

from collections.abc import Sequence

from dualoptim.evaluation.judged import AGAIN, Judged, move
from dualoptim.evaluation.metrics import token_entropy
from dualoptim.method.objectives import FORGET

LOOPING = 0.5
"""The share of the token entropy of texts that are whole of which less is left where answers repeat themselves."""

_REFUSE = "For answers in whole sentences: an objective that teaches refusals, as --forget-losses IDK+AP does, in gentle steps."
_HALF = f"{AGAIN} --forget-strength 0.5"
_GENTLER = f"For answers in whole sentences, steps half as strong and twice as many:{_HALF} --num-epochs TWICE"


def judge_answers(judged: Judged) -> None:
    """Look whether answers to what is forgotten repeat themselves, beside the answers of a model that is not broken."""
    sets = judged.before.sets if judged.before else judged.after.retain_only.sets if judged.after.retain_only else None
    whole = sets.get("forget", {}) if sets is not None else judged.after.sets.get("retain", {})
    known, value = whole.get("token_entropy"), judged.after.sets.get("forget", {}).get("token_entropy")
    if known is not None and value is not None and value < LOOPING * known:
        sentence = f"Its answers to the forget set repeat themselves or are empty (token entropy {move(known, value)})."
        gentler = [] if any(_HALF in one for one in judged.tries) else [_GENTLER]  # which may be advised to keep more as well
        tries = gentler if _refuses(judged.past.pair) else [_REFUSE]
        judged.miss("forget.token_entropy", LOOPING * known - value, sentence, *tries)


def _refuses(pair: str) -> bool:
    """Tell whether a pair of objectives teaches refusals."""
    forget = FORGET.get(pair.partition("+")[0])
    return forget is not None and "refusal" in forget.texts


def repeats(tokens: Sequence[object]) -> bool:
    """Tell whether a text of these tokens repeats itself, beside one in which no token does; one alone repeats nothing."""
    return len(tokens) > 1 and token_entropy(tokens) < LOOPING
