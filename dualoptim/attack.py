"""Attacks on a model that has unlearned: does what was forgotten come back?

Each changes the model, the questions or how answers are drawn, and repeats the one scoring pass; a block of the summary says
how far the forget set's scores rose. Relearning a few rows and rounding the weights have brought most of it back for many
methods (arXiv 2406.13356, 2410.16454).
"""

import gc
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dualoptim.config.args import CommonArgs, EvalArgs, FinetuneArgs
from dualoptim.models.checkpoint import write_json_lines
from dualoptim.data.tofu import Formatter, OwnFiles, Row, Source, read_own, seeded
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.finetune import fit
from dualoptim.evaluation.metrics import rouge_l_recall
from dualoptim.models.load import Policy, is_sharded, load_policy, quantization_options, release
from dualoptim.evaluation.scoring import ScoringPass, aggregate
from dualoptim.evaluation.measure import measure

Records = Mapping[str, Sequence[dict[str, Any]]]

ATTACKED_SETS = ("forget", "retain")
COMES_BACK = ("probability", "rouge_l_recall", "extraction_strength", "exact_memorization")
"""Scores of the forget set that rise as knowledge comes back."""

_SEED = 0  # of the share of the forget set that relearning sees


def check_attacks(args: EvalArgs, accelerator: Accelerator, source: Source | OwnFiles) -> None:
    """Make sure that the attacks asked for can run, before anything is written.

    Raises:
        InputError: if not.
    """
    if args.relearn:
        if is_sharded(accelerator):
            raise InputError(
                f"--relearn {args.relearn} scores the model while it trains, which needs it whole; start one process or DDP"
            )
        _rows_to_relearn(args, source)
    if args.quantize and accelerator.device.type == "cuda":
        bits = " ".join(map(str, args.quantize))
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(f"--quantize {bits} needs the package bitsandbytes; pip install 'dualoptim[bitsandbytes]'")
        if args.model.endswith(".gguf") or (Path(args.model).expanduser() / "adapter_config.json").is_file():
            raise InputError(f"--quantize {bits}: {args.model} is quantized or an adapter; save it whole with save_pretrained")
    if args.paraphrase and not any(r.paraphrased_question for r in source.evaluation_sets(args.split, args.task)[0]["forget"]):
        raise InputError(f"--paraphrase: the forget rows of {source.name} have no paraphrased_question; drop it")


def run_attacks(
    scoring: ScoringPass,
    sets: dict[str, list[Row]],
    taught: tuple[list[Row], str],
    now: Records,
    retain_now: Records | None,
    folder: Path,
) -> dict[str, Any]:
    """Every attack asked for: its block by name. `taught` are `relearning_rows`, `now` the records of the model as it stands,
    `retain_now` those of the retain-only model. The policy's model is another one afterwards, or gone.
    """
    args = scoring.args
    assert isinstance(args, EvalArgs)
    scoring = replace(scoring, private=False)
    sets = {name: rows for name, rows in sets.items() if name in ATTACKED_SETS}
    blocks: dict[str, Any] = {}
    if args.paraphrase:
        with_one = {
            name: [n for n, row in enumerate(scoring.used(rows)) if row.paraphrased_question] for name, rows in sets.items()
        }
        asked = {
            name: [replace(sets[name][n], question=sets[name][n].paraphrased_question) for n in numbers]
            for name, numbers in with_one.items()
            if numbers
        }
        before = [now["forget"][n] for n in with_one["forget"]]
        blocks["paraphrase"] = _block(measure(scoring, asked, folder / "paraphrase"), before)
    if args.sample:
        blocks["sample"] = _sample(scoring, args, sets["forget"], now, folder / "sample")
    for bits in args.quantize:
        scoring.policy.model = None  # before another one is loaded
        scoring.policy, how = _quantized(args, scoring.accelerator, bits)
        records = measure(scoring, sets, folder / f"quantize{bits}")
        blocks.setdefault("quantize", {})[str(bits)] = {"how": how, **_block(records, now["forget"])}
    if args.relearn:
        scoring.policy.model = None
        rows, what = taught
        block: dict[str, Any] = {"what": what, "rows": len(rows)}
        block["curve"] = _relearn(scoring, args, args.model, rows, sets, now, folder / "relearn")
        if args.retain_model and retain_now:
            path = folder / "relearn_retain_only"
            block["retain_only"] = _relearn(scoring, args, args.retain_model, rows, sets, retain_now, path)
        first, last = (block["curve"][place]["sets"]["forget"] for place in (0, -1))
        blocks["relearn"] = {**block, "came_back": _difference(last, first)}
    return blocks


