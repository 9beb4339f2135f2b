"""Say a verdict in the same words in the terminal, in a report and on a model card."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dualoptim.evaluation.summary import Summary, Verdict
from dualoptim.evaluation.verdict import headline, judge
from dualoptim.reporting.commands import Settings, said_and_typed, with_model
from dualoptim.reporting.console import wrapped
from dualoptim.reporting.page import Section

VERDICT = "verdict"
"""The column of a table that has a verdict in a few words."""

NEXT = "What to try next:"


def verdict_text(verdict: Verdict | None, settings: Settings | None = None) -> str:
    """Write a verdict for the terminal: what was forgotten and kept, which aims were missed, what to try next.

    Commands are of the model and the data of `settings`, and stay whole, so that they can be copied.
    """
    if verdict is None:
        return "Verdict: none, because nothing was measured."
    lines = [_lead(verdict), *(f"- {one}" for one in verdict.says), *([NEXT] if verdict.tries else [])]
    text = [wrapped(line) for line in lines]
    for said, command in (said_and_typed(with_model(one, settings)) for one in verdict.tries):
        text += [wrapped(f"- {said}"), *([f"  {command}"] if command else [])]
    return "\n".join(text)


def verdict_section(before: Summary | None, after: Summary | None, settings: Settings | None = None) -> Section:
    """Tell a verdict in a part of a report, judging here what an older version measured; nothing where there is no score.

    Commands are of the model and the data of `settings`.
    """
    if after is None:
        return Section("Verdict")
    verdict = after.verdict or judge(before, after)
    tries = [Section(NEXT.rstrip(":"), points=[with_model(one, settings) for one in verdict.tries])] if verdict.tries else []
    lead = _lead(verdict).removeprefix("Verdict: ")
    return Section("Verdict", lead[0].upper() + lead[1:], points=verdict.says, parts=tries)


def verdict_column(summary: Summary | None) -> dict[str, str]:
    """Give the verdict of a summary as a column of its line, none if there is none."""
    return {VERDICT: headline(summary.verdict)} if summary and summary.verdict else {}


def verdict_counts(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Say in a column how many of several lines have each verdict, or once what all of them have; none if none has one."""
    found = Counter(str(line[VERDICT]) for line in lines if line.get(VERDICT))
    several = "; ".join(f"{count} {verdict}" for verdict, count in found.items())
    return {VERDICT: several if len(found) > 1 else next(iter(found))} if found else {}


def _lead(verdict: Verdict) -> str:
    return f"Verdict: {headline(verdict)} (against {verdict.against})."
