"""Measure a model on evaluation sets: the record of every row, by everything that looks at it, kept on disk set by set."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dualoptim import __version__
from dualoptim.data.prompts import Example
from dualoptim.data.rows import HOLDOUT, MEMBERS, Asking, Row
from dualoptim.data.stream import seeded
from dualoptim.errors import Stopped
from dualoptim.evaluation import metrics
from dualoptim.evaluation.comparisons import COMPARISONS
from dualoptim.evaluation.decoding import end_tokens, suppressed_tokens
from dualoptim.evaluation.generation import continuation, generate
from dualoptim.evaluation.judges import entailed
from dualoptim.evaluation.membership import gradient_norms, without_end, zlib_score
from dualoptim.evaluation.records import Finished, Record, Records
from dualoptim.evaluation.rouge import rouge_l_recall
from dualoptim.evaluation.scoring import OPTION_SETS, ScoringPass, Share, TextScore
from dualoptim.models.together import shared, wait

_SEED = 0  # of the refusal that each row is compared with: not the training's


def measure(scoring: ScoringPass, sets: Mapping[str, list[Row]], folder: Path) -> Records:
    """Make the records of every set, the same on all processes, and write them to `folder`.

    A set that an interrupted evaluation of the same weights and texts has finished there is read.
    """
    accelerator, model, weights = scoring.loaded.accelerator, scoring.loaded.model, scoring.loaded.weights_hash()
    finished = Finished(folder, fingerprints(scoring, sets, weights) if accelerator.is_main_process else {})
    records = shared(accelerator, finished.records)
    was_training = model.training
    model.eval()
    try:
        for name, rows in sets.items():
            if name not in records:
                records[name] = set_records(scoring, name, rows)
                if accelerator.is_main_process:
                    finished.add(name, records[name], scoring.args.texts)
                wait(accelerator)
    except Stopped as stop:
        stop.where = f"while {folder} was measured, where what is finished is kept ({', '.join(records) or 'nothing yet'})"
        raise
    finally:
        model.train(was_training)
    return {name: records[name] for name in sets}


def fingerprints(scoring: ScoringPass, sets: Mapping[str, Sequence[Row]], weights: str) -> dict[str, dict[str, str]]:
    """Hash what decides the scores of every set beside the model's `weights`, their hash: texts, token ids and settings."""
    loaded, args, judges = scoring.loaded, scoring.args, scoring.judges
    shared: list[Any] = [__version__, args.max_new_tokens, end_tokens(loaded), loaded.precision]
    shared += [args.split == "forget", *(judge and judge.weights for judge in (judges.encoder, judges.entailment))]
    shared += [judges.refusals, suppressed_tokens(loaded), *([] if args.texts else ["no texts"]), *sorted(args.metrics)]
    shared += ["vllm"] if getattr(args, "generate_with", None) == "vllm" else []
    found = {}
    for name, rows in sets.items():
        attacked = scoring.attacks_membership_of(name)
        membership = [args.mia_gradnorm, scoring.reference and scoring.reference.weights] if attacked else []
        digest = hashlib.sha256(json.dumps([shared, membership]).encode())
        for row in scoring.scored_rows(rows):
            examples = [(example.ids, example.start) for example in scoring.examples(row)]
            digest.update(json.dumps([row.content(), examples]).encode())
        found[name] = {"weights": weights, "inputs": digest.hexdigest()}
    return found


def set_records(scoring: ScoringPass, name: str, rows: Sequence[Row]) -> list[Record]:
    """Make the record of every scored row of a set, in order, on all processes, each of which computes its share."""
    return scoring.shared_out(rows, lambda share: _share_records(scoring, name, share))


@dataclass
class _ScoredRow:
    """A row on its way to its record."""

    index: int  # in its set
    row: Row
    texts: list[Example]  # its own answer first
    scores: list[TextScore]  # of the texts
    record: Record
    wanted: str = field(default="", init=False)  # what the model should answer
    generated: str = field(default="", init=False)  # what it answers
    recall: float = field(default=0.0, init=False)  # of what was wanted in what it answers, by ROUGE-L

    def add(self, **measured: Any) -> None:
        """Put measurements into the record."""
        self.record = replace(self.record, **measured)


def _share_records(scoring: ScoringPass, name: str, share: Share) -> list[Record]:
    texts = [scoring.examples(row) for _, row in share]
    scores = scoring.score_texts(f"score {name}", texts, scoring.attacks_membership_of(name))
    scored = [
        _ScoredRow(index, row, own, known, _teacher_forced(row, known, name in OPTION_SETS))
        for (index, row), own, known in zip(share, texts, scores, strict=True)
    ]
    if scoring.attacks_membership_of(name):
        _add_membership(scoring, name, scored)
    if name not in (HOLDOUT, MEMBERS):
        _add_answers(scoring, name, scored)
        _add_similarity(scoring, scored)
        _add_entailment(scoring, name, scored)
    return [one.record for one in scored]


