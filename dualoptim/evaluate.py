"""A model over the evaluation sets, on any number of processes: one file of rows per set, and `summary.json`.

Every text of a row (its answer, the paraphrase, the wrong ones) is scored once, teacher-forced; all probabilities and
memorization scores come from that. Answers are generated greedily, in order of length, and stop at the end token.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import GenerationConfig

from dualoptim import __version__, metrics
from dualoptim.args import DEMO, EvalArgs, MeasureArgs
from dualoptim.checkpoint import claim, output_folder, weights_hash, write_json, write_json_lines
from dualoptim.data import Example, OwnFiles, Row, in_length_order, open_source
from dualoptim.errors import InputError, reason
from dualoptim.modeling import Policy, autocast, load_policy, start_accelerator
from dualoptim.report import score_table
from dualoptim.scores import score
from dualoptim.tracking import say

logger = logging.getLogger(__name__)

OPTION_SETS = ("real_authors", "world_facts")
"""Sets with short answers, whose probability is normalized over the options and whose answer is its own paraphrase."""

FINISHED = "finished.json"

_NOT_RUN = {
    "cosine_similarity": "needs a sentence encoder, which this evaluation does not run",
    "entailment_score": "needs a model of entailment, which this evaluation does not run",
    "targeted_forget_efficacy": "needs entailment_score of refusals",
    "tofu.forget_quality": "needs the truth ratios of a retain-only model to compare with",
}
_ROW_METRICS = (
    "rouge_l_recall",
    "probability",
    "truth_ratio",
    "token_entropy",
    "extraction_strength",
    "exact_memorization",
)


@dataclass(frozen=True)
class TextScore:
    """One text, teacher-forced: mean negative log-likelihood per token, and which tokens are the model's first choice."""

    loss: float
    correct: list[bool]


def evaluate_model(
    policy: Policy,
    accelerator: Accelerator,
    sets: dict[str, list[Row]],
    skipped: dict[str, str],
    args: MeasureArgs,
    folder: Path,
    finished: "_Finished | None" = None,
) -> dict[str, Any]:
    """Evaluate on every set, write `folder`, and return the summary (the same on all processes).

    `skipped` names what the data could not give, and why. Rows are shared among processes and gathered in order. A set that an
    interrupted evaluation of the same weights and texts has finished in `folder` is read from there; `finished` names these
    sets where the caller has looked already.
    """
    model = policy.model
    was_training = model.training
    model.eval()
    finished = finished or _Finished(policy, accelerator, sets, args, folder)
    gathered = broadcast_object_list([finished.rows])[0]
    summary: dict[str, Any] = {"sets": {}, "rows": {}, "skipped": {**skipped, **_NOT_RUN}}
    try:
        for name, rows in sets.items():
            if name not in gathered:
                gathered[name] = _evaluate_set(policy, accelerator, name, rows[: args.eval_rows or None], args)
                if accelerator.is_main_process:
                    finished.add(name, gathered[name])
            summary["sets"][name] = _aggregate(name, gathered[name], summary["skipped"])
            summary["rows"][name] = len(gathered[name])
    finally:
        model.train(was_training)

    scores = summary["sets"]
    summary["tofu"] = {}
    for block, metric, value in (
        (summary, "model_utility", metrics.model_utility(scores)),
        (summary, "untargeted_forget_efficacy", metrics.untargeted_forget_efficacy(scores.get("forget", {}))),
        (summary["tofu"], "model_utility", metrics.tofu_model_utility(scores)),
    ):
        if value is None:
            name = metric if block is summary else f"tofu.{metric}"
            summary["skipped"][name] = "needs scores of sets that are missing"
        else:
            block[metric] = value
    if args.lm_eval_tasks:
        summary["general"] = general_ability(policy, accelerator, args)
    if accelerator.is_main_process:
        write_json(folder / "summary.json", summary)
    return summary