def _block(records: Records, before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Set scores under an attack, and how far those of the forget set rose, whose records `before` are of the same rows."""
    scores = {name: aggregate(name, rows, {}) for name, rows in records.items()}
    return {"sets": scores, "came_back": _difference(scores.get("forget", {}), aggregate("forget", before, {}))}


def _difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {metric: after[metric] - before[metric] for metric in COMES_BACK if metric in after and metric in before}


# ------------------------------------------------------------------------------------------------------------- sampling


def _sample(scoring: ScoringPass, args: EvalArgs, rows: list[Row], now: Records, folder: Path) -> dict[str, Any]:
    """The best and the mean of K drawn answers to each forget question, by ROUGE-L recall."""
    texts = scoring.sampled("forget", rows, args.sample, args.sample_temperature)
    used = scoring.used(rows)
    wanted = [scoring.prompt(row).wanted for row in used]
    recalls = [[rouge_l_recall(answer, text) for text in drawn] for answer, drawn in zip(wanted, texts, strict=True)]
    if scoring.accelerator.is_main_process:
        columns = zip(used, wanted, texts, recalls, strict=True)
        lines = [{"question": r.question, "answer": w, "sampled": t, "rouge_l_recall": v} for r, w, t, v in columns]
        write_json_lines(folder / "forget.jsonl", lines)
    best, mean = fmean(map(max, recalls)), fmean(map(fmean, recalls))
    greedy = fmean(record["rouge_l_recall"] for record in now["forget"])
    return {
        "samples": args.sample,
        "temperature": args.sample_temperature,
        "sets": {"forget": {"best_rouge_l_recall": best, "mean_rouge_l_recall": mean}},
        "came_back": {"rouge_l_recall": best - greedy},
    }


# --------------------------------------------------------------------------------------------------------- quantization


def _quantized(args: EvalArgs, accelerator: Accelerator, bits: int) -> tuple[Policy, str]:
    """The model in `bits` bits, and how it got there."""
    if accelerator.device.type == "cuda":
        how = {8: "LLM.int8()", 4: "NF4 in blocks of 64"}[bits]
        return load_policy(args, accelerator, quantization_options(accelerator, bits)), f"bitsandbytes, {how}"
    policy = load_policy(args, accelerator)
    round_to_nearest(policy.model, bits)
    scale = {8: "a scale per output", 4: "a scale per 64 weights"}[bits]
    return policy, f"simulated: linear layers but the output head rounded to the nearest of {2**bits - 1} values, {scale}"


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int) -> None:
    """Round the weights of all linear layers but the output head in place, symmetrically around zero.

    With 8 bits every output has a scale of its own, with 4 every 64 weights in a row.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T  # [outputs, inputs]
            weight.copy_(_rounded(weight, bits, weight.shape[1] if bits == 8 else 64))


def _rounded(weight: Tensor, bits: int, block: int) -> Tensor:
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / top
    return ((blocks / scale).round() * scale).flatten()[: len(flat)].view_as(weight)


# ----------------------------------------------------------------------------------------------------------- relearning


def relearning_rows(args: EvalArgs, source: Source | OwnFiles, formatter: Formatter) -> tuple[list[Row], str]:
    """The rows that relearning is to be taught, cut to what the model takes, and what they are in words; none without it.

    Raises:
        InputError: if a row does not fit.
    """
    if not args.relearn:
        return [], ""
    rows, what = _rows_to_relearn(args, source)
    rows = [part for row in rows for part in formatter.cut_passage(row)]
    formatter.check(rows)
    return rows, what


def _rows_to_relearn(args: EvalArgs, source: Source | OwnFiles) -> tuple[list[Row], str]:
    """The rows of `--relearn-rows`, and what they are in words."""
    if args.relearn_rows == "forget":
        rows = source.task_rows(args.split, args.task)
        order = seeded(_SEED, "relearn").permutation(len(rows))
        drawn = [rows[k] for k in order[: max(1, round(args.relearn_share * len(rows)))]]
        return drawn, f"{len(drawn)} of the {len(rows)} forget rows, drawn once"
    if args.relearn_rows == "retain":
        rows = source.retain_rows(args.split, [args.task])
        if not rows:
            raise InputError("--relearn-rows retain: there are none; give --retain-file, or a file of other rows")
        return rows, f"the {len(rows)} rows that are kept, none of the forget set"
    path = Path(args.relearn_rows).expanduser()
    if not path.is_file():
        raise InputError(f"--relearn-rows {args.relearn_rows}: no such file; give forget, retain or a file of rows")
    rows = read_own(path, args.question_column, args.answer_column, args.text_column)
    return rows, f"the {len(rows)} rows of {args.relearn_rows}"


def _relearn(
    scoring: ScoringPass,
    args: EvalArgs,
    model: str,
    rows: list[Row],
    sets: dict[str, list[Row]],
    now: Records,
    folder: Path,
) -> list[dict[str, Any]]:
    """Fine-tune `model` on `rows`; the scores before, every few steps, and at the end."""
    accelerator = scoring.accelerator
    per_epoch = math.ceil(len(rows) / (args.relearn_batch_size * accelerator.num_processes))
    shared = {f.name: getattr(args, f.name) for f in fields(CommonArgs)} | {"model": model}
    training = FinetuneArgs(
        **shared,
        learning_rate=args.relearn_lr,
        batch_size=args.relearn_batch_size,
        num_epochs=math.ceil(args.relearn / per_epoch),
        max_steps=args.relearn,
        warmup_epochs=0,
    )
    policy = load_policy(training, accelerator)
    seen = {(row.question, row.answer) for row in rows}
    every = args.relearn_every or max(1, args.relearn // 4)

    def point(step: int, records: Records) -> dict[str, Any]:
        scores = {name: aggregate(name, records[name], {}) for name in sets}
        unseen = [row for row in records["forget"] if (row["question"], row["answer"]) not in seen]
        if 0 < len(unseen) < len(records["forget"]):
            scores["forget_unseen"] = aggregate("forget_unseen", unseen, {})
        return {"step": step, "sets": scores}

    curve = [point(0, now)]

    def after_step(step: int) -> None:
        if step % every == 0 or step == args.relearn:
            # without the wrapper of several processes, whose forward waits for those that have no rows left
            whole = replace(policy, model=accelerator.unwrap_model(policy.model))
            curve.append(point(step, measure(replace(scoring, policy=whole), sets, folder / f"step{step}")))

    try:
        fit(policy, accelerator, rows, training, folder / "log.jsonl", "relearn", after_step)
    except NonFiniteError as error:
        curve[-1]["stopped"] = str(error)
    release(policy, accelerator)
    policy.model = None
    gc.collect()
    return curve