def _teacher_forced(row: Row, scores: Sequence[TextScore], options: bool) -> Record:
    """Begin the record of a row with what one forward over all of its texts says.

    With `options` the row has a short answer, one of several. A metric whose data are missing is None.
    """
    answer, *others = scores
    paraphrased = others.pop(0) if row.paraphrased_answer else None
    wrong = [other.loss for other in others]
    record = Record(
        row.question,
        row.answer,
        probability=metrics.option_probability(answer.loss, wrong) if options and wrong else math.exp(-answer.loss),
        extraction_strength=metrics.extraction_strength(without_end(answer.correct, answer.ended)),
        exact_memorization=metrics.exact_memorization(without_end(answer.correct, answer.ended)),
        loss=answer.loss,
        tokens=len(answer.correct),
        min_k=answer.min_k,
        min_k_plus_plus=answer.min_k_plus_plus,
    )
    right = answer if options else paraphrased
    if right is None or not wrong:
        return record
    ratio = metrics.truth_ratio(right.loss, wrong)
    return replace(record, truth_ratio=ratio, paraphrased_loss=right.loss, perturbed_losses=wrong)


def _add_membership(scoring: ScoringPass, name: str, scored: Sequence[_ScoredRow]) -> None:
    """Add the scores of membership attacks that are more than arithmetic on the pass; high: not a member."""
    for one in scored:
        loss = one.scores[0].loss
        one.add(zlib=zlib_score(loss, one.row.answer))
        if scoring.reference:
            one.add(reference=loss - scoring.reference.losses[name][one.index])
    if scoring.args.mia_gradnorm:
        norms = []
        with scoring.progress(f"gradients {name}", len(scored)) as bar:
            for norm in gradient_norms(scoring.loaded, [one.texts[0] for one in scored]):
                norms.append(norm)
                bar.update()
        for one, value in zip(scored, torch.stack(norms).tolist(), strict=True):
            one.add(gradnorm=value)


def _add_answers(scoring: ScoringPass, name: str, scored: Sequence[_ScoredRow]) -> None:
    """Add the model's own answers, and what they have in common with what was wanted."""
    continuations = [continuation(scoring.loaded, one.row, one.scores[0].correct) for one in scored]
    for one, asked, text in zip(scored, continuations, generate(scoring, f"answer {name}", continuations), strict=True):
        one.wanted, one.generated, one.recall = asked.wanted, text, rouge_l_recall(asked.wanted, text)
        entropy = metrics.token_entropy(scoring.loaded.tokenizer.tokenize(text))
        one.add(generated=text, rouge_l_recall=one.recall, token_entropy=entropy)
        asking = one.row.asking or Asking()
        names = dict.fromkeys([*scoring.args.metrics, *asking.metrics])
        one.add(**{name: COMPARISONS[name].of(asked.wanted, text) for name in names}, group=asking.group)


def _add_similarity(scoring: ScoringPass, scored: Sequence[_ScoredRow]) -> None:
    """Add how similar the sentence encoder finds each answer and the true one."""
    if scoring.judges.encoder:
        pairs = [(one.row.original_answer or one.wanted, one.generated) for one in scored]
        for one, cosine in zip(scored, scoring.judges.encoder.similarities(pairs), strict=True):
            one.add(cosine_similarity=cosine)


def _add_entailment(scoring: ScoringPass, name: str, scored: Sequence[_ScoredRow]) -> None:
    """Add whether the true answer and the model's entail each other, and whether a forgetful answer entails a refusal.

    What is kept must follow from the truth; what is forgotten must not let the truth follow from it.
    """
    judge, refusals = scoring.judges.entailment, scoring.judges.refusals
    if not judge:
        return
    truths = [(one.row.original_answer if name in OPTION_SETS else None) or one.wanted for one in scored]
    forgets = name.startswith("forget")
    answer_first = forgets or scoring.args.split == "forget"
    answers = [one.generated for one in scored]
    pairs = zip(answers, truths, strict=True) if answer_first else zip(truths, answers, strict=True)
    for one, label in zip(scored, judge.entails(list(pairs)), strict=True):
        one.add(entailment_score=entailed(one.recall, label))
    if forgets:
        drawn = [refusals[int(seeded(_SEED, "refusal", one.index).integers(len(refusals)))] for one in scored]
        labels = judge.entails(list(zip(answers, drawn, strict=True)))
        for one, refusal, label in zip(scored, drawn, labels, strict=True):
            score = entailed(rouge_l_recall(refusal, one.generated), label)
            one.add(refusal=refusal, refusal_entailment_score=score)
