"""Choose the optimizer: one table of what `--optim` offers, and one of what each of two banks can be made of.

An entry says how the optimizer is built, which flags it reads and what it keeps of every parameter; checks, help, the memory
plan, the model card and the tables of the READMEs follow from it. To add one, write its class and give it one entry in
`OPTIMIZERS`. What builds is looked up when it runs, so that help and checks need no torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dualoptim.config.flags import default_of, flag_name
from dualoptim.errors import InputError, reason

if TYPE_CHECKING:
    from dualoptim.method.dual import DualOptimizer, Groups, MakeOptimizer

Flags = Any
"""Whatever carries the flags of unlearning by their names: `UnlearnArgs`, or a namespace."""


class Moments(NamedTuple):
    """How many moments of every parameter are kept in 32 bits, and in 8 where a tensor can be quantized."""

    wide: int
    in_bytes: int = 0


@dataclass(frozen=True)
class Kind:
    """An optimizer by what a run has to know of it: a sentence for the model card, and functions of the flags."""

    about: str
    build: Callable[[Flags], MakeOptimizer]
    moments: Callable[[Flags], Moments]
    reads: frozenset[str] = frozenset()  # flags beside those that every optimizer reads
    alternates: bool = True  # whether forget and retain steps follow one another, or each step takes both losses
    forget_strength: float = 1.0  # the rate of forget steps in learning rates where nothing says it; method/README.md says why


@dataclass(frozen=True)
class Bank:
    """An optimizer that one phase can have: what it keeps, whether betas mean anything to it, how betas build it."""

    moments: Moments
    takes_betas: bool
    build: Callable[[tuple[float, float]], Callable[..., Any]]


def _adamw(bits: int, betas: tuple[float, float]) -> MakeOptimizer:
    from dualoptim.method.adamw import adamw

    return adamw(0.0, betas, bits=bits)


BANKS: dict[str, Bank] = {
    "adamw": Bank(Moments(2), True, partial(_adamw, 32)),
    "adamw-8bit": Bank(Moments(0, 2), True, partial(_adamw, 8)),
    "sgd": Bank(Moments(1), True, lambda betas: partial(_imported("torch.optim.SGD"), lr=0.0, momentum=betas[0])),
    "signsgd": Bank(Moments(0), False, lambda betas: partial(_imported("dualoptim.method.adamw.SignSGD"), lr=0.0)),
}


def bank_of(name: str) -> Bank:
    """Look up the entry of a name, or make one for the optimizer at an import path, which is taken to keep two moments.

    Raises:
        ImportError, AttributeError, TypeError: if a path leads to no optimizer.
    """
    if name in BANKS:
        return BANKS[name]
    optimizer = _imported(name)
    takes_betas = "betas" in inspect.signature(optimizer).parameters
    return Bank(Moments(2), takes_betas, lambda betas: partial(optimizer, lr=0.0, **({"betas": betas} if takes_betas else {})))


def named_optimizer(name: str, betas: tuple[float, float], weight_decay: float) -> MakeOptimizer:
    """Give what builds the optimizer called `name` from parameter groups; those that are `decayed` get `weight_decay`.

    Raises:
        ImportError, AttributeError, TypeError: if a path leads to no optimizer.
    """
    make = bank_of(name).build(betas)
    return lambda groups: make([{**group, "weight_decay": weight_decay if group["decayed"] else 0.0} for group in groups])


def _imported(path: str) -> Any:
    """The optimizer's class at an import path."""
    from torch.optim import Optimizer

    module, _, attribute = path.rpartition(".")
    if not module:
        raise ImportError(f"{path!r} is no optimizer's name")
    kind = getattr(importlib.import_module(module), attribute)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"{path} is no torch optimizer")
    return kind


def bank_names(flags: Flags) -> tuple[str, str]:
    """Name the forget and the retain bank's optimizers."""
    standard = "adamw-8bit" if flags.optim_bits == 8 else "adamw"
    return flags.forget_optimizer or standard, flags.retain_optimizer or standard


def _one_bank(flags: Flags) -> MakeOptimizer:
    return _adamw(flags.optim_bits, flags.adam_betas)


