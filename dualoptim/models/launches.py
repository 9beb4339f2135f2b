"""Find the launches of accelerate_configs/ and the flags with which a run fits on a machine."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.flags import flag_name
from dualoptim.errors import InputError
from dualoptim.models.buckets import settled
from dualoptim.models.measured import rather_divided
from dualoptim.models.memory import Demand, Division, Lengths, Shape
from dualoptim.models.peaks import Phase, phases
from dualoptim.models.shapes import demand_of, empty_model, shape_of

ROOM = 0.95  # of a device: what is freed leaves gaps that nothing fits into

ZERO = Division(deepspeed=True)
LAUNCHES = {
    "single_gpu": Division(),
    "ddp": Division(),
    "zero1": replace(ZERO, stage=1),
    "zero2": replace(ZERO, stage=2),
    "zero3": replace(ZERO, stage=3),
    "fsdp2": Division(fsdp=True),
    "zero3_offload": replace(ZERO, stage=3, offload=True),
}
"""How the files of accelerate_configs/ divide a model, the fastest first."""

CHANGES: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (False, {"gradient_checkpointing": True}),
    (False, {"gradient_checkpointing": True, "optim_bits": 8}),
    (True, {}),
    (True, {"gradient_checkpointing": True}),
    (False, {"gradient_checkpointing": True, "use_lora": True}),
    (False, {"gradient_checkpointing": True, "use_lora": True, "load_in_4bit": True}),
]
"""What can be changed where a run does not fit, from what changes least: whether to offload, and flags."""


@dataclass(frozen=True)
class Machine:
    """What there is for one process of a launch: bytes of its device, and its share of the host."""

    processes: int
    device: int
    host: int
    half: bool
    on_cuda: bool  # else device and host are one memory

    def holds(self, plan: list[Phase]) -> bool:
        """Tell whether every phase fits."""
        if not self.on_cuda:
            return max(phase.total for phase in plan) <= self.host
        return all(phase.device.total <= ROOM * self.device and phase.host.total <= self.host for phase in plan)


def planned(demand: Demand, shape: Shape, division: Division, machine: Machine) -> list[Phase]:
    """Plan the phases of a run on a machine, on which `--evaluate-sharded auto` depends."""
    whole = division.width * shape.total
    divided = division.divides and rather_divided(demand.sharded, whole, machine.device)
    return phases(shape, settled(division, shape.trainable, shape.total), replace(demand, evaluates_divided=divided))


@dataclass(frozen=True)
class Choice:
    """A launch and changes of flags with which a run fits."""

    launch: str
    changes: dict[str, Any]
    plan: list[Phase]

    def __str__(self) -> str:
        flags = [flag_name(name) + ("" if value is True else f" {value}") for name, value in self.changes.items()]
        return " ".join([f"{self.launch}.yaml", *flags])


def choices(args: UnlearnArgs, machine: Machine, shapes: dict[bool, Shape], lengths: Lengths) -> Iterator[Choice]:
    """Find launches and flags that fit on a machine, best first: to each set of flags the fastest launch, if there is one.

    `shapes` are the model's without an adapter and with one, as far as they are known, and are added to.
    """
    found = set[str]()
    for offload, wanted in CHANGES:
        changes = {name: value for name, value in wanted.items() if getattr(args, name) != value}
        if ("load_in_4bit" in wanted and not machine.on_cuda) or ("optim_bits" in changes and args.use_lora):
            continue
        try:
            changed = replace(args, **changes)
        except InputError:  # another flag rules it out
            continue
        if changed.use_lora not in shapes:
            shapes[changed.use_lora] = shape_of(empty_model(changed), args.quantize_embeddings)
        for name in launches(changed, machine.processes, offload):
            division = replace(LAUNCHES[name], processes=machine.processes, half=machine.half, on_cuda=machine.on_cuda)
            plan = planned(demand_of(changed, lengths), shapes[changed.use_lora], division, machine)
            if machine.holds(plan):
                if name not in found:
                    yield Choice(name, changes, plan)
                found.add(name)
                break


def launches(args: UnlearnArgs, processes: int, offload: bool) -> list[str]:
    """List the launches that take `args` with so many processes, the fastest first; those that offload, or the others."""
    names = ["zero3_offload"] if offload else ["single_gpu"] if processes == 1 else ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    kinds = {name: LAUNCHES[name] for name in names}
    return [
        name
        for name, kind in kinds.items()
        if not (kind.fsdp and args.state_bits == 8)
        and not (kind.divides and args.load_in_4bit)
        and not ((kind.fsdp or kind.deepspeed) and args.sam_rho)
        and not (kind.deepspeed and args.average_cycles)
    ]


def enough_processes(
    args: UnlearnArgs, machine: Machine, shapes: dict[bool, Shape], lengths: Lengths
) -> tuple[int, Choice] | None:
    """Find the smallest power of two of such processes with which a run fits as it is, and the fastest launch for it."""
    for processes in (2**power for power in range(1, 11)):
        if processes > machine.processes:
            first = next(choices(args, replace(machine, processes=processes), shapes, lengths), None)
            if first and not first.changes and first.launch != "zero3_offload":
                return processes, first
    return None
