"""Tell of each task as it ends: the tables over all so far, and its scores, answers and verdict; on the main process alone."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dualoptim.config.args import UnlearnArgs
from dualoptim.data.demo import is_taught
from dualoptim.reporting.console import example_answers, score_table, shown, wrapped
from dualoptim.reporting.hub import push, repositories
from dualoptim.reporting.methods import METHODS, write_methods
from dualoptim.reporting.results import TaskResult, result_columns, write_results, write_tasks
from dualoptim.reporting.sequence import write_sequence
from dualoptim.reporting.verdicts import verdict_text

_REPEATS = (
    "Why an answer repeats a word: ME makes every next token about as likely as any other, and the one that is ahead by a hair "
    "is then the likeliest at each step."
)
_ATTACK_TAKES = "On the demo's model the attack takes twenty seconds. What it brings back had been hidden, not removed."


def tell(args: UnlearnArgs, results: Sequence[TaskResult]) -> None:
    """Write the tables over all results so far, and print and upload the last of them."""
    last = results[-1]
    folder, lines = Path(str(args.output_dir)), [_line(args, result) for result in results]
    write_results(folder, lines)
    beside = [result for result in results if result.folder.parent == last.folder.parent]
    several = args.eval and len(args.task_list) > 1
    tasks = (write_tasks if args.tasks_independent else write_sequence)(last.folder.parent, beside) if several else None
    if last.before and last.after:
        print("\n" + score_table({"before": last.before, "after": last.after}, explain=len(results) == 1) + "\n")
    if last.before and last.after and args.texts:
        print(example_answers(last.folder / "eval_before", last.folder / "eval", {"forget": 2, "retain": 2}) + "\n")
    verdict = last.after.verdict if last.after else None
    if verdict and args.texts and last.losses.startswith("ME") and "forget.token_entropy" in verdict.missed:
        print(f"{wrapped(_REPEATS)}\n")
    own = vars(args) | {"model": last.model, "split": last.split, "task": last.task, "targets": last.target}
    print(f"{verdict_text(verdict, own | {'learning_rates': (last.learning_rate,)})}\n")
    if verdict and "--relearn" in "".join(verdict.tries) and is_taught(args.model):
        print(f"{wrapped(_ATTACK_TAKES)}\n")
    print(f"model: {last.model}")
    if args.push_to_hub:
        print(push(last.model, repositories(args)[last.losses, last.learning_rate, last.split, last.task], args.hub_public))
    if tasks and len(beside) == len(args.task_list):
        print(f"\n{shown(tasks)}\n\nall tasks: {last.folder.parent / 'tasks.md'}")
    if args.eval and len(args.split) > 1:
        independent = {"tasks_independent": "True"} if args.tasks_independent else {}
        methods = write_methods(folder, [line | independent for line in lines])
        if (last.split, last.task) == (args.split[-1], args.task_list[-1]):
            print(f"\n{shown(methods)}\n\nall splits: {folder / METHODS}")


def _line(args: UnlearnArgs, result: TaskResult) -> dict[str, Any]:
    """Make a result a line of results.csv, with its split if not all lines have the same."""
    return ({"split": result.split} if len(args.split) > 1 else {}) | result_columns(result)


def say_next(folder: Path) -> None:
    """Print the command that tells more about what a run has left in its folder, on the main process alone."""
    if PartialState().is_main_process:
        print(f"For a page with its plots and answers:\n  dualoptim report {shlex.quote(str(folder))}", flush=True)
