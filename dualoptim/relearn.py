"""Attack by relearning: fine-tune a model that has unlearned on some rows, and see what of the others comes back.

A few of the forgotten rows have brought back most of the rest for many methods (arXiv 2406.13356), and so have rows that say
nothing of it. A model that never saw the forget set learns something from them as well: what counts lies above that.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from accelerate.utils.memory import clear_device_cache

from dualoptim.config.args import LESSONS, EvalArgs, MeasureArgs, Relearning
from dualoptim.data.own import Source
from dualoptim.data.questions import load_questions, not_about, unanswered
from dualoptim.data.readers import Columns, read_own
from dualoptim.data.rows import Row
from dualoptim.data.stream import seeded
from dualoptim.errors import InputError, NonFiniteError
from dualoptim.evaluation.own_answers import answered
from dualoptim.evaluation.records import Records
from dualoptim.evaluation.summarize import set_scores
from dualoptim.evaluation.summary import Attacks, Point, Relearned
from dualoptim.finetune import learn
from dualoptim.models.adapter import base_of
from dualoptim.models.launch import release, say
from dualoptim.models.load import load_model
from dualoptim.models.loaded import LoadedModel, as_measured
from dualoptim.models.sharding import divides
from dualoptim.reporting.log import StepLog
from dualoptim.signals import at_once
from dualoptim.target import Target, rise, scores_of

_SEED = 0  # of the share of the forget set that relearning sees


@dataclass(frozen=True)
class Lesson:
    """The rows that relearning teaches, which of `--relearn-rows` they are, and what they are in words."""

    rows: list[Row]
    what: str
    name: str


def check_relearning(args: EvalArgs, source: Source) -> None:
    """Make sure that there are rows to relearn, and weights that an adapter can be put on.

    Raises:
        InputError: if not.
    """
    for name in args.relearn_rows if args.relearn else ():
        _rows_to_relearn(args, source, name)
    for model in (args.model, args.retain_model) if any(args.relearn_lora) else ():
        if model is not None and base_of(model) != model:
            ranks = " ".join(map(str, args.relearn_lora))
            raise InputError(f"--relearn-lora {ranks}: {model} is an adapter; merge it with dualoptim export {model}")


def make_lessons(args: EvalArgs, source: Source, loaded: LoadedModel) -> list[Lesson]:
    """Choose the rows that relearnings teach, cut to what the model takes; none without relearning.

    Raises:
        InputError: if a row does not fit, the model has no answer to general questions, or half leaves nothing to measure.
    """
    lessons = []
    for name in args.relearn_rows if args.relearn else ():
        lesson = _rows_to_relearn(args, source, name)
        rows = [part for row in lesson.rows for part in loaded.formatter.cut_passage(row)]
        loaded.formatter.check(rows)
        if name == "general":
            rows = not_about(answered(loaded, args, rows), source.task_rows(args.split[0], args.task))
            if not rows:
                raise InputError("--relearn-rows general: the model answers no general question; give a file of other rows")
            lesson = replace(lesson, what=f"{len(rows)} general questions with the model's own answers")
        if name == "half":
            _check_half(args, rows, source.evaluation_sets(args.split[0], args.task)[0].get("forget", []))
        lessons.append(replace(lesson, rows=rows))
    return lessons


def _check_half(args: EvalArgs, taught: Sequence[Row], forget: Sequence[Row]) -> None:
    """Make sure that the half which is not taught measures relearning: `--eval-rows` may leave none of it.

    Raises:
        InputError: if not.
    """
    known = _texts(taught)
    others = [n for n, row in enumerate(forget, 1) if (row.question, row.answer) not in known]
    if not others:
        raise InputError("--relearn-rows half: there are no other forget rows to measure; give general, or a file of rows")
    if args.eval_rows and args.eval_rows < others[0]:
        raise InputError(f"--eval-rows {args.eval_rows}: --relearn-rows half teaches them all; give {others[0]} or more")


def _texts(rows: Sequence[Row]) -> set[tuple[str | None, str]]:
    return {(row.question, row.answer) for row in rows}


def _rows_to_relearn(args: EvalArgs, source: Source, name: str) -> Lesson:
    """Find the rows of one of `--relearn-rows`; general questions are still to be answered."""
    if name in ("forget", "half"):
        rows, share = source.task_rows(args.split[0], args.task), args.relearn_share if name == "forget" else 0.5
        order = seeded(_SEED, "relearn").permutation(len(rows))
        drawn = [rows[k] for k in order[: max(1, round(share * len(rows)))]]
        return Lesson(drawn, f"{len(drawn)} of the {len(rows)} forget rows, drawn once", name)
    if name == "retain":
        if not (rows := source.retain_rows(args.split[0], [args.task])):
            raise InputError("--relearn-rows retain: there are none; give --retain-file, or a file of other rows")
        return Lesson(rows, f"the {len(rows)} rows that are kept, none of the forget set", name)
    if name == "general":
        return Lesson(unanswered(load_questions(None)), "general questions", name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"--relearn-rows {name}: no such file; give {', '.join(LESSONS)} or a file of rows")
    rows = read_own(path, Columns.of(args))
    return Lesson(rows, f"the {len(rows)} rows of {name}", name)


def relearn(target: Target, lessons: Sequence[Lesson]) -> Attacks:
    """Teach every lesson, as long, at the rates and with the ranks asked for, and the retain-only model if there is one.

    Of several each has a folder of its own, numbered in order.
    """
    found = {}
    chosen = list(_choices(target.args, lessons))
    for number, (lesson, args) in enumerate(chosen, 1):
        part = f"/{number}" if len(chosen) > 1 else ""
        found[_name(lesson, args)] = _relearned(replace(target, args=args), lesson, part)
    strongest = max(found.values(), key=_strength, default=None)
    return Attacks(relearn=strongest, relearnings=found if len(found) > 1 else None)


def _choices(args: EvalArgs, lessons: Sequence[Lesson]) -> Iterator[tuple[Lesson, EvalArgs]]:
    """Give every lesson with arguments that name one number of steps, rate and rank."""
    for lesson, steps, rate, rank in product(lessons, args.relearn, args.relearn_lr, args.relearn_lora):
        yield lesson, replace(args, relearn=(steps,), relearn_lr=(rate,), relearn_lora=(rank,))


def _name(lesson: Lesson, args: EvalArgs) -> str:
    (steps,), (rate,), (rank,) = args.relearn, args.relearn_lr, args.relearn_lora
    return f"{lesson.name}, {steps} steps at {rate:g}" + (f", LoRA of rank {rank}" if rank else "")


def _strength(relearned: Relearned) -> float:
    """Say how much came back, above the retain-only model where there is one."""
    if relearned.above_retain_only is not None:
        return relearned.above_retain_only.get("probability", 0.0)
    return relearned.peak.sets.get(relearned.counts, {}).get("probability", 0.0) if relearned.peak else 0.0


def _relearned(target: Target, lesson: Lesson, part: str) -> Relearned:
    """Teach a lesson to the model, and to the retain-only model if there is one; `part` ends their folders' names."""
    args = target.args
    curve, blank = _relearn(replace(target, folder=target.folder / f"relearn{part}"), lesson, args.model), None
    if args.retain_model and target.retain_records:
        other = replace(target, records=target.retain_records, folder=target.folder / f"relearn_retain_only{part}")
        blank = _relearn(other, lesson, args.retain_model)
    found = Relearned(
        lesson.what,
        len(lesson.rows),
        curve,
        blank,
        learning_rate=args.relearn_lr[0],
        lora_rank=args.relearn_lora[0] or None,
    )
    peak, alone = found.peak or curve[-1], found.peak_retain_only
    above = rise(peak.sets[found.counts], alone.sets[found.counts]) if alone else None
    return replace(found, came_back=rise(peak.sets["forget"], curve[0].sets["forget"]), above_retain_only=above)


