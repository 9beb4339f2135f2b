"""The one scoring pass: rows in, one record per row out, on any number of processes.

All answers of a row (its own, the paraphrase, the wrong ones) lie packed in one teacher-forced forward, with what they begin
with there once where the model allows it; probabilities, memorization and membership scores all come from that, and so do the
first tokens of the model's own answer, as far as it is the true one. The rest is generated greedily, up to the end token. No
value depends on what a row is batched with.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dualoptim import __version__
from dualoptim.evaluation import metrics
from dualoptim.config.args import MeasureArgs
from dualoptim.models.checkpoint import weights_hash
from dualoptim.data.tofu import HOLDOUT, Example, Row, in_length_order, load_refusals, seeded
from dualoptim.evaluation.judges import Judges
from dualoptim.models.load import Policy, autocast
from dualoptim.method.scores import TokenScores, score, standardized

OPTION_SETS = ("real_authors", "world_facts")
"""Sets with short answers, whose probability is normalized over the options and whose answer is its own paraphrase."""

PRIVACY_SETS = ("forget", HOLDOUT)
"""What membership attacks try to tell apart."""

ROW_METRICS = (
    "rouge_l_recall",
    "probability",
    "truth_ratio",
    "token_entropy",
    "cosine_similarity",
    "entailment_score",
    "refusal_entailment_score",
    "extraction_strength",
    "exact_memorization",
)

_OTHER_CHOICES = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "sequence_bias",
    "suppress_tokens",
)
"""Settings of a model's own `generation_config` with which it does not answer by its first choices."""

Values = TypeVar("Values", Tensor, list[bool])

_SEED = 0  # of the refusal that each row is compared with, and of sampled answers: not the training's


@dataclass(frozen=True)
class TextScore:
    """One text, teacher-forced: mean negative log-likelihood per token, which tokens are the model's first choice, and how
    unlikely its unlikeliest tokens are (`metrics.min_k`), where membership is attacked.

    The end token is among them, but for `min_k`.
    """

    loss: float
    correct: list[bool]
    min_k: float | None = None
    min_k_plus_plus: float | None = None


@dataclass(frozen=True)
class Reference:
    """What another model says about the answers of some sets, for the reference attack."""

    weights: str  # hash
    losses: dict[str, list[float]]


@dataclass(frozen=True)
class Prompt:
    """Tokens that the model goes on from, the text that it should give, and that text's tokens, the end among them.

    The first `agreed` of these are what it answers by itself: the teacher-forced pass has found each to be its first choice.
    """

    ids: list[int]
    wanted: str
    answer: list[int]
    agreed: int = 0


