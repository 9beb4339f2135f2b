"""Machine unlearning for language models with decoupled optimizer states: `from dualoptim import UnlearnArgs, run`."""

from typing import TYPE_CHECKING, Any

from dualoptim.config.args import EvalArgs, FinetuneArgs, UnlearnArgs, preset
from dualoptim.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from dualoptim.method.dual import DualOptimizer
    from dualoptim.unlearn import RunResult, TaskResult, run

__version__ = "0.1.0"
__all__ = [
    "DualOptimizer",
    "EvalArgs",
    "FinetuneArgs",
    "InputError",
    "NonFiniteError",
    "RunResult",
    "TaskResult",
    "UnlearnArgs",
    "preset",
    "run",
]

_MODULES = {
    "DualOptimizer": "method.dual",
    "RunResult": "unlearn",
    "TaskResult": "unlearn",
    "run": "unlearn",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers when it is asked for, so that `--help` stays quick."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"dualoptim.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'dualoptim' has no attribute {name!r}")
