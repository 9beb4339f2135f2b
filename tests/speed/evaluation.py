"""What the one scoring pass saves, and generation that goes on from it: the parts `evaluation` and `generation` of speed.py.

For the first the model is taught the rows for a few steps, so that it answers at their lengths; of the second it knows nothing,
as after unlearning. Both sides score the same texts, as many at once. `a pass per metric` is how a framework does it whose
metrics know nothing of each other: each runs the model over padded rows, in the order of the rows, and takes the logits at all
positions.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dualoptim import EvalArgs, FinetuneArgs
from dualoptim.data.prompts import Example
from dualoptim.data.rows import HOLDOUT, Row
from dualoptim.data.tofu import tofu_source
from dualoptim.evaluation.generation import Continuation, continuation, generate
from dualoptim.evaluation.measure import set_records
from dualoptim.evaluation.scoring import MEMBERSHIP_SETS, ScoringPass
from dualoptim.finetune import learn
from dualoptim.models.launch import release, start_accelerator
from dualoptim.models.load import load_model
from dualoptim.models.loaded import LoadedModel
from dualoptim.reporting.log import StepLog

ROWS, QUESTIONS = 8, 32  # of each set: what is scored, and of two sets what is answered


def padded(model: Any, examples: Sequence[Example], size: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of padded batches, shifted so that one predicts the other."""
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        longest = max(len(example.ids) for example in batch)
        ids, labels = torch.full((len(batch), longest), pad), torch.full((len(batch), longest), -100)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            own = torch.tensor(example.ids)
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
            labels[row, example.start : len(own)] = own[example.start :]
        with torch.no_grad():
            yield model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]


def loss_metric(logits: Tensor, labels: Tensor) -> object:
    """Loss per row."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(-1)


def token_metric(logits: Tensor, labels: Tensor) -> object:
    """Log-probabilities of the labels, as exact memorization, extraction strength and Min-K% need them."""
    return [row[own != -100].log_softmax(-1).argmax(-1) for row, own in zip(logits, labels, strict=True)]


def vocabulary_metric(logits: Tensor, labels: Tensor) -> object:
    """Mean and variance of the log-probabilities over the vocabulary, as Min-K%++ needs them."""
    log_p = [row[own != -100].log_softmax(-1) for row, own in zip(logits, labels, strict=True)]
    return [((p.exp() * p).sum(-1), (p.exp() * p.square()).sum(-1)) for p in log_p]


def pass_per_metric(loaded: LoadedModel, sets: dict[str, list[Row]], size: int) -> int:
    """Every teacher-forced metric of our summary, each by a pass of its own; how many passes that were."""
    passes = 0

    def run(texts: Sequence[Example], metric: Callable[[Tensor, Tensor], object]) -> None:
        nonlocal passes
        passes += 1
        for logits, labels in padded(loaded.model, texts, size, loaded.tokenizer.pad_token_id):
            metric(logits, labels)

    for name, rows in sets.items():
        by_kind = {
            "answer": [loaded.formatter.example(row.question, row.answer) for row in rows],
            "paraphrase": [loaded.formatter.example(r.question, r.paraphrased_answer) for r in rows if r.paraphrased_answer],
            "perturbed": [loaded.formatter.example(r.question, text) for r in rows for text in r.perturbed_answers],
        }
        if name != HOLDOUT:
            for texts in by_kind.values():  # probability, and the two that the truth ratio reuses
                run(texts, loss_metric)
            run(by_kind["answer"], token_metric)  # exact memorization
            run(by_kind["answer"], token_metric)  # extraction strength
        if name in MEMBERSHIP_SETS:
            run(by_kind["answer"], loss_metric)  # loss
            run(by_kind["answer"], loss_metric)  # zlib
            run(by_kind["answer"], token_metric)  # Min-K%
            run(by_kind["answer"], vocabulary_metric)  # Min-K%++, which asks for both
            run(by_kind["answer"], token_metric)
    return passes


def in_plain_batches(scoring: ScoringPass) -> ScoringPass:
    """The same, but each batch of answers goes on until its longest one ends, and nothing takes the place of the others."""
    answering = replace(scoring.loaded.answering, together="any")
    return replace(scoring, loaded=replace(scoring.loaded, answering=answering))


def generate_in_row_order(scoring: ScoringPass, rows: Sequence[Row]) -> list[str]:
    """The model's `generate` over the rows as they come, from nothing but the questions."""
    scoring, size, texts = in_plain_batches(scoring), scoring.args.eval_batch_size, []
    for start in range(0, len(rows), size):
        texts += generate(scoring, "", [continuation(scoring.loaded, row) for row in rows[start : start + size]])
    return texts


def known_continuations(scoring: ScoringPass, rows: Sequence[Row]) -> list[Continuation]:
    """Questions, with what the teacher-forced pass has found of the answers to them."""
    examples = [[scoring.loaded.formatter.example(row.question, row.answer)] for row in rows]
    scores = scoring.score_texts("", examples)
    return [continuation(scoring.loaded, row, own[0].correct) for row, own in zip(rows, scores, strict=True)]


