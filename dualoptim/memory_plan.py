"""Say what a run would take in memory, from the model's configuration alone: `--dry-run`, or `dualoptim plan`.

Where it does not fit, the same arithmetic finds the launches and flags with which it would.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.config.flags import flag_name
from dualoptim.errors import InputError
from dualoptim.models.launch import say, start_accelerator
from dualoptim.models.load import load_config
from dualoptim.models.memory import Division, Parts, Shape
from dualoptim.models.peaks import Phase, phases
from dualoptim.models.shapes import demand_of, empty_model, shape_of

GIB = 1024**3
ROOM = 0.95  # of a device: what is freed leaves gaps that nothing fits into

ZERO = Division(deepspeed=True, bucket=500_000_000, live=1_000_000_000, sub_group=1_000_000_000)  # as DeepSpeed's defaults are
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


@dataclass(frozen=True)
class MemoryPlan:
    """What each phase of a run takes in one process, and on which machine."""

    phases: list[Phase]
    shape: Shape
    division: Division
    machine: Machine
    tokens: int
    optim: str

    @property
    def largest(self) -> Phase:
        """Find the phase that takes most of the device."""
        return max(self.phases, key=lambda phase: phase.device.total if self.machine.on_cuda else phase.total)

    @property
    def fits(self) -> bool:
        """Tell whether device and host hold the run."""
        return self.machine.holds(self.phases)


def plan(args: UnlearnArgs, accelerator: Accelerator) -> MemoryPlan:
    """Plan the memory of a run with `args` in this launch. No weights are read and nothing is written.

    Raises:
        InputError: if the configuration cannot be read, is not of a decoder-only model, or the launch is one the plan does
            not know.
    """
    division, machine = division_of(accelerator), machine_of(accelerator)
    shape = shape_of(empty_model(args), args.quantize_embeddings)
    demand = demand_of(args, stored_bytes(args))
    return MemoryPlan(phases(shape, division, demand), shape, division, machine, demand.tokens, args.optim)


def stored_bytes(args: UnlearnArgs) -> int:
    """Read how many bytes a weight has in the checkpoint."""
    dtype = None if args.model == DEMO else load_config(args)[0].dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def machine_of(accelerator: Accelerator) -> Machine:
    """Find out what memory there is for each process of this launch."""
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = ram // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    on_cuda = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_properties(accelerator.device).total_memory if on_cuda else share
    return Machine(accelerator.num_processes, device, share, accelerator.mixed_precision == "bf16", on_cuda)


def division_of(accelerator: Accelerator) -> Division:
    """Find out how this launch divides the model.

    Raises:
        InputError: for offload of weights or to NVMe, which the plan does not know.
    """
    here = Division(
        processes=accelerator.num_processes,
        half=accelerator.mixed_precision == "bf16",
        fsdp=accelerator.distributed_type == DistributedType.FSDP,
        on_cuda=accelerator.device.type == "cuda",
    )
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return here
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    where = (zero.get("offload_optimizer") or {}).get("device") or "none"
    weights = (zero.get("offload_param") or {}).get("device") or "none"
    if where not in ("none", "cpu") or weights != "none":
        raise InputError(
            f"--dry-run does not know offload of the optimizer to {where} with weights to {weights}; "
            "launch it with offload_optimizer_device none or cpu and offload_param_device none"
        )

    def number(key: str, default: int) -> int:
        value = zero.get(key, default)
        return int(default if value == "auto" else value)

    return replace(
        here,
        deepspeed=True,
        stage=int(zero["stage"]),
        offload=where == "cpu",
        bucket=number("reduce_bucket_size", ZERO.bucket),
        live=number("stage3_max_live_parameters", ZERO.live),
        sub_group=number("sub_group_size", ZERO.sub_group),
    )


# ----------------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True)
class Choice:
    """A launch and changes of flags with which a run fits."""

    launch: str
    changes: dict[str, Any]
    plan: list[Phase]

    def __str__(self) -> str:
        flags = [flag_name(name) + ("" if value is True else f" {value}") for name, value in self.changes.items()]
        return " ".join([f"{self.launch}.yaml", *flags])


def choices(args: UnlearnArgs, machine: Machine) -> Iterator[Choice]:
    """Find launches and flags that fit on a machine, best first: to each set of flags the fastest launch, if there is one."""
    shapes: dict[bool, Shape] = {}
    stored, found = stored_bytes(args), set[str]()
    for offload, wanted in CHANGES:
        changes = {name: value for name, value in wanted.items() if getattr(args, name) != value}
        if args.use_lora and "optim_bits" in changes or wanted.get("load_in_4bit") and not machine.on_cuda:
            continue
        try:
            changed = replace(args, **changes)
        except InputError:  # another flag rules it out
            continue
        if changed.use_lora not in shapes:
            shapes[changed.use_lora] = shape_of(empty_model(changed), args.quantize_embeddings)
        for name in launches(changed, machine.processes, offload):
            division = replace(LAUNCHES[name], processes=machine.processes, half=machine.half, on_cuda=machine.on_cuda)
            planned = phases(shapes[changed.use_lora], division, demand_of(changed, stored))
            if machine.holds(planned):
                if name not in found:
                    yield Choice(name, changes, planned)
                found.add(name)
                break


def launches(args: UnlearnArgs, processes: int, offload: bool) -> list[str]:
    """List the launches that take `args` with so many processes, the fastest first; those that offload, or the others."""
    names = ["zero3_offload"] if offload else ["single_gpu"] if processes == 1 else ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    kinds = {name: LAUNCHES[name] for name in names}
    return [
        name
        for name, kind in kinds.items()
        if not (kind.fsdp and args.state_bits == 8) and not (kind.divides and args.load_in_4bit)
    ]


def enough_processes(args: UnlearnArgs, machine: Machine) -> tuple[int, Choice] | None:
    """Find the smallest power of two of such processes with which a run fits as it is, and the fastest launch for it."""
    for processes in (2**power for power in range(1, 11)):
        if processes > machine.processes:
            first = next(choices(args, replace(machine, processes=processes)), None)
            if first and not first.changes and first.launch != "zero3_offload":
                return processes, first
    return None


# ------------------------------------------------------------------------------------------------------------ print


def describe(plan: MemoryPlan, args: UnlearnArgs) -> str:
    """Put the plan into text, in GiB a process (MiB where all of it is below one GiB)."""
    unit, name = (GIB, "GiB") if plan.largest.total >= GIB else (GIB // 1024, "MiB")
    division, shape, machine = plan.division, plan.shape, plan.machine
    kind = f"ZeRO-{division.stage}" if division.deepspeed else "FSDP2" if division.fsdp else "DDP"
    how = (kind if division.processes > 1 or division.deepspeed else "no sharding") + ", optimizer offload" * division.offload
    parts = [field.name for field in fields(Parts)]
    lines = [
        f"{args.model}: {shape.total:,} parameters, {shape.trainable:,} of them train; {plan.optim}",
        f"{how}, {division.processes} process{'es' if division.processes > 1 else ''}, "
        f"{'16-bit mixed precision' if division.half else 'float32'}; {name} per process at the peak of each phase:",
        f"  {'':<10}" + "".join(f"{part:>12}" for part in [*parts, "device", "host"]),
    ]
    for phase in plan.phases:
        own = [getattr(phase.device, part) for part in parts] + [phase.device.total, phase.host.total]
        lines.append(f"  {phase.name:<10}" + "".join(f"{size / unit:>12.2f}" for size in own))
    lines.append(
        f"  at worst: {plan.tokens:,} tokens a micro-batch (every text as long as --max-length {args.max_length}, all of it scored)"
    )
    largest = plan.largest
    if machine.on_cuda:
        host = max(phase.host.total for phase in plan.phases)
        sizes = f"{largest.device.total / unit:.2f} of {machine.device / unit:.2f} {name} of the GPU ({largest.name}, of which "
        sizes += f"{1 - ROOM:.0%} stay free), {host / unit:.2f} of {machine.host / unit:.2f} {name} of the host"
    else:
        sizes = f"{largest.total / unit:.2f} of {machine.host / unit:.2f} {name} of this process's share of the RAM ({largest.name})"
    return "\n".join([*lines, f"{'fits' if plan.fits else 'does not fit'}: {sizes}"])


def advise(args: UnlearnArgs, machine: Machine) -> str:
    """Say with which launches and flags the run would fit, best first."""
    found = [f"  {choice}" for choice in choices(args, machine)]
    more = enough_processes(args, machine)
    if more:
        found.append(f"  {more[1]}, with --num_processes {more[0]} on as many such devices")
    return "\n".join(["what would fit, best first:", *found]) if found else "no launch of accelerate_configs/ would fit"


def dry_run(args: UnlearnArgs) -> MemoryPlan:
    """Print the memory plan of `args` in this launch, and return it.

    Raises:
        InputError: as `plan` does.
    """
    accelerator = start_accelerator(args)
    result = plan(args, accelerator)
    say(accelerator, describe(result, args) + ("" if result.fits else f"\n{advise(args, result.machine)}"))
    return result


if __name__ == "__main__":
    main(UnlearnArgs, dry_run)