def check_general_ability(args: MeasureArgs) -> None:
    """Make sure that lm-eval knows the tasks of `--lm-eval-tasks`, before anything is computed.

    Raises:
        InputError: naming the first that it does not.
    """
    if not args.lm_eval_tasks:
        return
    manager = _task_manager(args.lm_eval_path)
    for task in args.lm_eval_tasks:
        if not manager.match_tasks([task]):
            place = f" and {args.lm_eval_path} has none of that name" if args.lm_eval_path else ""
            raise InputError(f"--lm-eval-tasks {task}: lm-eval has no such task{place}; `lm-eval ls tasks` lists them")


@functools.cache
def _task_manager(path: str | None) -> Any:
    """lm-eval's index of all tasks and those in the folder `path`, read once for the check and every evaluation."""
    from lm_eval.tasks import TaskManager  # ten seconds, and only for this

    return TaskManager(include_path=str(Path(path).expanduser()) if path else None)


def general_ability(policy: Policy, accelerator: Accelerator, args: MeasureArgs) -> dict[str, dict[str, float]]:
    """The tasks of `--lm-eval-tasks` by the package lm-eval, measured by the main process: metrics by task.

    Raises:
        InputError: if the data of a task cannot be reached.
    """
    results: list[Any] = [None]
    if accelerator.is_main_process:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(
                    accelerator.unwrap_model(policy.model),
                    tokenizer=policy.tokenizer,
                    batch_size=args.eval_batch_size,
                    # it switches our autocast off, without which flash-attention does not run
                    mixed_precision_dtype={"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision),
                ),
                tasks=list(args.lm_eval_tasks),
                task_manager=_task_manager(args.lm_eval_path),
                limit=args.eval_rows or None,
                log_samples=False,
                bootstrap_iters=0,
            )
            results = [
                {
                    task: {metric.removesuffix(",none"): value for metric, value in scores.items() if isinstance(value, float)}
                    for task, scores in found["results"].items()
                }
            ]
        except Exception as error:  # data sets that need a network, broken YAML: all kinds
            results = [
                f"--lm-eval-tasks {' '.join(args.lm_eval_tasks)}: lm-eval cannot run them ({reason(error)}); check their data"
            ]
    (result,) = broadcast_object_list(results)
    if isinstance(result, str):
        raise InputError(result)
    return result


