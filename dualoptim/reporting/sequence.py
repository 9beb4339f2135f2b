"""Line up what a model knows before and after each of several tasks, and write it beside their folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualoptim.atomic import write_bytes
from dualoptim.evaluation.summary import Scores, Summary
from dualoptim.reporting import plots
from dualoptim.reporting.results import TaskResult, before_and_after, titles, write_table
from dualoptim.reporting.tables import Table, number
from dualoptim.reporting.verdicts import verdict_column


@dataclass(frozen=True)
class Standing:
    """What a model knows after a task of a sequence: of every task's rows, and of what is kept. None: not measured."""

    after_task: int | str  # "before" the first
    tasks: Mapping[int, Scores]
    all_tasks_probability: float | None  # the mean over the tasks unlearned so far
    retain_probability: float | None
    model_utility: float | None
    untargeted_forget_efficacy: float | None
    verdict: Mapping[str, str] = field(default_factory=dict)  # as a column, of a model that has one

    def columns(self) -> dict[str, str | int | float | None]:
        """Make it a line of tasks.csv."""
        line: dict[str, str | int | float | None] = {"after_task": self.after_task}
        for task, scores in self.tasks.items():
            line |= {f"task{task}_{metric}": scores.get(metric) for metric in ("probability", "rouge_l_recall")}
        for name in ("all_tasks_probability", "retain_probability", "model_utility", "untargeted_forget_efficacy"):
            line[name] = getattr(self, name)
        return line | dict(self.verdict)


def sequence(tasks: Sequence[int], before: Sequence[Summary], after: Sequence[Summary]) -> list[Standing]:
    """Line up what the model knew before the first of `tasks` and after each: does it remember task 1 again after task 5?

    The summaries are those `before` and `after` each task. Its own rows are measured just before its turn and from then on.
    """
    found = []
    for done, summary in enumerate([before[0], *after]):
        own = {task: summary.sets.get(f"forget_task{task}", {}) for task in tasks}
        own |= {task: summary.sets.get("forget", {}) for task in tasks[:done][-1:]}
        own |= {task: one.sets.get("forget", {}) for task, one in zip(tasks[done:], before[done : done + 1], strict=False)}
        seen = [own[task]["probability"] for task in tasks[:done] if "probability" in own[task]]
        found.append(
            Standing(
                after_task=tasks[done - 1] if done else "before",
                tasks=own,
                all_tasks_probability=sum(seen) / len(seen) if seen else None,
                retain_probability=summary.sets.get("retain", {}).get("probability"),
                model_utility=summary.model_utility,
                untargeted_forget_efficacy=summary.untargeted_forget_efficacy,
                verdict=verdict_column(summary),
            )
        )
    return found


def sequence_table(standings: Sequence[Standing]) -> Table:
    """Show a sequence as a table, without ROUGE-L."""
    lines = [standing.columns() for standing in standings]
    shown = [name for name in lines[-1] if not name.endswith("rouge_l_recall")]
    return Table(titles(shown), [tuple(number(line.get(name)) for name in shown) for line in lines])


def sequence_plot(standings: Sequence[Standing]) -> plots.Draw:
    """Draw a sequence: a curve per task, of the retain set and of the utility."""
    several = len(standings) > 2
    after = [f"{standing.after_task}" if several else "after" for standing in standings[1:]]
    names = {task: f"task {task}" if several else "forget set" for task in standings[0].tasks}
    curves = {name: [one.tasks[task].get("probability") for one in standings] for task, name in names.items()}
    curves |= {
        "retain set": [standing.retain_probability for standing in standings],
        plots.UTILITY: [standing.model_utility for standing in standings],
    }
    return plots.tasks(["before", *after], curves, "after task" if several else "")


def write_sequence(folder: Path, results: Sequence[TaskResult]) -> Table:
    """Write the `SEQUENCE_FILES` of one pair and rate, whose tasks were evaluated, and return the table."""
    standings = sequence([result.task for result in results], *before_and_after(results))
    table = write_table(folder / "tasks.csv", [standing.columns() for standing in standings], sequence_table(standings))
    write_bytes(folder / "tasks.png", plots.render(sequence_plot(standings)).png)
    return table
