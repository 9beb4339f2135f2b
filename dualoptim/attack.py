"""Attack a model that has unlearned: does what was forgotten come back?

Each attack changes the questions, how answers are drawn, or the model, and repeats the one scoring pass; a part of the summary
says how far the forget set's scores rose, and how far they lie above a retain-only model's under the same. Rounding the weights
has brought most of it back for many methods (arXiv 2410.16454); relearning stands in `relearn.py`.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator

from dualoptim.atomic import write_json_lines
from dualoptim.config.args import EvalArgs, Rounding
from dualoptim.data.hints import Hinted, after_examples, after_first_words
from dualoptim.data.own import Source
from dualoptim.data.prompts import Formatter
from dualoptim.data.rows import Row
from dualoptim.data.wordings import reworded
from dualoptim.errors import InputError
from dualoptim.evaluation.generation import continuation, sample
from dualoptim.evaluation.rouge import rouge_l_recall, words_beyond
from dualoptim.evaluation.scoring import ScoringPass
from dualoptim.evaluation.summary import Attacked, Attacks, Quantized, Sampled, Scores, SetScores
from dualoptim.models.launch import say
from dualoptim.models.load import load_model, quantization_options
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.rounding import round_weights
from dualoptim.relearn import Lesson, check_relearning, relearn
from dualoptim.target import Target, came_back, rise, scores_of


def check_attacks(args: EvalArgs, accelerator: Accelerator, source: Source) -> None:
    """Make sure that the attacks asked for can run, before anything is written.

    Raises:
        InputError: if not.
    """
    check_relearning(args, source)
    on_cuda = accelerator.device.type == "cuda"
    loads = " ".join(str(kind) for kind in args.quantize if on_cuda and isinstance(kind, int))
    for kind in args.quantize:
        stored = "bitsandbytes" if kind == "nf4" else "gguf"
        package = stored if isinstance(kind, str) else "bitsandbytes" if on_cuda else None
        if package and importlib.util.find_spec(package) is None:
            raise InputError(f"--quantize {kind} needs the package {package}; pip install {package}")
    if loads and (args.model.endswith(".gguf") or (Path(args.model).expanduser() / "adapter_config.json").is_file()):
        raise InputError(f"--quantize {loads}: {args.model} is quantized or an adapter; save it whole with save_pretrained")
    forget = source.evaluation_sets(args.split[0], args.task)[0].get("forget", [])
    if args.paraphrase and not any(reworded(row, args.forget_file is not None) for row in forget):
        raise InputError(f"--paraphrase: the forget rows of {source.name} have no paraphrased_question; drop it")


def hints(args: EvalArgs, forget: Sequence[Row], formatter: Formatter) -> dict[str, Hinted]:
    """Give the forget rows that are measured the hints asked for, by the names of attacks.

    Raises:
        InputError: if no row can have one, or it does not fit.
    """
    rows, found = forget[: args.eval_rows or None], dict[str, Hinted]()
    if args.few_shot:
        found["few_shot"] = after_examples(rows, args.few_shot, formatter)
    if args.prefix_words:
        found["prefix"] = after_first_words(rows, args.prefix_words, formatter)
    return found


def attack_answers(target: Target, loaded: LoadedModel) -> Attacks:
    """Make the attacks on the model as it stands: other questions, and drawn answers."""
    return Attacks(
        paraphrase=_paraphrased(target, loaded) if target.args.paraphrase else None,
        few_shot=_hinted(target, loaded, "few_shot"),
        prefix=_hinted(target, loaded, "prefix"),
        sample=_sampled(target, loaded) if target.args.sample else None,
    )


def attack_weights(target: Target, lessons: Sequence[Lesson], made: Attacks) -> Attacks:
    """Make the attacks on changed weights beside those that were `made`, each of which loads the model anew.

    Transformers answers then: vllm would start anew for every change.
    """
    if target.args.generate_with == "vllm":
        target = replace(target, args=replace(target.args, generate_with="transformers"))
    quantized = {str(kind): _quantized(target, kind) for kind in target.args.quantize}
    found = relearn(target, lessons)
    return replace(made, quantize=quantized or None, relearn=found.relearn, relearnings=found.relearnings)


# ------------------------------------------------------------------------------------------------------------- questions


def _paraphrased(target: Target, loaded: LoadedModel) -> Attacked:
    """Ask the paraphrased questions, of the rows that have one."""
    say(target.accelerator, "attack: questions in other words")
    made = target.args.forget_file is not None
    asked = {
        name: [(n, one) for n in range(len(target.records[name])) for one in reworded(rows[n], made)]
        for name, rows in target.sets.items()
    }
    sets = scores_of(
        target.measure(loaded, "paraphrase", {name: [row for _, row in own] for name, own in asked.items() if own})
    )
    return _above(sets, came_back(sets, [target.records["forget"][n] for n, _ in asked["forget"]]), target.alone.paraphrase)


def _hinted(target: Target, loaded: LoadedModel, name: str) -> Attacked | None:
    """Ask the forget questions with hints, if they have any; the retain set has none."""
    if name not in target.hinted:
        return None
    several, words = target.args.few_shot, target.args.prefix_words
    what = {"few_shot": f"behind {several} others with answers", "prefix": f"with {words} words of the answer"}[name]
    say(target.accelerator, f"attack: questions {what}")
    sets = scores_of(target.measure(loaded, name, {"forget": [row for _, row in target.hinted[name]]}))
    back = came_back(sets, [target.records["forget"][n] for n, _ in target.hinted[name]])
    return replace(_above(sets, back, getattr(target.alone, name)), what=what)


def _above(sets: SetScores, back: Scores, alone: Attacked | None) -> Attacked:
    """Put the scores of an attack beside those of the retain-only model under the same, if there is one."""
    if alone is None:
        return Attacked(sets, back)
    return Attacked(sets, back, alone.sets, rise(sets.get("forget", {}), alone.sets.get("forget", {})))


def _sampled(target: Target, loaded: LoadedModel) -> Sampled:
    """Draw several answers to each forget question: the best and the mean of their ROUGE-L recall."""
    args, scoring = target.args, ScoringPass(loaded, target.args, target.judges)
    say(target.accelerator, f"attack: {args.sample} samples of each answer")
    rows = scoring.scored_rows(target.sets["forget"])
    texts = sample(scoring, rows, args.sample, args.sample_temperature)
    wanted = [continuation(loaded, row).wanted for row in rows]
    recalls = [[rouge_l_recall(answer, text) for text in drawn] for answer, drawn in zip(wanted, texts, strict=True)]
    facts = [words_beyond(row.question, answer) for row, answer in zip(rows, wanted, strict=True)]
    beyond = [max(rouge_l_recall(fact, text) for text in drawn) for fact, drawn in zip(facts, texts, strict=True)]
    if target.accelerator.is_main_process:
        lines: list[dict[str, Any]] = [{"row": n, "rouge_l_recall": own} for n, own in enumerate(recalls, 1)]
        if args.texts:
            columns = zip(rows, wanted, texts, recalls, strict=True)
            lines = [{"question": r.question, "answer": w, "sampled": t, "rouge_l_recall": v} for r, w, t, v in columns]
        write_json_lines(target.place("sample") / "forget.jsonl", lines)
    best, mean = fmean(map(max, recalls)), fmean(map(fmean, recalls))
    greedy = fmean(record.rouge_l_recall or 0.0 for record in target.records["forget"])
    whole = fmean(any(_holds(text, answer) for text in drawn) for answer, drawn in zip(wanted, texts, strict=True))
    scores = {"best_rouge_l_recall": best, "mean_rouge_l_recall": mean, "best_answer_held": whole}
    scores["best_recall_beyond_question"] = fmean(beyond)
    found = Sampled(args.sample, args.sample_temperature, {"forget": scores}, {"rouge_l_recall": best - greedy})
    if (alone := target.alone.sample) is None:
        return found
    names = ("rouge_l_recall", "recall_beyond_question")
    above = {name: scores[f"best_{name}"] - alone.sets["forget"][f"best_{name}"] for name in names}
    return replace(found, retain_only=alone.sets, above_retain_only=above)


def _holds(text: str, answer: str) -> bool:
    """Tell whether a text has an answer in it word for word, whatever the case of letters, blanks and the last full stop."""
    known, said = (" ".join(one.casefold().split()) for one in (answer, text))
    known = known.rstrip(".。")
    return bool(known) and known in said


# ---------------------------------------------------------------------------------------------------------- quantization


def _quantized(target: Target, kind: Rounding) -> Quantized:
    """Score the model with weights that were rounded."""
    say(target.accelerator, f"attack: weights in {kind} bits" if isinstance(kind, int) else f"attack: weights as {kind}")
    loaded, how = _load_quantized(target.args, target.accelerator, kind)
    sets = scores_of(target.measure(loaded, f"quantize{kind}" if isinstance(kind, int) else f"quantize_{kind}"))
    return Quantized(how, sets, came_back(sets, target.records["forget"]))


def _load_quantized(args: EvalArgs, accelerator: Accelerator, kind: Rounding) -> tuple[LoadedModel, str]:
    """Load the model with rounded weights, and say how they got there."""
    if accelerator.device.type == "cuda" and isinstance(kind, int):
        how = {8: "LLM.int8()", 4: "NF4 in blocks of 64"}[kind]
        return load_model(args, accelerator, "measure", quantization_options(accelerator, kind)), f"bitsandbytes, {how}"
    loaded = load_model(args, accelerator, "measure")
    return loaded, round_weights(loaded.model, kind)