class _Finished:
    """The sets that an evaluation of these weights and texts has finished in `folder`; the main process reads and writes."""

    def __init__(
        self, policy: Policy, accelerator: Accelerator, sets: dict[str, list[Row]], args: MeasureArgs, folder: Path
    ) -> None:
        self._folder = folder
        self._marks: dict[str, dict[str, str]] = {}
        self._recorded: dict[str, dict[str, str]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        if not accelerator.is_main_process:
            return
        self._marks = _marks(policy, accelerator, sets, args)
        with contextlib.suppress(OSError, json.JSONDecodeError):
            self._recorded = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        for name in self._marks:
            # the file's own hash tells when a kill or an edit has left other rows than those recorded
            if self._path(name).is_file() and self._recorded.get(name) == self._mark(name):
                lines = self._path(name).read_text(encoding="utf-8").splitlines()
                self.rows[name] = [json.loads(line) for line in lines]

    @property
    def is_whole(self) -> bool:
        """Whether everything recorded in the folder belongs to this evaluation."""
        return len(self.rows) == len(self._recorded)

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a set, and then that it is finished."""
        write_json_lines(self._path(name), rows)
        self._recorded[name] = self._mark(name)
        write_json(self._folder / FINISHED, self._recorded)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _mark(self, name: str) -> dict[str, str]:
        return {**self._marks[name], "file": hashlib.sha256(self._path(name).read_bytes()).hexdigest()}


def _marks(
    policy: Policy, accelerator: Accelerator, sets: dict[str, list[Row]], args: MeasureArgs
) -> dict[str, dict[str, str]]:
    """What decides the scores of every set: hashes of the weights, and of texts, token ids and settings."""
    weights = weights_hash(accelerator.unwrap_model(policy.model))
    settings = [__version__, args.max_new_tokens, _ends(policy, accelerator), accelerator.mixed_precision]
    marks = {}
    for name, rows in sets.items():
        digest = hashlib.sha256(json.dumps(settings).encode())
        for row in rows[: args.eval_rows or None]:
            examples = [policy.formatter.example(row.question, text) for text in row.texts()]
            digest.update(json.dumps([dataclasses.asdict(row), [(e.ids, e.start) for e in examples]]).encode())
        marks[name] = {"weights": weights, "inputs": digest.hexdigest()}
    return marks


def _evaluate_set(
    policy: Policy, accelerator: Accelerator, name: str, rows: Sequence[Row], args: MeasureArgs
) -> list[dict[str, Any]]:
    """One record per row, in order, on all processes, each of which computes its share."""
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    with autocast(accelerator):
        records = _evaluate_rows(policy, accelerator, name, [rows[index] for index in mine], args)
    gathered = gather_object(list(zip(mine, records, strict=True)))
    return [record for _, record in sorted(gathered, key=lambda item: item[0])]


def _evaluate_rows(
    policy: Policy, accelerator: Accelerator, name: str, rows: Sequence[Row], args: MeasureArgs
) -> list[dict[str, Any]]:
    """One record per row, in order."""
    if not rows:
        return []
    texts = [(row.question, text) for row in rows for text in row.texts()]
    examples = [policy.formatter.example(question, text) for question, text in texts]
    scored = iter(_score_texts(policy, accelerator, name, examples, args.eval_batch_size))
    first_texts = iter(examples)
    prompts, per_row, wanted = [], [], []
    for row in rows:
        own = [next(first_texts) for _ in row.texts()]
        # a passage is continued from its middle
        start = own[0].start if row.question is not None else max(1, len(own[0].ids) // 2)
        prompts.append(own[0].ids[:start])
        per_row.append([next(scored) for _ in own])
        rest = policy.tokenizer.decode(own[0].ids[start:], skip_special_tokens=True).strip()
        wanted.append(row.answer if row.question is not None else rest)
    answers = _generate(policy, accelerator, name, prompts, args)
    return [
        _record(row, text, scores, answer, name in OPTION_SETS, policy.tokenizer)
        for row, text, scores, answer in zip(rows, wanted, per_row, answers, strict=True)
    ]


def _record(row: Row, wanted: str, scores: list[TextScore], generated: str, options: bool, tokenizer: Any) -> dict[str, Any]:
    """Everything measured about one row, whose generated text should be `wanted`; a metric whose data are missing is absent."""
    answer, *others = scores
    paraphrased = others.pop(0) if row.paraphrased_answer else None
    wrong = [other.loss for other in others]
    record: dict[str, Any] = {
        "question": row.question,
        "answer": row.answer,
        "generated": generated,
        "rouge_l_recall": metrics.rouge_l_recall(wanted, generated),
        "probability": metrics.option_probability(answer.loss, wrong) if options and wrong else math.exp(-answer.loss),
        "token_entropy": metrics.token_entropy(tokenizer.tokenize(generated)),
        "extraction_strength": metrics.extraction_strength(answer.correct),
        "exact_memorization": metrics.exact_memorization(answer.correct),
        "loss": answer.loss,
        "tokens": len(answer.correct),
    }
    right = answer if options else paraphrased
    if right is not None and wrong:
        record["truth_ratio"] = metrics.truth_ratio(right.loss, wrong)
        record["paraphrased_loss"], record["perturbed_losses"] = right.loss, wrong
    return record


def _aggregate(name: str, records: list[dict[str, Any]], skipped: dict[str, str]) -> dict[str, float]:
    """Means over the rows, and TOFU's aggregates of the truth ratio; what cannot be computed is added to `skipped`."""
    values = {}
    for metric in _ROW_METRICS:
        measured = [record[metric] for record in records if metric in record]
        if not measured:
            skipped[f"{name}.{metric}"] = "the rows have no paraphrased and perturbed answers"
        elif not all(map(math.isfinite, measured)):
            skipped[f"{name}.{metric}"] = "the model's losses are not finite"
        elif metric == "truth_ratio":
            values[metric] = (metrics.forget_truth_ratio if name.startswith("forget") else metrics.retain_truth_ratio)(measured)
        else:
            values[metric] = fmean(measured)
    return values


@torch.no_grad()
def _score_texts(
    policy: Policy, accelerator: Accelerator, name: str, examples: Sequence[Example], size: int
) -> list[TextScore]:
    """The one teacher-forced pass. Results are in the order of `examples` and do not depend on the batches."""
    scores: list[TextScore | None] = [None] * len(examples)
    lengths = [len(example.ids) for example in examples]
    with _progress(f"score {name}", len(examples), accelerator) as bar:
        for batch in in_length_order(lengths, size):
            result = score(policy.model, policy.batch([examples[index] for index in batch], accelerator.device))
            losses = (-result.per_sequence(result.log_prob) / result.lengths()).tolist()
            correct = result.correct.split([int(length) for length in result.lengths()])
            for index, loss, flags in zip(batch, losses, correct, strict=True):
                scores[index] = TextScore(loss, flags.tolist())
            bar.update(len(batch))
    return [text for text in scores if text is not None]


@torch.no_grad()
def _generate(
    policy: Policy, accelerator: Accelerator, name: str, prompts: Sequence[list[int]], args: MeasureArgs
) -> list[str]:
    """Greedy answers to token prompts, in their order."""
    tokenizer = policy.tokenizer
    model = accelerator.unwrap_model(policy.model)
    settings = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=_ends(policy, accelerator),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(prompts)
    with _progress(f"answer {name}", len(prompts), accelerator) as bar:
        for batch in in_length_order([len(prompt) for prompt in prompts], args.eval_batch_size):
            longest = max(len(prompts[index]) for index in batch)
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, longest - len(prompts[index]) :] = 1
            output = model.generate(
                input_ids=ids.to(accelerator.device), attention_mask=mask.to(accelerator.device), generation_config=settings
            )
            for index, text in zip(batch, tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True), strict=True):
                answers[index] = text.strip()
            bar.update(len(batch))
    return answers