@dataclass
class ScoringPass:
    """A model, and everything that decides what it scores."""

    policy: Policy
    accelerator: Accelerator
    args: MeasureArgs
    judges: Judges = field(default_factory=Judges)
    private: bool = False  # whether there are rows that no model has seen, so that membership can be attacked
    reference: Reference | None = None
    refusals: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.refusals = load_refusals(self.args.idk_file)

    def marks(self, sets: dict[str, list[Row]]) -> dict[str, dict[str, str]]:
        """What decides the scores of every set: hashes of the weights, and of texts, token ids and settings."""
        args, policy = self.args, self.policy
        weights = weights_hash(self.accelerator.unwrap_model(policy.model))
        shared = [__version__, args.max_new_tokens, self._ends(), self.accelerator.mixed_precision, args.split == "forget"]
        shared += [judge and judge.weights for judge in (self.judges.encoder, self.judges.entailment)] + [self.refusals]
        marks = {}
        for name, rows in sets.items():
            privacy = [args.mia_gradnorm, self.reference and self.reference.weights] if self._attacks_membership(name) else []
            digest = hashlib.sha256(json.dumps([shared, privacy]).encode())
            for row in self.used(rows):
                examples = [policy.formatter.example(row.question, text) for text in row.texts()]
                digest.update(json.dumps([dataclasses.asdict(row), [(e.ids, e.start) for e in examples]]).encode())
            marks[name] = {"weights": weights, "inputs": digest.hexdigest()}
        return marks

    def used(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of a set that are scored."""
        return rows[: self.args.eval_rows or None]

    def records(self, name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """One record per scored row, in order, on all processes, each of which computes its share."""
        return self._shared_out(self.used(rows), lambda indices, mine: self._records(name, indices, mine))

    def losses(self, name: str, rows: Sequence[Row]) -> list[float]:
        """Loss per token of every row's own answer."""

        def compute(_: Sequence[int], mine: Sequence[Row]) -> list[float]:
            examples = [[self.policy.formatter.example(row.question, row.answer)] for row in mine]
            return [scores[0].loss for scores in self._score(f"reference {name}", examples)]

        return self._shared_out(self.used(rows), compute)

    def sampled(self, name: str, rows: Sequence[Row], samples: int, temperature: float) -> list[list[str]]:
        """`samples` drawn answers to every row's question."""

        def compute(indices: Sequence[int], mine: Sequence[Row]) -> list[list[str]]:
            prompts = [self.prompt(row) for row in mine]
            seeds = [(index, draw) for index in indices for draw in range(samples)]
            repeated = [prompt for prompt in prompts for _ in range(samples)]
            texts = self._generate(
                f"sample {name}", repeated, lambda batch, start: Gumbel([seeds[i] for i in batch], start, temperature)
            )
            return [texts[k * samples : (k + 1) * samples] for k in range(len(mine))]

        return self._shared_out(self.used(rows), compute)

    # -- one process's share --

    def _shared_out(self, rows: Sequence[Row], compute: Callable[[Sequence[int], Sequence[Row]], list[Any]]) -> list[Any]:
        """The results of all rows, in order, on all processes, each of which computes those of every n-th."""
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        with autocast(self.accelerator):
            results = compute(mine, [rows[index] for index in mine]) if len(mine) else []
        gathered = gather_object(list(zip(mine, results, strict=True)))
        return [result for _, result in sorted(gathered, key=lambda item: item[0])]

    def _records(self, name: str, indices: Sequence[int], rows: Sequence[Row]) -> list[dict[str, Any]]:
        examples = [[self.policy.formatter.example(row.question, text) for text in row.texts()] for row in rows]
        scored = self._score(f"score {name}", examples, membership=self._attacks_membership(name))
        records = [_teacher_forced(row, scores, name in OPTION_SETS) for row, scores in zip(rows, scored, strict=True)]
        if self._attacks_membership(name):
            self._add_membership(name, indices, rows, examples, records)
        if name != HOLDOUT:
            prompts = [self.prompt(row, scores[0].correct) for row, scores in zip(rows, scored, strict=True)]
            generated = self._generate(f"answer {name}", prompts)
            self._add_generated(name, indices, rows, [prompt.wanted for prompt in prompts], generated, records)
        return records

    def _attacks_membership(self, name: str) -> bool:
        return self.private and name in PRIVACY_SETS

    def prompt(self, row: Row, correct: Sequence[bool] = ()) -> Prompt:
        """What the model is given to go on from, and what it should give; `correct` is what the pass says of the row's text."""
        example = self.policy.formatter.example(row.question, row.answer)
        start, wanted = example.start, row.answer
        if row.question is None:  # a passage is continued from its middle
            start = max(start, len(example.ids) // 2)
            wanted = self.policy.tokenizer.decode(example.ids[start:], skip_special_tokens=True).strip()
        flags = correct[start - example.start :]
        agreed = next((n for n, right in enumerate(flags) if not right), len(flags))
        return Prompt(example.ids[:start], wanted, example.ids[start:], agreed)

    def _add_membership(
        self,
        name: str,
        indices: Sequence[int],
        rows: Sequence[Row],
        examples: Sequence[Sequence[Example]],
        records: Sequence[dict[str, Any]],
    ) -> None:
        """The scores of membership attacks that are more than arithmetic on the pass; high: not a member."""
        for index, row, record in zip(indices, rows, records, strict=True):
            record["zlib"] = metrics.zlib_score(record["loss"], row.answer)
            if self.reference:
                record["reference"] = record["loss"] - self.reference.losses[name][index]
        if self.args.mia_gradnorm:
            norms = self._gradient_norms(name, [own[0] for own in examples])
            for record, norm in zip(records, norms, strict=True):
                record["gradnorm"] = norm

    def _add_generated(
        self,
        name: str,
        indices: Sequence[int],
        rows: Sequence[Row],
        wanted: Sequence[str],
        generated: Sequence[str],
        records: Sequence[dict[str, Any]],
    ) -> None:
        """The model's own answers, and how they compare with what was wanted."""
        judges, answers = self.judges, [row.original_answer if name in OPTION_SETS else None for row in rows]
        for record, text, answer in zip(records, generated, wanted, strict=True):
            record |= {
                "generated": text,
                "rouge_l_recall": metrics.rouge_l_recall(answer, text),
                "token_entropy": metrics.token_entropy(self.policy.tokenizer.tokenize(text)),
            }
        if judges.encoder:
            sentences = [row.original_answer or answer for row, answer in zip(rows, wanted, strict=True)]
            cosines = judges.encoder.similarities(list(zip(sentences, generated, strict=True)))
            for record, cosine in zip(records, cosines, strict=True):
                record["cosine_similarity"] = cosine
        if judges.entailment:
            sentences = [sentence or answer for sentence, answer in zip(answers, wanted, strict=True)]
            # what is kept must follow from the truth; what is forgotten must not let the truth follow from it
            answer_first = name.startswith("forget") or self.args.split == "forget"
            rouges = [record["rouge_l_recall"] for record in records]
            self._add_entailment("entailment_score", sentences, generated, rouges, records, answer_first)
            if name.startswith("forget"):
                refusals = [
                    self.refusals[int(seeded(_SEED, "refusal", index).integers(len(self.refusals)))] for index in indices
                ]
                for record, refusal in zip(records, refusals, strict=True):
                    record["refusal"] = refusal
                rouges = [metrics.rouge_l_recall(refusal, text) for refusal, text in zip(refusals, generated, strict=True)]
                self._add_entailment("refusal_entailment_score", refusals, generated, rouges, records, True)

    def _add_entailment(
        self,
        metric: str,
        targets: Sequence[str],
        generated: Sequence[str],
        rouges: Sequence[float],
        records: Sequence[dict[str, Any]],
        answer_first: bool,
    ) -> None:
        """Whether each answer entails its target (`answer_first`), or the target the answer."""
        assert self.judges.entailment
        pairs = [(text, target) if answer_first else (target, text) for text, target in zip(generated, targets, strict=True)]
        for record, rouge, label in zip(records, rouges, self.judges.entailment.entails(pairs), strict=True):
            record[metric] = metrics.entailed(rouge, label)

    # -- the model --

    @torch.no_grad()
    def _score(self, label: str, rows: Sequence[Sequence[Example]], membership: bool = False) -> list[list[TextScore]]:
        """The teacher-forced pass over all texts of all rows, with `membership` also what attacks need of their first ones."""
        policy, device = self.policy, self.accelerator.device
        scores: list[dict[int, TextScore]] = [{} for _ in rows]
        with self._progress(label, sum(map(len, rows))) as bar:
            for places in _in_batches([[len(text.ids) for text in row] for row in rows], self.args.eval_batch_size):
                # in the order of their tokens the texts of a row share the most
                flat = [(row, k) for row, texts in places for k in sorted(texts, key=lambda k: rows[row][k].ids)]
                result = score(policy.model, policy.batch([rows[row][k] for row, k in flat], device))
                lengths = [int(length) for length in result.lengths()]
                losses = (-result.per_sequence(result.log_prob) / result.lengths()).tolist()
                correct = [flags.tolist() for flags in result.correct.split(lengths)]
                attacked = [n for n, (_, k) in enumerate(flat) if membership and k == 0]
                min_k = dict(zip(attacked, _min_k(result, attacked, lengths), strict=True))
                for n, (row, k) in enumerate(flat):
                    scores[row][k] = TextScore(losses[n], correct[n], *min_k.get(n, ()))
                bar.update(len(flat))
        return [[found[k] for k in range(len(found))] for found in scores]

    def _gradient_norms(self, name: str, examples: Sequence[Example]) -> list[float]:
        """Mean over the tensors that train of the 2-norm of the gradient of each text's loss per token (OpenUnlearning)."""
        model, norms = self.policy.model, []
        with self._progress(f"gradients {name}", len(examples)) as bar:
            for example in examples:
                result = score(model, self.policy.batch([example], self.accelerator.device))
                (-_without_end(result.log_prob).mean()).backward()
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).mean()))
                model.zero_grad()
                bar.update()
        return norms

    @torch.no_grad()
    def _generate(
        self,
        label: str,
        prompts: Sequence[Prompt],
        processor: Callable[[list[int], int], LogitsProcessor] | None = None,
    ) -> list[str]:
        """Greedy answers to prompts, in their order; `processor(batch, length of the prompts)` changes the logits first.

        What is agreed upon is not generated again, unless the processor or the model's own configuration wants other tokens
        than the likeliest. A batch goes on until its longest answer ends, so those are together that should still be equally
        long.
        """
        tokenizer, device = self.policy.tokenizer, self.accelerator.device
        model = self.accelerator.unwrap_model(self.policy.model)
        ends, limit = self._ends(), self.args.max_new_tokens
        plain = not processor and not any(getattr(model.generation_config, name, None) for name in _OTHER_CHOICES)
        answers = [_until(prompt.answer[: prompt.agreed if plain else 0], ends, limit) for prompt in prompts]
        unfinished = [n for n, answer in enumerate(answers) if len(answer) < limit and not (answer and answer[-1] in ends)]
        with self._progress(label, len(prompts)) as bar:
            bar.update(len(prompts) - len(unfinished))
            missing = [len(prompts[n].answer) - len(answers[n]) for n in unfinished]
            for places in in_length_order(missing, self.args.eval_batch_size):
                batch = [unfinished[place] for place in places]
                known = [prompts[n].ids + answers[n] for n in batch]
                longest = max(map(len, known))
                ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
                mask = torch.zeros_like(ids)
                for row, own in enumerate(known):
                    ids[row, longest - len(own) :] = torch.tensor(own)
                    mask[row, longest - len(own) :] = 1
                settings = GenerationConfig(
                    max_new_tokens=limit - min(len(answers[n]) for n in batch),
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    no_repeat_ngram_size=0,
                    eos_token_id=ends,
                    pad_token_id=tokenizer.pad_token_id,
                )
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([processor(batch, longest)] if processor else []),
                )
                for n, new in zip(batch, output[:, longest:].tolist(), strict=True):
                    answers[n] = _until(answers[n] + new, ends, limit)
                bar.update(len(batch))
        return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _ends(self) -> list[int]:
        """The end token that was learned, and those that the model's own configuration stops at (Phi-3, Gemma)."""
        own = self.accelerator.unwrap_model(self.policy.model).generation_config.eos_token_id
        return sorted({self.policy.tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})

    def _progress(self, label: str, total: int) -> Any:
        return tqdm(total=total, desc=label, unit="text", leave=False, disable=not self.accelerator.is_main_process)


