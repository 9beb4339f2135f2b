"""General ability: the tasks of the package lm-eval, measured beside the evaluation sets."""

import functools
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dualoptim.config.args import MeasureArgs
from dualoptim.errors import InputError, reason
from dualoptim.models.load import Policy


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
    """lm-eval's index of all tasks and those in the folder `path`, read once for the check and every evaluation."""
    from lm_eval.tasks import TaskManager  # ten seconds, and only for this

    return TaskManager(include_path=str(Path(path).expanduser()) if path else None)


def general_ability(policy: Policy, accelerator: Accelerator, args: MeasureArgs) -> dict[str, dict[str, float]]:
    """The tasks of `--lm-eval-tasks` by the package lm-eval, measured by the main process: metrics by task.

    Raises:
        InputError: if the data of a task cannot be reached.
    """
    results: list[Any] = [None]
    if accelerator.is_main_process:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(
                    accelerator.unwrap_model(policy.model),
                    tokenizer=policy.tokenizer,
                    batch_size=args.eval_batch_size,
                    # it switches our autocast off, without which flash-attention does not run
                    mixed_precision_dtype={"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision),
                ),
                tasks=list(args.lm_eval_tasks),
                task_manager=_task_manager(args.lm_eval_path),
                limit=args.eval_rows or None,
                log_samples=False,
                bootstrap_iters=0,
            )
            results = [
                {
                    task: {metric.removesuffix(",none"): value for metric, value in scores.items() if isinstance(value, float)}
                    for task, scores in found["results"].items()
                }
            ]
        except Exception as error:  # data sets that need a network, broken YAML: all kinds
            results = [
                f"--lm-eval-tasks {' '.join(args.lm_eval_tasks)}: lm-eval cannot run them ({reason(error)}); check their data"
            ]
    (result,) = broadcast_object_list(results)
    if isinstance(result, str):
        raise InputError(result)
    return result