def callables_in_turns(title: str, variants: dict[str, Callable[[], Any]], rounds: int) -> list[Any]:
    """Print how much faster each variant is than the first one and the one before it, in the same round; give their results."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    worked: dict[str, list[float]] = {name: [] for name in variants}  # CPU seconds
    results: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            started, work = time.perf_counter(), time.process_time()
            results[name] = variant()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
                worked[name].append(time.process_time() - work)
    before = first = next(iter(seconds.values()))
    print(f"\n{title} ({rounds} rounds)")
    for name, times in seconds.items():
        against = [[other / one for one, other in zip(times, others, strict=True)] for others in (first, before)]
        said = [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" for ratios in against]
        took = f"{statistics.median(times):7.2f} s"
        of_first = statistics.median(next(iter(worked.values()))) / statistics.median(worked[name])
        print(
            f"  {name:<44} {took}   {said[0]} times as fast as the first, in CPU seconds {of_first:.2f}; "
            f"{said[1]} as the one before",
            flush=True,
        )
        before = times
    return list(results.values())


def measuring(args: dict[str, Any]) -> tuple[EvalArgs, dict[str, list[Row]], list[Row]]:
    """Arguments of an evaluation, its sets, and the rows that are answered."""
    shared = {name: args[name] for name in ("model", "data", "split", "template", "threads")}
    measured = EvalArgs(**shared, max_new_tokens=96, output_dir=args["output_dir"])
    whole, _ = tofu_source(measured.data_source).evaluation_sets(measured.split[0], 1)
    return measured, whole, [row for name in ("forget", "retain") for row in whole[name][:QUESTIONS]]


def in_turns_with_same_answers(title: str, variants: dict[str, Callable[[], list[str]]], rounds: int) -> None:
    """Compare ways to answer questions, and count the answers that all of them give."""
    answers = list(zip(*callables_in_turns(title, variants, rounds), strict=True))
    print(f"  the same answers: {sum(len(set(own)) == 1 for own in answers)} of {len(answers)}", flush=True)


def generation(args: dict[str, Any], rounds: int) -> None:
    """Answers to questions of which the model knows nothing, so that none of their tokens are known, nor how many they are."""
    measured, _, asked = measuring(args)
    loaded = load_model(measured, start_accelerator(measured), "measure")
    loaded.model.eval()
    scoring = ScoringPass(loaded, measured)
    known = known_continuations(scoring, asked)
    agreed = sum(one.agreed for one in known) / sum(len(one.answer) for one in known)
    variants = {
        "generate in the order of the rows": lambda: generate_in_row_order(scoring, asked),
        "longest true answers first": lambda: generate(in_plain_batches(scoring), "", known),
        "ours: and refilled as answers end": lambda: generate(scoring, "", known),
    }
    title = f"generated answers to {len(asked)} questions, {agreed:.0%} of whose tokens the model gives"
    in_turns_with_same_answers(title, variants, rounds)


def evaluation(args: dict[str, Any], rounds: int) -> None:
    """The teacher-forced summary against a pass per metric, and generation against the order of the rows."""
    measured, whole, asked = measuring(args)
    accelerator = start_accelerator(measured)
    answering = load_model(measured, accelerator, "measure").answering
    sets = {name: rows[:ROWS] for name, rows in whole.items()}
    # rows of another task stand for what no model has seen
    sets[HOLDOUT] = tofu_source(measured.data_source).task_rows(measured.split[0], 2)[:ROWS]
    common = {name: args[name] for name in ("model", "data", "template", "threads")}
    training = FinetuneArgs(**common, learning_rate=3e-4, num_epochs=6, batch_size=8, target_loss=0.3)
    loaded = replace(load_model(training, accelerator), answering=answering)
    with StepLog(None, 0, "teach", accelerator) as log:
        for _ in learn(loaded, asked, training, log):
            pass
    release(loaded)
    loaded.model.eval()
    scoring = ScoringPass(loaded, measured, membership=True)

    def ours() -> None:
        with mock.patch("dualoptim.evaluation.measure.generate", lambda scoring, label, asked: [""] * len(asked)):
            for name, rows in sets.items():
                set_records(scoring, name, rows)

    count = pass_per_metric(loaded, {name: rows[:1] for name, rows in sets.items()}, measured.eval_batch_size)
    texts = sum(len(row.texts()) for rows in sets.values() for row in rows)
    title = f"the teacher-forced summary of {sum(map(len, sets.values()))} rows with {texts} texts"
    variants: dict[str, Callable[[], Any]] = {
        f"a pass per metric ({count} passes)": lambda: pass_per_metric(loaded, sets, measured.eval_batch_size),
        "ours": ours,
    }
    callables_in_turns(title, variants, rounds)
    known = known_continuations(scoring, asked)
    agreed = sum(one.agreed for one in known) / sum(len(one.answer) for one in known)
    answers: dict[str, Callable[[], list[str]]] = {
        "generate in the order of the rows": lambda: generate_in_row_order(scoring, asked),
        "longest true answers first, and refilled": lambda: generate(scoring, "", [continuation(loaded, row) for row in asked]),
        "ours: from where the pass disagrees": lambda: generate(scoring, "", known),
    }
    title = (
        f"generated answers to {len(asked)} questions, {agreed:.0%} of whose tokens the teacher-forced pass has found already"
    )
    in_turns_with_same_answers(title, answers, rounds)
