"""Tell which settings of a run say nothing about it, so that no list of them has them."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from dualoptim.config.optimizers import OF_RETAIN_STEPS, OPTIMIZERS, kind_of


def unread(settings: Mapping[str, Any]) -> set[str]:
    """Name the settings, of all that a run has, that nothing of it reads."""
    found: set[str] = set()
    if settings.get("forget_file") or settings.get("benchmark"):  # which say what is forgotten
        found |= {"split"}
    if not settings.get("benchmark"):
        found |= {"benchmark_rows"}
    if not settings.get("use_lora"):
        found |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"}
    if all(str(pair).endswith("+none") for pair in settings.get("forget_losses") or [""]):
        found |= {*OF_RETAIN_STEPS, "retain_freq", "regularization_coeff"}
    if not settings.get("eval", True):
        found |= {"eval_rows"}
    if str(settings.get("optim")) in OPTIMIZERS:
        read = kind_of(SimpleNamespace(optim=settings["optim"], decouple=settings.get("decouple", "both"))).reads
        found |= {name for optimizer in OPTIMIZERS.values() for name in optimizer.reads} - read
    return found
