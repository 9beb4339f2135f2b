"""Measure general ability by the tasks of the package lm-eval, beside the evaluation sets."""

import functools
from pathlib import Path
from typing import Any

from dualoptim.config.args import MeasureArgs
from dualoptim.errors import InputError, reason
from dualoptim.evaluation.summary import Scores
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.together import shared


def check_general_ability(args: MeasureArgs) -> None:
    """Make sure that lm-eval knows the tasks of `--lm-eval-tasks`, before anything is computed.

    Raises:
        InputError: naming the first that it does not.
    """
    if not args.lm_eval_tasks:
        return
    manager = _task_manager(args.lm_eval_path)
    for task in args.lm_eval_tasks:
        if not manager.match_tasks([task]):
            place = f" and {args.lm_eval_path} has none of that name" if args.lm_eval_path else ""
            raise InputError(f"--lm-eval-tasks {task}: lm-eval has no such task{place}; `lm-eval ls tasks` lists them")


@functools.cache
def _task_manager(path: str | None) -> Any:
    """Read lm-eval's index of all tasks and those in the folder `path`, once for the check and every evaluation."""
    from lm_eval.tasks import TaskManager  # ten seconds, and only for this

    return TaskManager(include_path=str(Path(path).expanduser()) if path else None)


def general_ability(loaded: LoadedModel, args: MeasureArgs) -> dict[str, Scores]:
    """Measure the tasks of `--lm-eval-tasks` in the main process: scores by task, the same on all processes.

    A divided model is asked the same by all processes at once, which need each other for every answer.

    Raises:
        InputError: if the data of a task cannot be reached.
    """
    result: Any = None
    if loaded.divided or loaded.accelerator.is_main_process:
        try:
            result = _run_tasks(loaded, args)
        except Exception as error:  # data sets that need a network, broken YAML: all kinds
            result = (
                f"--lm-eval-tasks {' '.join(args.lm_eval_tasks)}: lm-eval cannot run them ({reason(error)}); check their data"
            )
    result = shared(loaded.accelerator, result)
    if isinstance(result, str):
        raise InputError(result)
    return result


def _run_tasks(loaded: LoadedModel, args: MeasureArgs) -> dict[str, Scores]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=args.eval_batch_size),
        tasks=list(args.lm_eval_tasks),
        task_manager=_task_manager(args.lm_eval_path),
        limit=args.eval_rows or None,
        log_samples=False,
        bootstrap_iters=0,
    )
    if found is None:  # lm-eval gives its results to the first process of a machine alone
        return {}
    return {
        task: {metric.removesuffix(",none"): value for metric, value in scores.items() if isinstance(value, float)}
        for task, scores in found["results"].items()
    }