def _relearn(target: Target, lesson: Lesson, model: str) -> list[Point]:
    """Fine-tune `model` on a lesson; the scores before, every few steps, and at the end."""
    args, (steps,), (rank,) = target.args, target.args.relearn, target.args.relearn_lora
    way = f"{steps} steps" + (f" of an adapter of rank {rank}" if rank else "")
    say(target.accelerator, f"attack: {model} relearns {lesson.what}, {way}")
    curve = [_point(target, lesson, 0, target.records)]
    loaded = load_model(_recipe(target, lesson, model), target.accelerator)
    training = replace(loaded, divided=divides(target.accelerator))  # however it was loaded
    with StepLog(target.place("log.jsonl"), steps, "relearn", target.accelerator) as log:
        try:
            for record in learn(loaded, lesson.rows, _recipe(target, lesson, model), log):
                step = record["step"]
                if step % (args.relearn_every or max(1, steps // 4)) == 0 or step == steps:
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
    args, (steps,), (rate,), (rank,) = target.args, target.args.relearn, target.args.relearn_lr, target.args.relearn_lora
    per_epoch = math.ceil(len(lesson.rows) / (args.relearn_batch_size * target.accelerator.num_processes))
    shared = {f.name: getattr(args, f.name) for f in fields(MeasureArgs)} | {"model": model}
    return Relearning(
        **shared,
        learning_rate=rate,
        batch_size=args.relearn_batch_size,
        num_epochs=math.ceil(steps / per_epoch),
        max_steps=steps,
        warmup_epochs=0,
        use_lora=rank > 0,
        lora_rank=rank or Relearning.lora_rank,
    )


def _point(target: Target, lesson: Lesson, step: int, records: Records) -> Point:
    """Score the attacked sets after a step, and the forget rows that the lesson does not have as a set of their own."""
    taught = _texts(lesson.rows)
    scores = scores_of({name: records[name] for name in target.sets})
    own = zip(records["forget"], target.sets["forget"], strict=False)  # records that were read may lack their texts
    unseen = [record for record, row in own if (row.question, row.answer) not in taught]
    if 0 < len(unseen) < len(records["forget"]):
        scores["forget_unseen"] = set_scores("forget_unseen", unseen, {})
    return Point(step, scores)