class Gumbel(LogitsProcessor):
    """Makes greedy choice a draw: argmax of logits / temperature plus Gumbel noise is a sample of the softmax.

    Every sequence has noise of its own, from its seed, so that what is drawn does not depend on what it is batched with.
    """

    def __init__(self, seeds: Sequence[tuple[int, int]], start: int, temperature: float) -> None:
        """`seeds` are (row, draw) of each sequence, `start` the length of the prompts."""
        self._seeds, self._start, self._temperature = seeds, start, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] over the temperature, plus noise."""
        step = input_ids.shape[1] - self._start
        noise = torch.stack(
            [torch.from_numpy(seeded(_SEED, "sample", *seed, step).gumbel(size=scores.shape[-1])) for seed in self._seeds]
        )
        return scores / self._temperature + noise.to(scores.device, scores.dtype)


def aggregate(name: str, records: Sequence[dict[str, Any]], skipped: dict[str, str]) -> dict[str, float]:
    """Means over the rows, and TOFU's aggregates of the truth ratio; what cannot be computed is added to `skipped`."""
    values = {}
    for metric in ROW_METRICS:
        measured = [record[metric] for record in records if metric in record]
        if metric == "truth_ratio" and not measured:
            skipped[f"{name}.{metric}"] = "the rows have no paraphrased and perturbed answers"
        elif any(map(math.isnan, measured)) or (metric != "truth_ratio" and any(map(math.isinf, measured))):
            skipped[f"{name}.{metric}"] = "the model's losses are not finite"
        elif metric == "truth_ratio":
            values[metric] = (metrics.forget_truth_ratio if name.startswith("forget") else metrics.retain_truth_ratio)(measured)
        elif measured:
            values[metric] = fmean(measured)
    return values


