"""Attack a model that has unlearned: does what was forgotten come back?

Each attack changes the questions, how answers are drawn, or the model, and repeats the one scoring pass; a part of the summary
says how far the forget set's scores rose. Relearning a few rows and rounding the weights have brought most of it back for many
methods (arXiv 2406.13356, 2410.16454).
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dualoptim.atomic import write_json_lines
from dualoptim.config.args import EvalArgs, MeasureArgs, Relearning
from dualoptim.data.own import Source
from dualoptim.data.prompts import Formatter
from dualoptim.data.readers import Columns, read_own
from dualoptim.data.rows import Row
from dualoptim.data.stream import seeded
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.evaluation.generation import continuation, sample
from dualoptim.evaluation.judges import Judges
from dualoptim.evaluation.measure import measure
from dualoptim.evaluation.metrics import coming_back
from dualoptim.evaluation.records import Record, Records
from dualoptim.evaluation.rouge import rouge_l_recall
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.evaluation.summarize import set_scores
from dualoptim.evaluation.summary import Attacked, Attacks, Point, Quantized, Relearned, Sampled, Scores, SetScores
from dualoptim.finetune import learn
from dualoptim.models.launch import release
from dualoptim.models.load import load_model, quantization_options
from dualoptim.models.loaded import LoadedModel, as_measured
from dualoptim.models.sharding import divides
from dualoptim.reporting.log import StepLog
from dualoptim.signals import at_once

ATTACKED_SETS = ("forget", "retain")

_SEED = 0  # of the share of the forget set that relearning sees


@dataclass(frozen=True)
class Lesson:
    """The rows that relearning teaches, and what they are in words."""

    rows: list[Row]
    what: str


@dataclass(frozen=True)
class Target:
    """Everything that attacks on one model have in common. No model is held: each attack has the memory for itself."""

    args: EvalArgs
    accelerator: Accelerator
    judges: Judges
    sets: Mapping[str, list[Row]]  # those of ATTACKED_SETS that there are
    records: Records  # of the model as it stands
    retain_records: Records | None  # of the retain-only model, if that is attacked as well
    folder: Path

    def measure(self, loaded: LoadedModel, part: str, sets: Mapping[str, list[Row]] | None = None) -> Records:
        """Score a model, by default on all attacked sets; its rows go to the folder `part`."""
        return measure(ScoringPass(loaded, self.args, self.judges), self.sets if sets is None else sets, self.folder / part)


def check_attacks(args: EvalArgs, accelerator: Accelerator, source: Source) -> None:
    """Make sure that the attacks asked for can run, before anything is written.

    Raises:
        InputError: if not.
    """
    if args.relearn:
        _rows_to_relearn(args, source)
    if args.quantize and accelerator.device.type == "cuda":
        bits = " ".join(map(str, args.quantize))
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(f"--quantize {bits} needs the package bitsandbytes; pip install bitsandbytes")
        if args.model.endswith(".gguf") or (Path(args.model).expanduser() / "adapter_config.json").is_file():
            raise InputError(f"--quantize {bits}: {args.model} is quantized or an adapter; save it whole with save_pretrained")
    if args.paraphrase and not any(r.paraphrased_question for r in source.evaluation_sets(args.split, args.task)[0]["forget"]):
        raise InputError(f"--paraphrase: the forget rows of {source.name} have no paraphrased_question; drop it")


def attack_answers(target: Target, loaded: LoadedModel) -> Attacks:
    """Make the attacks on the model as it stands: other questions, and drawn answers."""
    return Attacks(
        paraphrase=_paraphrased(target, loaded) if target.args.paraphrase else None,
        sample=_sampled(target, loaded) if target.args.sample else None,
    )


def attack_weights(target: Target, lesson: Lesson | None) -> Attacks:
    """Make the attacks on changed weights, each of which loads the model anew: fewer bits, and relearning a lesson.

    Transformers answers then: vllm would start anew for every change.
    """
    if target.args.generate_with == "vllm":
        target = replace(target, args=replace(target.args, generate_with="transformers"))
    quantized = {str(bits): _quantized(target, bits) for bits in target.args.quantize}
    return Attacks(quantize=quantized or None, relearn=_relearned(target, lesson) if lesson else None)


def _scores(records: Records) -> dict[str, dict[str, float]]:
    return {name: set_scores(name, rows, {}) for name, rows in records.items()}


def _came_back(sets: SetScores, before: Sequence[Record]) -> Scores:
    """Compute how far the forget set's scores rose, whose records `before` are of the same rows."""
    return _rise(sets.get("forget", {}), set_scores("forget", before, {}))


