"""Report what runs did and how they compare, in Markdown, as PNGs and as one HTML page.

python -m dualoptim.report RUN [RUN ...]

The page needs no network and no script, and shows light or dark as the reader's system does. Nothing in a report depends on
when or where it is made: the same results give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dualoptim.atomic import NO_ROOM, write_bytes, write_text
from dualoptim.config.cli import main
from dualoptim.config.flags import Flag, check_bounds
from dualoptim.config.values import expect, field_value, settle
from dualoptim.errors import InputError, WriteError
from dualoptim.evaluation.summary import Summary
from dualoptim.reporting import tables
from dualoptim.reporting.ours import check_ours
from dualoptim.reporting.page import Plot, Section, to_html, to_markdown
from dualoptim.reporting.results import sequence, sequence_plot, sequence_table
from dualoptim.reporting.runs import Outcome, find_outcomes
from dualoptim.reporting.sections import section, utility_plot


@dataclass(frozen=True)
class ReportArgs:
    """Describe runs that are finished, or as far as they are: settings, scores before and after, plots, example answers.

    Several runs are compared as well. Writes report.md, report.html and the plots as report/*.png; an earlier report there is
    replaced.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, Flag("data", path=True)]
    """Output folders of train_unlearn.py, of a sweep or of eval_tofu.py, or single task folders."""
    output_dir: Annotated[str | None, Flag("output", "nothing", path=True)] = None
    """Folder that the report is written to. Default: the first RUN."""
    examples: Annotated[int, Flag("output", at_least=0)] = 3
    """Answers per evaluation set that are shown."""
    texts: Annotated[bool, Flag("output")] = True
    """Show them; --no-texts shows none, as --examples 0 does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", field_value(ReportArgs, "runs", self.runs, "RUN"))
        if not self.runs:
            raise InputError("no RUN is given; name the output folder of a run, such as runs/demo")
        settle(self)
        check_bounds(self)


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
    whole = describe(outcomes, ", ".join(names), args.examples if args.texts else 0)
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
    print(f"{len(outcomes)} results, {len(figures)} plots: {folder / 'report.html'}, {folder / 'report.md'}")
    return folder


MANY = 20
"""Results of which each gets its own part, of about a quarter of a megabyte."""


def describe(outcomes: Sequence[Outcome], title: str, examples: int) -> Section:
    """Tell how some outcomes compare, and then each of them, with so many example answers per evaluation set."""
    parts = [_comparison(outcomes)] if len(outcomes) > 1 else []
    groups: dict[Path, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.folder if outcome.task is None else outcome.folder.parent, []).append(outcome)
    for group in groups.values():
        if len(group) > 1:
            parts.append(_sequence(group))
        parts += [section(outcome, examples) for outcome in group] if len(outcomes) <= MANY else []
    many = f"{len(outcomes)} results are too many for a part about each; name one of their folders as RUN for that."
    return Section(f"Unlearning report: {title}", parts=parts, notes=[many] if len(outcomes) > MANY else [])


def _comparison(outcomes: Sequence[Outcome]) -> Section:
    """Put all outcomes side by side: their scores, utility against forgetting, and their settings as far as they differ."""
    columns = ("forget probability", "forget ROUGE-L", "retain probability", "retain ROUGE-L", "model utility")
    rows: list[tuple[str, ...]] = []
    for number, outcome in enumerate(outcomes, 1):
        summary = outcome.after if outcome.after is not None else Summary()
        pairs = [(name, metric) for name in ("forget", "retain") for metric in ("probability", "rouge_l_recall")]
        values = [summary.sets.get(name, {}).get(metric) for name, metric in pairs]
        values += [summary.model_utility, summary.untargeted_forget_efficacy]
        quality = tables.p_value(summary.score("tofu.forget_quality"))
        rows.append((str(number), outcome.label, *map(tables.number, values), quality))
    types = {outcome.label: outcome.after.precision or "float32" for outcome in outcomes if outcome.after is not None}
    mixed = f"Not all were measured in the same precision: {', '.join(f'{one} in {kind}' for one, kind in types.items())}."
    return Section(
        "Comparison",
        "Scores after unlearning, or as evaluated. Scores of the forget set should fall, those of the others stay; model "
        "utility should stay, forget efficacy rise.",
        tables=[tables.Table(("", "result", *columns, "forget efficacy", "forget quality"), rows, left=2)],
        notes=[mixed] if len(set(types.values())) > 1 else [],
        plots=utility_plot("comparison", outcomes),
        parts=[_differing_settings(outcomes)],
    )


def _differing_settings(outcomes: Sequence[Outcome]) -> Section:
    names = list(dict.fromkeys(name for outcome in outcomes for name in tables.asked_first(outcome.kind)))
    known = [outcome for outcome in outcomes if outcome.settings]
    differing = [name for name in names if len({tables.shown_value(outcome.setting(name)) for outcome in known}) > 1]
    head = ("", "result", *(name.replace("_", " ") for name in differing))
    rows = [
        (str(number), outcome.label, *(tables.shown_value(outcome.setting(name)) for name in differing))
        for number, outcome in enumerate(outcomes, 1)
    ]
    return Section("Where their settings differ", tables=[tables.Table(head, rows, left=len(head))] if differing else [])


def _sequence(group: Sequence[Outcome]) -> Section:
    """Tell of a sequence of tasks: every task so far, measured after each; nothing unless all were evaluated."""
    name = group[0].label.rpartition("/")[0] or group[0].folder.resolve().parent.name
    tasks = [outcome.task for outcome in group if outcome.task is not None]
    summaries = [group[0].before, *(outcome.after for outcome in group)]
    measured = [summary for summary in summaries if summary is not None]
    if len(measured) < len(summaries) or len(tasks) < len(group):
        return Section(name)
    standings = sequence(tasks, measured)
    says = "Probability of the true answers of every task so far, of the retain set, and model utility, after each task."
    figure = Plot(f"{name}-tasks", says, sequence_plot(standings))
    return Section(f"{name}, task by task", tables=[sequence_table(standings)], plots=[figure])


if __name__ == "__main__":
    main(ReportArgs, report)