def _teacher_forced(row: Row, scores: Sequence[TextScore], options: bool) -> dict[str, Any]:
    """What one forward over all texts of a row says; a metric whose data are missing is absent."""
    answer, *others = scores
    paraphrased = others.pop(0) if row.paraphrased_answer else None
    wrong = [other.loss for other in others]
    record: dict[str, Any] = {
        "question": row.question,
        "answer": row.answer,
        "probability": metrics.option_probability(answer.loss, wrong) if options and wrong else math.exp(-answer.loss),
        "extraction_strength": metrics.extraction_strength(_without_end(answer.correct)),
        "exact_memorization": metrics.exact_memorization(_without_end(answer.correct)),
        "loss": answer.loss,
        "tokens": len(answer.correct),
    }
    right = answer if options else paraphrased
    if right is not None and wrong:
        record["truth_ratio"] = metrics.truth_ratio(right.loss, wrong)
        record["paraphrased_loss"], record["perturbed_losses"] = right.loss, wrong
    if answer.min_k is not None:
        record["min_k"], record["min_k_plus_plus"] = answer.min_k, answer.min_k_plus_plus
    return record


def _until(tokens: Sequence[int], ends: Sequence[int], limit: int) -> list[int]:
    """The first tokens: up to the first of `ends`, and at most `limit`."""
    end = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[: min(end, limit)])


