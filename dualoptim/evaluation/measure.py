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
from dualoptim.config.waiting import waiting
from dualoptim.data.declaration import read_declaration
from dualoptim.data.prompts import Example
from dualoptim.data.rows import HOLDOUT, MEMBERS, OPTION_SETS, Asking, Row
from dualoptim.data.stream import seeded
from dualoptim.errors import Stopped
from dualoptim.evaluation import metrics
from dualoptim.evaluation.comparisons import COMPARISONS
from dualoptim.evaluation.decoding import end_tokens, suppressed_tokens
from dualoptim.evaluation.generation import continuation, generate
from dualoptim.evaluation.judges import entailed
from dualoptim.evaluation.membership import MIN_K_SHARE, PASSAGE_SHARE, gradient_norms, without_end, zlib_score
from dualoptim.evaluation.records import Finished, Record, Records
from dualoptim.evaluation.rouge import rouge_l_recall, words_beyond
from dualoptim.evaluation.scoring import ScoringPass, Share, TextScore
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
    shared += [args.split == ("forget",), *(judge and judge.weights for judge in (judges.encoder, judges.entailment))]
    shared += [judges.refusals, suppressed_tokens(loaded), *([] if args.texts else ["no texts"]), *sorted(args.metrics)]
    shared += [judges.gibberish.weights] if judges.gibberish else []
    shared += ["vllm"] if getattr(args, "generate_with", None) == "vllm" else []
    found = {}
    for name, rows in sets.items():
        attacked = scoring.attacks_membership_of(name)
        membership = [args.mia_gradnorm, scoring.reference and scoring.reference.weights] if attacked else []
        asked = {metric for row in rows if row.asking for metric in row.asking.metrics if metric in COMPARISONS}
        cannot = sorted(metric for metric in asked if not COMPARISONS[metric].can())
        digest = hashlib.sha256(json.dumps([shared, membership, *cannot]).encode())
        compared = bool(judges.entailment) and name.startswith("forget")  # with refusals
        unread = {"alternatives"} if compared else {"alternatives", "refusal"}
        for row in scoring.scored_rows(rows):
            examples = [(example.ids, example.start) for example in scoring.examples(row)]
            content = {part: value for part, value in row.content().items() if part not in unread}
            digest.update(json.dumps([content, examples]).encode())
        found[name] = {"weights": weights, "inputs": digest.hexdigest()}
    return found


def set_records(scoring: ScoringPass, name: str, rows: Sequence[Row]) -> list[Record]:
    """Make the record of every scored row of a set, in order, on all processes, each of which computes its share."""
    asked = _asked(scoring.scored_rows(rows))
    return scoring.shared_out(rows, lambda share: _share_records(scoring, name, share, asked))


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


def _share_records(scoring: ScoringPass, name: str, share: Share, asked: Asking) -> list[Record]:
    texts, attacked = [scoring.examples(row) for _, row in share], scoring.attacks_membership_of(name)
    recognized = not attacked and _recognizes(asked)
    scores = scoring.score_texts(f"score {name}", texts, MIN_K_SHARE if attacked else PASSAGE_SHARE if recognized else None)
    scored = [
        _ScoredRow(index, row, own, known, _teacher_forced(row, known, name in OPTION_SETS))
        for (index, row), own, known in zip(share, texts, scores, strict=True)
    ]
    if attacked:
        _add_membership(scoring, name, scored)
    if recognized:
        _add_recognition(scored)
    if name not in (HOLDOUT, MEMBERS) and (not asked.only or set(asked.metrics) & set(COMPARISONS)):
        _add_answers(scoring, name, scored)
        with waiting(f"compare answers {name}", scoring.loaded.accelerator.is_main_process):
            _add_similarity(scoring, scored)
            _add_entailment(scoring, name, scored)
            if scoring.judges.gibberish:
                for one, clean in zip(scored, scoring.judges.gibberish.clean([one.generated for one in scored]), strict=True):
                    one.add(clean_probability=clean)
    return [_wanted(one.record, one.row.asking or Asking()) for one in scored]


def _asked(rows: Sequence[Row]) -> Asking:
    """Say what is measured of any row of a set: of all alike on all processes, which go through a divided model together."""
    asked = [row.asking or Asking() for row in rows]
    names = dict.fromkeys(metric for one in asked for metric in one.metrics)
    return Asking(metrics=tuple(names), only=all(one.only for one in asked))


def _recognizes(asked: Asking) -> bool:
    return any(metric.startswith("passage_") for metric in asked.metrics)


def _wanted(record: Record, asking: Asking) -> Record:
    """Keep of a record what its benchmark asks for, if it asks for nothing else."""
    kept = {name: getattr(record, name) for name in (*asking.metrics, "generated")} if asking.only else {}
    return replace(Record(record.question, record.answer, **kept) if asking.only else record, group=asking.group)


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
    if wrong and row.asking and "right_choice" in row.asking.metrics:
        chosen, *totals = [score.loss * len(score.correct) for score in scores]
        record = replace(record, right_choice=float(chosen < min(totals)))
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


def _add_recognition(scored: Sequence[_ScoredRow]) -> None:
    """Add how well the model knows each passage, as RWKU measures it; high: not known."""
    for one in scored:
        score = one.scores[0]
        one.add(min_k=None, min_k_plus_plus=None)
        if _recognizes(one.row.asking or Asking()):
            one.add(passage_loss=score.loss, passage_zlib=zlib_score(score.loss, one.row.answer))
            one.add(passage_min_k=score.min_k, passage_min_k_plus_plus=score.min_k_plus_plus)


def _add_answers(scoring: ScoringPass, name: str, scored: Sequence[_ScoredRow]) -> None:
    """Add the model's own answers, and what they have in common with what was wanted."""
    continuations = [continuation(scoring.loaded, one.row, one.scores[0].correct) for one in scored]
    for one, asked, text in zip(scored, continuations, generate(scoring, f"answer {name}", continuations), strict=True):
        one.wanted, one.generated, one.recall = asked.wanted, text, rouge_l_recall(asked.wanted, text)
        entropy = metrics.token_entropy(scoring.loaded.tokenizer.tokenize(text))
        beyond = rouge_l_recall(words_beyond(one.row.question, asked.wanted), text)
        one.add(generated=text, rouge_l_recall=one.recall, recall_beyond_question=beyond, token_entropy=entropy)
        asking = one.row.asking or Asking()
        names = dict.fromkeys([*scoring.args.metrics, *asking.metrics])
        for known in (metric for metric in names if metric in COMPARISONS and COMPARISONS[metric].can()):
            one.add(**{known: max(COMPARISONS[known].of(true, text) for true in (asked.wanted, *asking.accepted))})


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
    forgets = read_declaration(scoring.args.benchmark).forgets(name) if scoring.args.benchmark else name.startswith("forget")
    answer_first = forgets or scoring.args.split == ("forget",)
    answers = [one.generated for one in scored]
    pairs = zip(answers, truths, strict=True) if answer_first else zip(truths, answers, strict=True)
    for one, label in zip(scored, judge.entails(list(pairs)), strict=True):
        one.add(entailment_score=entailed(one.recall, label))
    if forgets:
        draws = (int(seeded(_SEED, "refusal", one.index).integers(len(refusals))) for one in scored)
        drawn = [one.row.refusal or refusals[draw] for one, draw in zip(scored, draws, strict=True)]
        labels = judge.entails(list(zip(answers, drawn, strict=True)))
        for one, refusal, label in zip(scored, drawn, labels, strict=True):
            score = entailed(rouge_l_recall(refusal, one.generated), label)
            one.add(refusal=refusal, refusal_entailment_score=score)
