"""Machine unlearning for language models with decoupled optimizer states: `from dualoptim import UnlearnArgs, run`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualoptim.config.args import EvalArgs, FinetuneArgs, SweepArgs, UnlearnArgs
    from dualoptim.config.presets import preset
    from dualoptim.errors import InputError, NonFiniteError
    from dualoptim.method.dual import DualOptimizer
    from dualoptim.method.objectives import FORGET, RETAIN, Objective
    from dualoptim.reporting.results import TaskResult
    from dualoptim.unlearn import RunResult, run

__version__ = "0.2.0"

_PLACES = {
    "config.args": ("EvalArgs", "FinetuneArgs", "SweepArgs", "UnlearnArgs"),
    "config.presets": ("preset",),
    "errors": ("InputError", "NonFiniteError"),
    "method.dual": ("DualOptimizer",),
    "method.objectives": ("FORGET", "RETAIN", "Objective"),
    "reporting.results": ("TaskResult",),
    "unlearn": ("RunResult", "run"),
}
__all__ = [
    "FORGET",
    "RETAIN",
    "DualOptimizer",
    "EvalArgs",
    "FinetuneArgs",
    "InputError",
    "NonFiniteError",
    "Objective",
    "RunResult",
    "SweepArgs",
    "TaskResult",
    "UnlearnArgs",
    "preset",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that only those wait for torch and transformers who need them."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"dualoptim.{module}"), name)
    raise AttributeError(f"module 'dualoptim' has no attribute {name!r}")
