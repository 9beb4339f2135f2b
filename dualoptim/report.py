"""Report what runs did and how they compare, in Markdown, as PNGs and as one HTML page.

dualoptim report RUN [RUN ...]

The page needs no network and no script, and shows light or dark as the reader's system does. Nothing in a report depends on
when or where it is made: the same results, named alike, give the same bytes.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["report"])

from collections.abc import Iterable, Sequence
from pathlib import Path

from dualoptim.atomic import NO_ROOM, write_bytes, write_text
from dualoptim.config.args import ReportArgs
from dualoptim.config.values import expect
from dualoptim.config.waiting import waiting
from dualoptim.data.rows import OPTION_SETS
from dualoptim.errors import InputError, WriteError, counted
from dualoptim.evaluation.summary import UNSEEN, Summary
from dualoptim.evaluation.verdict import headline, judge
from dualoptim.reporting import tables
from dualoptim.reporting.frontier_tables import frontier_section
from dualoptim.reporting.ours import check_ours
from dualoptim.reporting.page import Plot, Section, to_html, to_markdown
from dualoptim.reporting.results import read_results, side_by_side, side_by_side_table
from dualoptim.reporting.runs import Outcome, find_outcomes
from dualoptim.reporting.sections import section, utility_plot
from dualoptim.reporting.sequence import sequence, sequence_plot, sequence_table


def report(args: ReportArgs) -> Path:
    """Write report.md, report.html and report/*.png, and return the folder.

    Raises:
        InputError: if a RUN holds nothing to report on or cannot be read, or the folder cannot be written.
        WriteError: if the disk is full.
    """
    expect(args, ReportArgs)
    runs = list({path.resolve(): path for path in (Path(run).expanduser() for run in args.runs)}.values())
    names = [run.resolve().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    labels = names if len(runs) > 1 else [""]
    outcomes = [outcome for run, label in zip(runs, labels, strict=True) for outcome in find_outcomes(run, label)]
    lines = [line for run in runs for line in read_results(run / "results.csv") or () if "optim" in line]  # of sweeps
    whole = describe(outcomes, ", ".join(names), args.examples if args.texts else 0, frontier_section(lines))
    with waiting("drawing"):
        page, figures = to_html(whole), whole.all_plots()
    folder = Path(args.output_dir).expanduser() if args.output_dir else runs[0]
    try:
        check_ours([folder / name for name in ("report.md", "report.html", "report")])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.md", to_markdown(whole)), ("report.html", page)):
            # names of folders, and what a model answers, may hold halves of characters, which no file of text takes
            write_text(folder / name, text.encode(errors="backslashreplace").decode())
        for figure in figures:
            write_bytes(folder / "report" / figure.file, figure.picture.png)
    except OSError as error:
        if error.errno in NO_ROOM:
            what = f"{error.filename or folder} cannot be written ({error.strerror}); make room"
            raise WriteError(what, "repeat the command") from None
        raise InputError(f"--output-dir: {error.filename} cannot be written ({error.strerror}); give another folder") from None
    print(
        f"{counted(len(outcomes), 'result')}, {counted(len(figures), 'plot')}: {folder / 'report.html'}, {folder / 'report.md'}"
    )
    return folder


MANY = 20
"""Results of which each gets its own part, of about a quarter of a megabyte."""


def describe(outcomes: Sequence[Outcome], title: str, examples: int, *first: Section) -> Section:
    """Tell how some outcomes compare, and then each of them, with so many example answers per evaluation set.

    Parts that come `first` stand before all others.
    """
    parts = [*first, *([_comparison(outcomes)] if len(outcomes) > 1 else [])]
    groups: dict[Path, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.folder if outcome.task is None else outcome.folder.parent, []).append(outcome)
    for group in groups.values():
        if len(group) > 1:
            parts.append(_independent(group) if all(one.setting("tasks_independent") for one in group) else _sequence(group))
        parts += [section(outcome, examples) for outcome in group] if len(outcomes) <= MANY else []
    many = f"{len(outcomes)} results are too many for a part about each; name one of their folders as RUN for that."
    return Section(f"Unlearning report: {title}", parts=parts, notes=[many] if len(outcomes) > MANY else [])


def _comparison(outcomes: Sequence[Outcome]) -> Section:
    """Put all outcomes side by side: their scores, utility against forgetting, and their settings as far as they differ."""
    unseen = [UNSEEN] if any(one.after is not None and UNSEEN in one.after.sets for one in outcomes) else []
    columns = ("forget probability", "forget ROUGE-L", "retain probability", "retain ROUGE-L", *map(tables.set_title, unseen))
    others = ("model utility", "forget efficacy", "forget quality")
    rows: list[tuple[str, ...]] = []
    found: dict[str, None] = {}
    for number, outcome in enumerate(outcomes, 1):
        summary = outcome.after if outcome.after is not None else Summary()
        pairs = [(name, metric) for name in ("forget", "retain") for metric in ("probability", "rouge_l_recall")]
        pairs += [(name, "probability") for name in unseen]
        values = [summary.sets.get(name, {}).get(metric) for name, metric in pairs]
        sets = [*((name,) for name, _ in pairs), _KEPT, ("forget",), ("forget",)]  # that each score is of
        values += [summary.model_utility, summary.untargeted_forget_efficacy]
        verdict = headline(summary.verdict or judge(outcome.before, summary)) if outcome.after is not None else "-"
        quality = tables.p_value(summary.score("tofu.forget_quality"))
        cells = (*map(tables.number, values), quality)
        marks = ["" if cell == "-" else _marks(outcome, outcomes[0], own) for cell, own in zip(cells, sets, strict=True)]
        found |= dict.fromkeys("".join(marks))
        rows.append((str(number), outcome.label, verdict, *map("".join, zip(cells, marks, strict=True))))
    types = {outcome.label: outcome.after.precision or "float32" for outcome in outcomes if outcome.after is not None}
    mixed = f"Not all were measured in the same precision: {', '.join(f'{one} in {kind}' for one, kind in types.items())}."
    otherwise = ", ".join(f"{mark} {_MARKS[mark]}" for mark in found)
    notes = [f"Not measured as result 1 is, from which a difference may come: {otherwise}."] if found else []
    return Section(
        "Comparison",
        "Scores after unlearning, or as evaluated. Scores of the forget set should fall, those of the others stay; model "
        "utility should stay, forget efficacy rise.",
        tables=[tables.Table(("", "result", "verdict", *columns, *others), rows, left=3).measured()],
        notes=[*notes, *([mixed] if len(set(types.values())) > 1 else [])],
        plots=utility_plot("comparison", outcomes),
        parts=[_differing_settings(outcomes)],
    )


_KEPT = ("retain", *OPTION_SETS)
"""The sets that make the model utility."""

_MARKS = {"*": "other rows", "†": "another --max-new-tokens", "‡": "another --seed"}
"""What makes scores differ beside the method, by the mark of scores that were measured otherwise than the first result's."""


def _marks(outcome: Outcome, first: Outcome, sets: Iterable[str]) -> str:
    """Give the marks of a score of some sets: of what is known to be otherwise than of the first outcome's."""
    if outcome.after is None:
        return ""
    rows = any(_other_rows(outcome, first, name) for name in sets if name in outcome.after.sets)
    tokens, seed = (_differs(outcome.setting(name), first.setting(name)) for name in ("max_new_tokens", "seed"))
    return "".join(mark for mark, otherwise in zip(_MARKS, (rows, tokens, seed), strict=True) if otherwise)


def _other_rows(outcome: Outcome, first: Outcome, name: str) -> bool:
    """Tell whether a set has other rows: of other data or of another task, if no hash says that they are the same."""
    if name in outcome.measured and outcome.measured[name] == first.measured.get(name):
        return False
    names = ("data", "benchmark", "split", "forget_file", "retain_file")
    known = []
    for one in (outcome, first):
        task = one.setting("task") if one.task is None else one.task
        known.append((*map(one.setting, names), task, one.after and one.after.rows.get(name)))
    return any(map(_differs, *known))


def _differs(one: object, other: object) -> bool:
    return one is not None and other is not None and one != other


def _differing_settings(outcomes: Sequence[Outcome]) -> Section:
    names = list(dict.fromkeys(name for outcome in outcomes for name in tables.asked_first(outcome.kind)))
    known = [outcome for outcome in outcomes if outcome.settings]
    differing = [name for name in names if len({tables.shown_value(outcome.read(name)) for outcome in known}) > 1]
    head = ("", "result", *(name.replace("_", " ") for name in differing))
    rows = [
        (str(number), outcome.label, *(tables.shown_value(outcome.read(name)) for name in differing))
        for number, outcome in enumerate(outcomes, 1)
    ]
    return Section("Where their settings differ", tables=[tables.Table(head, rows, left=len(head))] if differing else [])


def _independent(group: Sequence[Outcome]) -> Section:
    """Put tasks side by side of which each was unlearned from the first model; nothing unless all were evaluated."""
    summaries = [outcome.after for outcome in group if outcome.after is not None]
    tasks = [(one.task, next(iter(one.setting("targets") or ()), None)) for one in group if one.task is not None]
    if len(summaries) < len(group) or len(tasks) < len(group):
        return Section(_name(group))
    says = "Scores after unlearning each task from the first model, and their mean and deviation (n - 1) over tasks."
    before = [outcome.before for outcome in group if outcome.before is not None]
    table = side_by_side_table(side_by_side(tasks, summaries, before))
    return Section(f"{_name(group)}, tasks side by side", says, tables=[table])


def _name(group: Sequence[Outcome]) -> str:
    return group[0].label.rpartition("/")[0] or group[0].folder.resolve().parent.name


def _sequence(group: Sequence[Outcome]) -> Section:
    """Tell of a sequence of tasks: every task so far, measured after each; nothing unless all were evaluated."""
    name = _name(group)
    tasks = [outcome.task for outcome in group if outcome.task is not None]
    before = [outcome.before for outcome in group if outcome.before is not None]
    after = [outcome.after for outcome in group if outcome.after is not None]
    if not len(before) == len(after) == len(tasks) == len(group):
        return Section(name)
    standings = sequence(tasks, before, after)
    says = "Probability of the true answers of every task so far, of the retain set, and model utility, after each task."
    figure = Plot(f"{name}-tasks", says, sequence_plot(standings))
    return Section(f"{name}, task by task", tables=[sequence_table(standings)], plots=[figure])
