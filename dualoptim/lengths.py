"""Measure how long the texts of a run are, of its data and its tokenizer alone: `--dry-run` plans activations by it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.data.demo import tiny_model
from dualoptim.data.own import load_refusals, open_source
from dualoptim.data.prompts import Example, Formatter, make_formatter
from dualoptim.job import Job
from dualoptim.models.adapter import base_of
from dualoptim.models.load import load_config, read_prompting
from dualoptim.models.loaded import Layout, LoadedModel
from dualoptim.models.memory import Lengths
from dualoptim.models.work import micro_batches, work_of


def lengths_of(args: UnlearnArgs, accelerator: Accelerator, model: Any) -> Lengths:
    """Tokenize what a run with `args` reads, and find its longest micro-batch and the longest text of its evaluation.

    `model` may have no weights (meta device).

    Raises:
        InputError: if data or tokenizer cannot be read, or a text does not fit.
    """
    if args.model == DEMO:
        formatter, template = make_formatter(args, tiny_model(args.seed)[1])
    else:
        _, source, options = load_config(args)
        formatter, template = read_prompting(args, base_of(args.model), (source, options))
    loaded = LoadedModel(model, formatter, template, accelerator, Layout(accelerator.device, packed=True))
    job = Job(args, accelerator, open_source(args), load_refusals(args.idk_file), None)
    job.source.cut(formatter)
    found = [_size(texts) for texts in _micro_batches(job, loaded)]
    return Lengths(max(tokens for tokens, _ in found), max(scored for _, scored in found), _longest(job, formatter))


def _size(texts: Sequence[Example]) -> tuple[int, int]:
    """Count the tokens of a micro-batch, and those that are scored."""
    return sum(len(text.ids) for text in texts), sum(len(text.ids) - text.start for text in texts)


def _micro_batches(job: Job, loaded: LoadedModel) -> Iterator[list[Example]]:
    """Give all micro-batches of all processes, for every pair and task."""
    args = job.args
    for pair in args.forget_losses:
        one = replace(args, forget_losses=(pair,), learning_rates=args.rates)
        for position in range(len(args.task_list)):
            work = work_of(one, job.rows(position), loaded)
            for name, phase in work.phases.items():
                streams = [micro_batches(term).stream for term in phase.terms.values()]
                for step in range(work.plan.steps_of(name)):
                    for stream in streams:
                        for process in range(stream.processes):
                            yield from replace(stream, process=process).window(step)


def _longest(job: Job, formatter: Formatter) -> int:
    """Find the longest text of all that is measured: as it stands, or a question with the longest answer that may be given."""
    longest = 1
    for position in range(len(job.args.task_list)):
        for rows in job.evaluation_sets(position)[0].values():
            for row in rows:
                texts = [formatter.of_row(row, text) for text in row.texts()]
                answered = (row.asking and row.asking.tokens) or job.args.max_new_tokens
                longest = max(longest, *(len(text.ids) for text in texts), texts[0].start + answered)
    return longest