def _ends(policy: Policy, accelerator: Accelerator) -> list[int]:
    """The end token that was learned, and those that the model's own configuration stops at (Phi-3 and Gemma end turns so)."""
    own = accelerator.unwrap_model(policy.model).generation_config.eos_token_id
    return sorted({policy.tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


def _progress(label: str, total: int, accelerator: Accelerator) -> Any:
    return tqdm(total=total, desc=label, unit="text", leave=False, disable=not accelerator.is_main_process)


def evaluate(args: EvalArgs) -> dict[str, Any]:
    """Evaluate a model on disk or from the hub; writes `<output_dir>/eval/` and returns the summary.

    An evaluation of the same weights and texts that was interrupted there is continued. Raises:
        InputError: for anything that is wrong with the arguments, the data or the model.
    """
    if args.model == DEMO:
        raise InputError("--model demo has no weights on disk; give a folder, such as the model/ that a demo run wrote")
    accelerator = start_accelerator(args)
    folder = output_folder(args, accelerator) / "eval"
    source = open_source(args)
    source.evaluation_sets(args.split, args.task)  # what is wrong with the data shows before the model is loaded
    check_general_ability(args)
    policy = load_policy(args, accelerator)
    if isinstance(source, OwnFiles):
        source.cut(policy.formatter)
    sets, skipped = source.evaluation_sets(args.split, args.task)
    policy.formatter.check(row for rows in sets.values() for row in rows)
    finished = None
    if (folder / FINISHED).is_file() and not (folder / "summary.json").is_file() and not args.overwrite:
        finished = _Finished(policy, accelerator, sets, args, folder)
    if finished is None or not broadcast_object_list([finished.is_whole])[0]:
        claim(args, accelerator, [folder])
    summary = evaluate_model(policy, accelerator, sets, skipped, args, folder, finished)
    say(accelerator, f"\n{score_table({'score': summary}, full=True)}\n\nrows and summary: {folder}")
    return summary