def _two_banks(flags: Flags) -> MakeOptimizer:
    """Two independent optimizers; a step of both is tried, so that what cannot be one of two shows now.

    Raises:
        InputError: if an import path leads to no optimizer that can be one of two.
    """
    names, betas = bank_names(flags), flags.adam_betas
    decay = flags.weight_decay if flags.forget_weight_decay is None else flags.forget_weight_decay
    try:
        forget = named_optimizer(names[0], flags.forget_adam_betas or betas, decay)
        retain = named_optimizer(names[1], betas, flags.weight_decay)
        can_project = _try_both(forget, retain)
        forget_reads, retain_reads = (bank_of(name).takes_betas for name in names)
        unread = flags.forget_adam_betas if flags.forget_adam_betas and not forget_reads else None
        if betas != (0.9, 0.999) and not (forget_reads or retain_reads):
            unread = unread or betas
        if unread:
            raise ValueError(f"no moments that betas {unread[0]:g} {unread[1]:g} could be of")
    except Exception as error:  # an optimizer's constructor and step raise what they like
        raise InputError(
            f"--forget-optimizer {names[0]}, --retain-optimizer {names[1]}: {reason(error)}; give "
            f"{', '.join(BANKS)} or the import path of a torch optimizer, such as torch.optim.RMSprop"
        ) from None
    if flags.project_forget != "none" and not can_project:
        raise InputError(
            f"--project-forget {flags.project_forget} needs a first moment of retain steps in 32 bits, which {names[1]} has "
            "not; give --retain-optimizer adamw, or --project-forget none"
        )
    return lambda groups: _dual(groups, forget, retain)


def _dual(groups: Groups, forget: MakeOptimizer, retain: MakeOptimizer) -> DualOptimizer:
    from dualoptim.method.dual import DualOptimizer

    return DualOptimizer(groups, forget=forget, retain=retain)


def _try_both(forget: MakeOptimizer, retain: MakeOptimizer) -> bool:
    """Take a step of both phases over the groups that a model has; whether retain steps leave a first moment."""
    import torch

    from dualoptim.method.projection import retain_moment

    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = zip(weights, (True, False), strict=True)
    trial = _dual([{"params": [weight], "decayed": decayed, "bits": 32} for weight, decayed in groups], forget, retain)
    for phase in ("forget", "retain"):
        trial.use(phase, 1e-3)
        for weight in weights:
            weight.grad = torch.ones(2)
        trial.step()
    return all(retain_moment(trial, state) is not None for state in trial.state.values())


def _partly_decoupled(flags: Flags) -> MakeOptimizer:
    from dualoptim.method.plus import PartlyDecoupledAdamW

    bound = 1.0 if flags.max_update is None else flags.max_update
    return partial(PartlyDecoupledAdamW, lr=0.0, betas=flags.adam_betas, decouple=flags.decouple, max_update=bound)


def _shared_base(flags: Flags) -> MakeOptimizer:
    from dualoptim.method.plus import DualAdamWPlus

    delta, base = (flags.optim_bits == 8 or chosen for chosen in (flags.quantize_delta, flags.quantize_base))
    shape = {"base_betas": flags.base_betas, "max_update": flags.max_update or 0.0}
    shape |= {"quantize_delta": delta, "quantize_base": base}
    return partial(DualAdamWPlus, lr=0.0, betas=flags.adam_betas, **shape)


def _moments_of_one(flags: Flags) -> Moments:
    return Moments(0, 2) if flags.optim_bits == 8 else Moments(2)


def _moments_of_two(flags: Flags) -> Moments:
    forget, retain = (BANKS[name].moments if name in BANKS else Moments(2) for name in bank_names(flags))
    return Moments(forget.wide + retain.wide, forget.in_bytes + retain.in_bytes)


def _moments_with_base(flags: Flags) -> Moments:
    in_bytes = 4 * (flags.optim_bits == 8 or flags.quantize_delta) + 2 * (flags.optim_bits == 8 or flags.quantize_base)
    return Moments(6 - in_bytes, in_bytes)


_CYCLE = frozenset({"forget_freq", "retain_freq", "forget_lr", "forget_strength", "forget_max_grad_norm", "sam_rho"})
_BANKS = frozenset(
    {"forget_optimizer", "retain_optimizer", "forget_adam_betas", "forget_weight_decay", "decouple", "project_forget"}
)
_BASE = frozenset({"base_betas", "max_update", "quantize_delta", "quantize_base", "project_forget"})
_ALTERNATE = "forget steps and retain steps alternate"