def _min_k(result: TokenScores, sequences: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[float, float]]:
    """Min-K% and Min-K%++ of some sequences of a pass, whose sequences have `lengths` scored tokens."""
    if not sequences:
        return
    which = torch.isin(result.sequence, torch.tensor(sequences, device=result.sequence.device))
    own = [lengths[n] for n in sequences]
    for plain, normed in zip(result.log_prob[which].split(own), standardized(result, which).split(own), strict=True):
        yield metrics.min_k(_without_end(plain).tolist()), metrics.min_k(_without_end(normed).tolist())


def _without_end(values: Values) -> Values:
    """Values of a text's tokens without the end token's, if there is another one, as OpenUnlearning has them."""
    return values[:-1] if len(values) > 1 else values


def _in_batches(lengths: Sequence[Sequence[int]], size: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Rows of texts, longest first, in batches of at most `size` texts: lists of (row, its texts).

    A row with more texts than that is cut.
    """
    pieces = [
        (max(own[start : start + size]), row, list(range(start, min(start + size, len(own)))))
        for row, own in enumerate(lengths)
        for start in range(0, len(own), size)
    ]
    batch: list[tuple[int, list[int]]] = []
    for _, row, texts in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2])):
        if sum(len(own) for _, own in batch) + len(texts) > size:
            yield batch
            batch = []
        batch.append((row, texts))
    if batch:
        yield batch