def _rise(after: Scores, before: Scores) -> Scores:
    return {metric: after[metric] - before[metric] for metric in coming_back() if metric in after and metric in before}


# ------------------------------------------------------------------------------------------------------------- questions


def _paraphrased(target: Target, loaded: LoadedModel) -> Attacked:
    """Ask the paraphrased questions, of the rows that have one."""
    numbers = {
        name: [n for n in range(len(target.records[name])) if rows[n].paraphrased_question]
        for name, rows in target.sets.items()
    }
    asked = {
        name: [replace(target.sets[name][n], question=target.sets[name][n].paraphrased_question) for n in own]
        for name, own in numbers.items()
        if own
    }
    sets = _scores(target.measure(loaded, "paraphrase", asked))
    return Attacked(sets, _came_back(sets, [target.records["forget"][n] for n in numbers["forget"]]))


def _sampled(target: Target, loaded: LoadedModel) -> Sampled:
    """Draw several answers to each forget question: the best and the mean of their ROUGE-L recall."""
    args, scoring = target.args, ScoringPass(loaded, target.args, target.judges)
    rows = scoring.scored_rows(target.sets["forget"])
    texts = sample(scoring, rows, args.sample, args.sample_temperature)
    wanted = [continuation(loaded, row).wanted for row in rows]
    recalls = [[rouge_l_recall(answer, text) for text in drawn] for answer, drawn in zip(wanted, texts, strict=True)]
    if target.accelerator.is_main_process:
        lines: list[dict[str, Any]] = [{"row": n, "rouge_l_recall": own} for n, own in enumerate(recalls, 1)]
        if args.texts:
            columns = zip(rows, wanted, texts, recalls, strict=True)
            lines = [{"question": r.question, "answer": w, "sampled": t, "rouge_l_recall": v} for r, w, t, v in columns]
        write_json_lines(target.folder / "sample" / "forget.jsonl", lines)
    best, mean = fmean(map(max, recalls)), fmean(map(fmean, recalls))
    greedy = fmean(record.rouge_l_recall or 0.0 for record in target.records["forget"])
    scores = {"best_rouge_l_recall": best, "mean_rouge_l_recall": mean}
    return Sampled(args.sample, args.sample_temperature, {"forget": scores}, {"rouge_l_recall": best - greedy})


# ---------------------------------------------------------------------------------------------------------- quantization


def _quantized(target: Target, bits: int) -> Quantized:
    """Score the model in `bits` bits."""
    loaded, how = _load_quantized(target.args, target.accelerator, bits)
    sets = _scores(target.measure(loaded, f"quantize{bits}"))
    return Quantized(how, sets, _came_back(sets, target.records["forget"]))


