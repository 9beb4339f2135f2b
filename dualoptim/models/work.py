"""Turn the rows of a task and the arguments into what the loop takes: phases of terms, a plan, and references."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.flags import flag_name
from dualoptim.config.optimizers import kind_of
from dualoptim.data.prompts import Example
from dualoptim.data.rows import Corpus, Row
from dualoptim.data.stream import ExampleBuilder, Stream
from dualoptim.errors import InputError, counted
from dualoptim.method.objectives import FORGET, PUBLISHED_LAYER, RETAIN, Objective, split_objectives
from dualoptim.method.schedule import Cycle, Plan, steps_per_epoch
from dualoptim.method.scores import score
from dualoptim.method.window import Phase, Term
from dualoptim.models.loaded import LoadedModel, MicroBatches
from dualoptim.models.reference import Frozen, Reader, check_reference
from dualoptim.models.trainable import check_reach


@dataclass(frozen=True)
class TaskRows:
    """The rows that a task forgets and keeps, and refusals for objectives that read them."""

    forget: Sequence[Row]
    retain: Sequence[Row]
    refusals: Sequence[str]

    def corpora(self) -> list[Corpus | None]:
        """List the corpora that are forgotten in turn; None alone where all rows are one."""
        return [*dict.fromkeys(row.corpus for row in self.forget)]

    def of(self, corpus: Corpus | None) -> "TaskRows":
        """Pick the rows of a corpus."""
        forget, retain = ([row for row in rows if row.corpus == corpus] for rows in (self.forget, self.retain))
        return replace(self, forget=forget, retain=retain)


@dataclass(frozen=True)
class Work:
    """What one task asks of the loop: phases of terms, and the steps over them."""

    phases: dict[str, Phase]
    plan: Plan

    def in_words(self) -> str:
        """Say how many steps there are of each phase, over how many examples, at which rates."""
        plan, found = self.plan, []
        for name, phase in self.phases.items():
            steps, rows = plan.steps_of(name), micro_batches(next(iter(phase.terms.values()))).stream.global_batch
            over = f"of {counted(rows, 'row')} ({counted(steps * rows, 'example')}) at rate {phase.learning_rate:g}"
            found.append(f"{counted(steps, f'{name} step')} {over}")
        whole = f"{counted(plan.last_step, 'step')}, {plan.steps_per_epoch:,} an epoch: {', '.join(found)}"
        schedule = f"{plan.schedule} schedule over {counted(plan.total_steps, 'step')}, {plan.warmup_steps:,} of them warm-up"
        return f"{whole}; {schedule}{self._stays_in_warmup()}"

    def _stays_in_warmup(self) -> str:
        """Say that a run ends before its rates are what they say; nothing where it does not."""
        plan = self.plan
        reached = plan.lr_factor(plan.last_step - 1)
        if plan.last_step > plan.warmup_steps or reached == 1:
            return ""
        return f". All of this run is warm-up, so that rates reach {reached:.2g} of what they say; give --warmup-steps 0"

    def referring(self) -> Iterator[tuple[str, str, Objective, Iterator[Example]]]:
        """List phase, term, objective and the texts of each term of which it asks what the frozen model says."""
        for phase_name, phase in self.phases.items():
            for name, term in phase.terms.items():
                steps = min(self.plan.steps_of(phase_name), 1 if term.objective.measured else self.plan.last_step)
                if term.objective.reference and steps:  # a run may end before the turn of a phase
                    yield phase_name, name, term.objective, micro_batches(term).stream.visited(steps)

    def with_reference(self, frozen: Frozen) -> "Work":
        """Give the same with `frozen` as its reference."""
        phases = dict(self.phases)
        for phase, name, objective, texts in self.referring():
            term, reader = phases[phase].terms[name], frozen.reader(objective)
            if objective.measured:
                term = replace(term, objective=_measured(objective, reader, texts))
            else:
                term = replace(term, micro_batches=replace(micro_batches(term), reference=reader))
            phases[phase] = replace(phases[phase], terms=phases[phase].terms | {name: term})
        return replace(self, phases=phases)


def work_of(args: UnlearnArgs, rows: TaskRows, loaded: LoadedModel) -> Work:
    """Say what a task asks for with the one pair and rate of `args`.

    Forget steps take the forget objective's terms, retain steps the retain objective's; an optimizer whose phases do not
    alternate takes all of them in every step. Of several corpora one cycle takes each in turn, and an epoch ends with the
    smallest.
    """
    works = [_of_corpus(args, rows.of(corpus), loaded, number) for number, corpus in enumerate(rows.corpora())]
    if len(works) == 1:
        return works[0]
    pairs = [(corpus, work) for corpus, work in zip(rows.corpora(), works, strict=True) if corpus]
    cycle = tuple((f"{name} {corpus.name}", length) for corpus, work in pairs for name, length in work.plan.cycle)
    phases = {f"{name} {corpus.name}": phase for corpus, work in pairs for name, phase in work.phases.items()}
    plan = replace(works[0].plan, cycle=cycle, steps_per_epoch=len(works) * min(work.plan.steps_per_epoch for work in works))
    return Work(phases, plan)


def _of_corpus(args: UnlearnArgs, rows: TaskRows, loaded: LoadedModel, number: int) -> Work:
    """Say what the rows of one corpus ask for, as if they were all; `number` counts the directions of several, from 0."""
    corpus = rows.forget[0].corpus or Corpus("")
    objectives = split_objectives(args.forget_losses[0])
    constants = {"beta": args.beta if corpus.beta is None else corpus.beta, "gamma": args.gamma}
    forget, retain = (objective and objective.resolved(constants, layer_of(args, loaded)) for objective in objectives)
    assert forget is not None
    if forget.steers and number:
        forget = replace(forget, loss=partial(forget.loss, corpus=number))
    also = "mismatch" if "mismatch" in forget.texts else "apart"
    wanted = {"forget": forget, also: forget.also, "retain": retain}
    terms = {name: _term(name, objective, args, (rows, loaded)) for name, objective in wanted.items() if objective}
    if retain and corpus.regularization_coeff is not None:
        terms["retain"] = replace(terms["retain"], coefficient=corpus.regularization_coeff)
    rate, norm = args.learning_rates[0], args.max_grad_norm
    if not kind_of(args).alternates:
        cycle: Cycle = (("joint", 1),)
        phases = {"joint": Phase(terms, rate, norm)}
    else:
        kept = terms.pop("retain", None)
        forget_norm = norm if args.forget_max_grad_norm is None else args.forget_max_grad_norm
        cycle, phases = (
            (("forget", args.forget_freq),),
            {"forget": Phase(terms, args.forget_lr or rate, forget_norm, args.sam_rho)},
        )
        if kept:
            cycle += (("retain", args.retain_freq),)
            phases["retain"] = Phase({"retain": kept}, rate, norm)
    per_epoch = steps_per_epoch(len(rows.forget), micro_batches(terms["forget"]).stream.global_batch, cycle)
    rates = args.warmup_epochs, args.max_steps, args.warmup_steps, args.lr_schedule
    return Work(phases, Plan(cycle, per_epoch, args.num_epochs, *rates))


def _term(name: str, objective: Objective, args: UnlearnArgs, source: tuple[TaskRows, LoadedModel]) -> Term:
    rows, loaded = source
    retains = name == "retain"
    builder = ExampleBuilder(
        rows.retain if retains else rows.forget,
        loaded.formatter,
        objective.reads,
        args.seed,
        rows.refusals,
        rows.retain,
        score_question=objective.whole_text or not (retains or args.mask),
        first_token=objective.first_token,
        instead=objective.instead,
    )
    order = "retain" if retains else "forget"  # both losses of a phase meet the same rows
    stream = Stream.of(args, order, builder, loaded.share)
    return Term(objective, MicroBatches(stream, loaded.layout), args.regularization_coeff if retains else args.forget_coeff)


def _measured(objective: Objective, reader: Reader, texts: Iterable[Example]) -> Objective:
    """Multiply an objective's beta by how long the frozen model's states are in the phase's first step.

    That is, by the mean over texts of the mean over tokens, as in the code of Adaptive RMU.
    """
    states = (reader([text], torch.device("cpu")).hidden for text in texts)
    length = fmean(float(own.norm(dim=-1).mean()) for own in states if own is not None)
    constants = {**objective.constants, "beta": objective.constants["beta"] * length}
    return replace(objective, constants=constants, reference=None)


def micro_batches(term: Term) -> MicroBatches:
    """Give what a term takes its batches from, which `work_of` has made."""
    assert isinstance(term.micro_batches, MicroBatches)
    return term.micro_batches


def check_objectives(args: UnlearnArgs, tasks: Sequence[TaskRows], loaded: LoadedModel) -> None:
    """Make sure that the rows and the model can serve every pair of objectives.

    Raises:
        InputError: naming the pair and why.
    """
    layer, layers = layer_of(args, loaded), _layers(loaded)
    corpora = [corpus for rows in tasks for corpus in rows.corpora()]
    for name, default in (("beta", None), ("regularization_coeff", 1.0)):
        if (given := getattr(args, name)) != default and all(getattr(corpus, name, None) is not None for corpus in corpora):
            raise InputError(
                f"{flag_name(name)} {given:g}: each corpus of --benchmark {args.benchmark} has {name} of its own; drop the flag"
            )
    has_passages = any(row.question is None for rows in tasks for row in (*rows.forget, *rows.retain))
    for pair in args.forget_losses:
        objectives = [objective for objective in split_objectives(pair) if objective]
        if layer >= layers - 1 and any(objective.needs_layer for objective in objectives):
            raise InputError(
                f"--layer {layer}: {pair} takes one of the model's layers 0 to {layers - 2} (of the last one's output only the "
                "final norm is seen)"
            )
        if any(objective.needs_layer for objective in objectives) and not _hands_on(loaded, layer):
            raise InputError(
                f"--forget-losses {pair}: {type(loaded.model).__name__} hands on no states of its layers, token by token; "
                "choose a pair without RMU and EMBED"
            )
        if any(objective.needs_layer for objective in objectives):
            check_reach(args, loaded.model, layer)
        check_reference(loaded, objectives, reference_folder(args))
        texts = {text for objective in objectives for text in objective.texts}
        if "refusal" in texts and args.idk_file:
            asked = next(row for rows in tasks for row in rows.forget)
            loaded.formatter.check(replace(asked, answer=one, place=f"--idk-file {args.idk_file}") for one in tasks[0].refusals)
        if texts - {"answer"} and has_passages:
            forget, retain = (
                [name for name, objective in table.items() if not objective or objective.texts == {"answer"}]
                for table in (FORGET, RETAIN)
            )
            raise InputError(
                f"--forget-losses {pair}: it compares answers to a question, and passages of text have none; "
                f"take {_either(forget)} with {_either(retain)}"
            )
        if "alternative" in texts and not all(row.alternatives for rows in tasks for row in rows.forget):
            raise InputError(
                f"--forget-losses {pair} needs other answers of the rows to forget; name their column in --forget-file with "
                "--alternative-column, or in a benchmark's YAML file with alternative"
            )
        kept = (own.retain for rows in tasks for own in map(rows.of, rows.corpora()))
        if (len(objectives) > 1 or "mismatch" in texts) and not all(kept):
            raise InputError(f"--forget-losses {pair} needs rows to keep; give --retain-file, or a pair such as NPO+none")


def _hands_on(loaded: LoadedModel, layer: int) -> bool:
    """Tell whether a model gives a state [H] of each token at a layer; some keep several, or none."""
    try:
        with torch.no_grad(), loaded.autocast():
            states = score(loaded.model, loaded.batch([Example([1, 2, 3], 1)]), layer).hidden
    except Exception:  # models that are not ours raise anything
        return False
    return states is not None and states.ndim == 2


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def layer_of(args: UnlearnArgs, loaded: LoadedModel) -> int:
    """Choose the layer that RMU and EMBED read."""
    return min(PUBLISHED_LAYER, _layers(loaded) // 2) if args.layer is None else args.layer


def _layers(loaded: LoadedModel) -> int:
    """Count the model's layers; a configuration that tells of none has none that could be read."""
    return getattr(loaded.model.config.get_text_config(), "num_hidden_layers", 0)


def freeze(works: Sequence[Work], args: UnlearnArgs, load: Callable[[], LoadedModel]) -> Frozen | None:
    """Keep the model as it stands as the reference of `works`, whose texts are scored now; None if none of them asks.

    `load` gives that model, for `Frozen.use`.
    """
    asked = [(objective, texts) for work in works for _, _, objective, texts in work.referring()]
    if not asked:
        return None
    loaded = load()
    frozen = Frozen(loaded, reference_folder(args), [objective for objective, _ in asked], args.eval_batch_size)
    for objective, texts in asked:
        frozen.score(loaded, objective, texts)
    return frozen


def reference_folder(args: UnlearnArgs) -> Path:
    """Say where references of this run are stored."""
    return Path(args.reference_dir or f"{args.output_dir}/reference").expanduser()
