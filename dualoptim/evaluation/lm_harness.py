"""Measure general ability by the tasks of the package lm-eval, beside the evaluation sets."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualoptim.config.args import MeasureArgs
from dualoptim.errors import InputError, reason
from dualoptim.evaluation.lm_data import read_from
from dualoptim.evaluation.summary import Scores
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.together import of_all, shared


def check_general_ability(args: MeasureArgs) -> None:
    """Make sure that lm-eval knows the tasks of `--lm-eval-tasks` and has their data, before anything is computed.

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
    try:
        with read_from(_data_folder(args)):
            (getattr(manager, "load", None) or manager.load_task_or_group)(list(args.lm_eval_tasks))  # by its version
    except Exception as error:  # broken YAML, columns that a task lacks: all kinds
        raise InputError(_problem(args, error)) from None


@functools.cache
def _task_manager(path: str | None) -> Any:
    """Read lm-eval's index of all tasks and those in the folder `path`, once for the check and every evaluation."""
    from lm_eval.tasks import TaskManager  # ten seconds, and only for this

    return TaskManager(include_path=str(Path(path).expanduser()) if path else None)


def _data_folder(args: MeasureArgs) -> str | None:
    """Say in which folder data sets of tasks may lie: that of a benchmark is one, if no other is given."""
    own = args.data if args.benchmark and args.data and Path(args.data).expanduser().is_dir() else None
    return args.lm_eval_data or own


def _problem(args: MeasureArgs, error: Exception) -> str:
    """Say what went wrong in lm-eval, in one line."""
    what = str(error) if isinstance(error, InputError) else f"lm-eval cannot run them ({reason(error)}); check their data"
    return f"--lm-eval-tasks {' '.join(args.lm_eval_tasks)}: {what}"


def general_ability(loaded: LoadedModel, args: MeasureArgs) -> dict[str, Scores]:
    """Measure the tasks of `--lm-eval-tasks`, each process its share of their requests: scores by task, the same on all.

    Raises:
        InputError: if a task cannot be run.
    """
    result: dict[str, Scores] = {}
    try:
        result = _run_tasks(loaded, args)
        _of_all(loaded, [])  # all have come to their end
    except _Ended as ended:
        raise InputError(str(ended)) from None
    except Exception as error:  # of tasks and their metrics, of the device: all kinds
        problem = _problem(args, error)
        of_all(loaded.accelerator, problem)  # the others wait for answers
        raise InputError(problem) from None
    return shared(loaded.accelerator, result)  # lm-eval gives it to the first process of a machine alone


class _Ended(Exception):
    """Says why another process has ended."""


def _of_all(loaded: LoadedModel, answers: list[Any]) -> list[list[Any]]:
    """Give all processes the answers of each.

    Raises:
        _Ended: if one of them has ended with an error.
    """
    found = of_all(loaded.accelerator, answers)
    if problem := next((one for one in found if isinstance(one, str)), None):
        raise _Ended(problem)
    return found


def shared_out(loaded: LoadedModel, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Answer requests, in order, on all processes, each of which answers those of every n-th question.

    The choices of a question stay together, for lm-eval reads them off one forward pass.
    """
    process, processes = loaded.share
    questions = [list(own) for _, own in itertools.groupby(range(len(requests)), lambda n: _question(requests[n]))]
    mine = [n for question in questions[process::processes] for n in question]
    with loaded.in_step():
        answers = answer([requests[n] for n in mine]) if mine else []
    known = dict(pair for own in _of_all(loaded, list(zip(mine, answers, strict=True))) for pair in own)
    return [known[n] for n in range(len(requests))]


def _question(request: Any) -> tuple[Any, ...]:
    return request.task_name, request.doc_id


def _run_tasks(loaded: LoadedModel, args: MeasureArgs) -> dict[str, Scores]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    quiet = not loaded.accelerator.is_main_process

    class Shared(HFLM):
        """The model as lm-eval takes it; every process has the same requests, and answers its share."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return shared_out(loaded, requests, lambda mine: super(Shared, self).loglikelihood(mine, quiet or disable_tqdm))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return shared_out(
                loaded, requests, lambda mine: super(Shared, self).loglikelihood_rolling(mine, quiet or disable_tqdm)
            )

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            if loaded.divided:  # transformers waits for all processes after each token
                return super().generate_until(requests, quiet or disable_tqdm)
            return shared_out(loaded, requests, lambda mine: super(Shared, self).generate_until(mine, quiet or disable_tqdm))

    with read_from(_data_folder(args)):
        found = lm_eval.simple_evaluate(
            model=Shared(loaded.model, tokenizer=loaded.tokenizer, batch_size=args.eval_batch_size),
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