def _load_quantized(args: EvalArgs, accelerator: Accelerator, bits: int) -> tuple[LoadedModel, str]:
    """Load the model in `bits` bits, and say how it got there."""
    if accelerator.device.type == "cuda":
        how = {8: "LLM.int8()", 4: "NF4 in blocks of 64"}[bits]
        return load_model(args, accelerator, "measure", quantization_options(accelerator, bits)), f"bitsandbytes, {how}"
    loaded = load_model(args, accelerator, "measure")
    round_to_nearest(loaded.model, bits)
    scale = {8: "a scale per output", 4: "a scale per 64 weights"}[bits]
    return loaded, f"simulated: linear layers but the output head rounded to the nearest of {2**bits - 1} values, {scale}"


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int) -> None:
    """Round the weights of all linear layers but the output head in place, symmetrically around zero.

    With 8 bits every output has a scale of its own, with 4 every 64 weights in a row.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T  # [outputs, inputs]
            weight.copy_(_rounded(weight.float(), bits, weight.shape[1] if bits == 8 else 64))


def _rounded(weight: Tensor, bits: int, block: int) -> Tensor:
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / top
    return ((blocks / scale).round() * scale).flatten()[: len(flat)].view_as(weight)


# ----------------------------------------------------------------------------------------------------------- relearning


def make_lesson(args: EvalArgs, source: Source, formatter: Formatter) -> Lesson | None:
    """Choose the rows that relearning teaches, cut to what the model takes; None without relearning.

    Raises:
        InputError: if a row does not fit.
    """
    if not args.relearn:
        return None
    lesson = _rows_to_relearn(args, source)
    rows = [part for row in lesson.rows for part in formatter.cut_passage(row)]
    formatter.check(rows)
    return replace(lesson, rows=rows)


def _rows_to_relearn(args: EvalArgs, source: Source) -> Lesson:
    """Find the rows of `--relearn-rows`."""
    if args.relearn_rows == "forget":
        rows = source.task_rows(args.split, args.task)
        order = seeded(_SEED, "relearn").permutation(len(rows))
        drawn = [rows[k] for k in order[: max(1, round(args.relearn_share * len(rows)))]]
        return Lesson(drawn, f"{len(drawn)} of the {len(rows)} forget rows, drawn once")
    if args.relearn_rows == "retain":
        rows = source.retain_rows(args.split, [args.task])
        if not rows:
            raise InputError("--relearn-rows retain: there are none; give --retain-file, or a file of other rows")
        return Lesson(rows, f"the {len(rows)} rows that are kept, none of the forget set")
    path = Path(args.relearn_rows).expanduser()
    if not path.is_file():
        raise InputError(f"--relearn-rows {args.relearn_rows}: no such file; give forget, retain or a file of rows")
    rows = read_own(path, Columns.of(args))
    return Lesson(rows, f"the {len(rows)} rows of {args.relearn_rows}")


def _relearned(target: Target, lesson: Lesson) -> Relearned:
    """Teach a lesson to the model, and to the retain-only model if there is one."""
    curve, blank = _relearn(replace(target, folder=target.folder / "relearn"), lesson, target.args.model), None
    if target.args.retain_model and target.retain_records:
        other = replace(target, records=target.retain_records, folder=target.folder / "relearn_retain_only")
        blank = _relearn(other, lesson, target.args.retain_model)
    came_back = _rise(curve[-1].sets["forget"], curve[0].sets["forget"])
    return Relearned(lesson.what, len(lesson.rows), curve, blank, came_back)


def _relearn(target: Target, lesson: Lesson, model: str) -> list[Point]:
    """Fine-tune `model` on a lesson; the scores before, every few steps, and at the end."""
    args = target.args
    every = args.relearn_every or max(1, args.relearn // 4)
    curve = [_point(target, lesson, 0, target.records)]
    loaded = load_model(_recipe(target, lesson, model), target.accelerator)
    training = replace(loaded, divided=divides(target.accelerator))  # however it was loaded
    with StepLog(target.folder / "log.jsonl", args.relearn, "relearn", target.accelerator) as log:
        try:
            for record in learn(loaded, lesson.rows, _recipe(target, lesson, model), log):
                step = record["step"]
                if step % every == 0 or step == args.relearn:
                    with at_once(), as_measured(training):  # what is measured is kept, what is taught is not
                        curve.append(_point(target, lesson, step, target.measure(training, f"step{step}")))
        except NonFiniteError as error:
            curve[-1] = replace(curve[-1], stopped=str(error))
    release(loaded)
    del loaded, training
    clear_device_cache(garbage_collection=True)
    return curve


def _recipe(target: Target, lesson: Lesson, model: str) -> Relearning:
    """Say how `model` is fine-tuned: for the steps of `--relearn`, at a rate that decays over the passes they take."""
    args = target.args
    per_epoch = math.ceil(len(lesson.rows) / (args.relearn_batch_size * target.accelerator.num_processes))
    shared = {f.name: getattr(args, f.name) for f in fields(MeasureArgs)} | {"model": model}
    return Relearning(
        **shared,
        learning_rate=args.relearn_lr,
        batch_size=args.relearn_batch_size,
        num_epochs=math.ceil(args.relearn / per_epoch),
        max_steps=args.relearn,
        warmup_epochs=0,
    )


def _point(target: Target, lesson: Lesson, step: int, records: Records) -> Point:
    """Score the attacked sets after a step, and the forget rows that the lesson does not have as a set of their own."""
    taught = {(row.question, row.answer) for row in lesson.rows}
    scores = _scores({name: records[name] for name in target.sets})
    own = zip(records["forget"], target.sets["forget"], strict=False)  # records that were read may lack their texts
    unseen = [record for record, row in own if (row.question, row.answer) not in taught]
    if 0 < len(unseen) < len(records["forget"]):
        scores["forget_unseen"] = set_scores("forget_unseen", unseen, {})
    return Point(step, scores)
