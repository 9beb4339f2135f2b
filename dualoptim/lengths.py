"""Measure how long the texts of a run are, of its data and its tokenizer alone: `--dry-run` plans activations by it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.config.product import single_runs
from dualoptim.data.demo import tiny_model
from dualoptim.data.own import OwnFiles, load_refusals, open_source
from dualoptim.data.prompts import Example, Formatter, make_formatter
from dualoptim.data.questions import ANSWER_TOKENS, unanswered
from dualoptim.errors import InputError, OutOfReachError
from dualoptim.job import Job
from dualoptim.models.adapter import base_of
from dualoptim.models.load import load_config, read_prompting
from dualoptim.models.loaded import Layout, LoadedModel
from dualoptim.models.memory import Lengths
from dualoptim.models.work import Work, micro_batches, work_of


def lengths_of(args: UnlearnArgs, accelerator: Accelerator, model: Any) -> Lengths:
    """Tokenize what a run with `args` reads, and find its longest micro-batch and the longest text of its evaluation.

    `model` may have no weights (meta device).

    Raises:
        OutOfReachError: if the tokenizer cannot be read, or data that are not on this machine.
        InputError: if other data cannot be read, or a text does not fit.
    """
    job = Job(args, accelerator, open_source(args), load_refusals(args.idk_file), None)
    if args.model == DEMO:
        formatter, template = make_formatter(args, tiny_model(args.seed)[1])
    else:
        _, source, options = load_config(args)
        try:
            formatter, template = read_prompting(args, base_of(args.model), (source, options))
        except InputError as error:  # a configuration alone can be planned
            raise OutOfReachError(str(error)) from None
    loaded = LoadedModel(model, formatter, template, accelerator, Layout(accelerator.device, packed=True))
    job.source.cut(formatter)
    if args.makes_rows and isinstance(job.source, OwnFiles):  # by a model that has no weights here
        questions = (str(row.question) for row in job.source.rows("retain"))
        job.source.keep(unanswered(questions, "word " * ANSWER_TOKENS))
    works = list(_works(job, loaded))
    batches = {which: work for which, _, work in reversed(works)}  # those of every rate are the same
    found = [_size(texts) for work in batches.values() for texts in _micro_batches(work)]
    steps = tuple(f"{what}: {work.in_words()}" for _, what, work in works)
    return Lengths(
        max(tokens for tokens, _ in found), max(scored for _, scored in found), _longest(job, formatter), steps=steps
    )


def _size(texts: Sequence[Example]) -> tuple[int, int]:
    """Count the tokens of a micro-batch, and those that are scored."""
    return sum(len(text.ids) for text in texts), sum(len(text.ids) - text.start for text in texts)


def _works(job: Job, loaded: LoadedModel) -> Iterator[tuple[tuple[str, int], str, Work]]:
    """Say what each pair and rate does for each task: which pair and task, both and the rate in words, the work."""
    for one in single_runs(replace(job.args, learning_rates=job.args.rates)):
        pair, rate = one.forget_losses[0], one.learning_rates[0]
        for own, position in replace(job, args=one).each_task():
            task = own.args.task_list[position]
            what = f"{pair}, rate {rate:g}, {own.source.describe(own.args.split[0], task)}"
            yield (pair, task), what, work_of(one, own.rows(position), loaded)


def _micro_batches(work: Work) -> Iterator[list[Example]]:
    """Give all micro-batches of all processes."""
    for name, phase in work.phases.items():
        streams = [micro_batches(term).stream for term in phase.terms.values()]
        for step in range(work.plan.steps_of(name)):
            for stream in streams:
                for process in range(stream.processes):
                    yield from replace(stream, process=process).window(step)


def _longest(job: Job, formatter: Formatter) -> int:
    """Find the longest text of all that is measured: as it stands, or a question with the longest answer that may be given."""
    longest = 1
    for own, position in job.each_task():
        for rows in own.evaluation_sets(position)[0].values():
            for row in rows:
                texts = [formatter.of_row(row, text) for text in row.texts()]
                answered = (row.asking and row.asking.tokens) or job.args.max_new_tokens
                longest = max(longest, *(len(text.ids) for text in texts), texts[0].start + answered)
    return longest