OPTIMIZERS: dict[str, Kind] = {
    "dual-adamw": Kind(
        f"{_ALTERNATE}, each with an optimizer state of its own (arXiv 2504.15827)",
        _two_banks,
        _moments_of_two,
        _CYCLE | _BANKS,
        forget_strength=3.0,
    ),
    "dual-adamw-plus": Kind(
        f"{_ALTERNATE}, with a state that they share and each one's difference from it (arXiv 2605.21539)",
        _shared_base,
        _moments_with_base,
        _CYCLE | _BASE,
    ),
    "adamw-alternate": Kind(f"{_ALTERNATE} over one optimizer state", _one_bank, _moments_of_one, _CYCLE),
    "adamw": Kind(
        "every step takes the forget loss and the retain loss together", _one_bank, _moments_of_one, alternates=False
    ),
}
_PARTLY = Kind(
    f"{_ALTERNATE}, with one of Adam's moments of their own and the other shared (arXiv 2504.15827)",
    _partly_decoupled,
    lambda flags: Moments(3),
    _CYCLE | {"decouple", "max_update", "project_forget"},
)

OF_RETAIN_STEPS = ("project_forget", "retain_optimizer")
"""Flags that mean nothing to a pair without retain steps."""


def kind_of(flags: Flags) -> Kind:
    """Look up the entry of `--optim`, or what `--decouple` makes of it."""
    if flags.optim == "dual-adamw" and flags.decouple != "both":
        return OPTIMIZERS["adamw-alternate"] if flags.decouple == "none" else _PARTLY
    return OPTIMIZERS[flags.optim]


def unread_settings(args: Flags) -> Iterator[str]:
    """Settings of an optimizer that this run does not have, or that say the same twice."""
    if args.forget_strength is not None and args.forget_lr is not None:
        twice = f"--forget-strength {args.forget_strength} and --forget-lr {args.forget_lr:g} both set the rate of forget steps"
        yield f"{twice}; give one of them"
    reads = kind_of(args).reads | (OPTIMIZERS[args.optim].reads & {"decouple"})
    for kind_name, kind in OPTIMIZERS.items():
        for name in sorted(kind.reads - reads - {"forget_freq", "retain_freq"}):  # their defaults are never off
            value = getattr(args, name)
            if value == default_of(type(args), name):
                continue
            if name in ("forget_lr", "forget_strength", "forget_max_grad_norm"):
                flag = flag_name(name)
                yield f"{flag} {value:g} has no effect with --optim adamw, whose steps take both losses; give {flag} None"
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            both = " with --decouple both" if kind_name == "dual-adamw" and name != "decouple" else ""
            yield f"{flag_name(name)} {shown} has no effect here; it needs --optim {kind_name}{both}"
    if args.optim_bits == 8 and args.forget_optimizer and args.retain_optimizer:
        yield "--optim-bits 8 has no effect with --forget-optimizer and --retain-optimizer; name adamw-8bit there"
    if args.decouple in ("m", "v") and args.optim_bits == 8:
        yield f"--decouple {args.decouple} has no 8-bit form; give --optim-bits 32"
    for name in ("forget_until", "keep_budget"):
        if args.average_cycles and (limit := getattr(args, name)) is not None:
            asked = f"--average-cycles {args.average_cycles:g} saves a mean of weights"
            yield f"{asked}, which {flag_name(name)} {limit:g} does not measure; drop one of them"
    for name in OF_RETAIN_STEPS:
        value, pairs = getattr(args, name), " ".join(args.forget_losses)
        if value != default_of(type(args), name) and all(pair.endswith("+none") for pair in args.forget_losses):
            yield f"{flag_name(name)} {value} has no effect with {pairs}, which has no retain steps; drop it"
    if args.project_forget != "none":
        asked = f"--project-forget {args.project_forget}"
        in_bytes = [name for name in ("quantize_delta", "quantize_base") if getattr(args, name)]
        if args.optim == "dual-adamw-plus" and (in_bytes or args.optim_bits == 8):
            flag = flag_name(in_bytes[0]) if in_bytes else "--optim-bits 8"
            yield f"{asked} reads the retain state in 32 bits, which {flag} keeps in 8; drop one"
        if args.optim == "dual-adamw" and args.decouple == "v":
            yield f"{asked} needs a first moment of retain steps, and --decouple v shares it; give --decouple m or both"
