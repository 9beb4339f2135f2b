"""Say what a run would take in memory, from the model's configuration alone: `--dry-run`, or `dualoptim plan`.

Where it does not fit, the same arithmetic finds the launches and flags with which it would.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["plan"])

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from accelerate import Accelerator, DistributedType

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.notes import tasks_note
from dualoptim.data.targets import with_targets
from dualoptim.errors import InputError, OutOfReachError, reason
from dualoptim.lengths import lengths_of
from dualoptim.models.launch import say, start_accelerator
from dualoptim.models.launches import Machine, choices, enough_processes, planned
from dualoptim.models.measured import GIB, memory_of
from dualoptim.models.memory import Division, Lengths, Parts, Shape
from dualoptim.models.peaks import Phase
from dualoptim.models.shapes import at_worst, demand_of, empty_model, shape_of

SHOWN = 6
"""Trainings whose steps are told; of a benchmark's targets there are hundreds."""


@dataclass(frozen=True)
class MemoryPlan:
    """What each phase of a run takes in one process, and on which machine."""

    phases: list[Phase]
    shape: Shape
    division: Division
    machine: Machine
    lengths: Lengths
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
        InputError: if the configuration cannot be read, is not of a decoder-only model, the launch is one the plan does not
            know, or the data that are here are wrong.
    """
    division, machine = division_of(accelerator), machine_of(accelerator)
    model = empty_model(args)
    shape = shape_of(model, args.quantize_embeddings)
    try:
        lengths = lengths_of(args, accelerator, model)
    except OutOfReachError as error:
        lengths = at_worst(args, reason(error).partition(" (")[0])
    found = planned(demand_of(args, lengths), shape, division, machine)
    return MemoryPlan(found, shape, division, machine, lengths, args.optim)


def machine_of(accelerator: Accelerator) -> Machine:
    """Find out what memory there is for each process of this launch."""
    half, on_cuda = accelerator.mixed_precision == "bf16", accelerator.device.type == "cuda"
    return Machine(accelerator.num_processes, *memory_of(accelerator), half, on_cuda)


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

    def number(key: str) -> int:
        return 0 if zero.get(key, "auto") == "auto" else int(zero[key])

    return replace(
        here,
        deepspeed=True,
        stage=int(zero["stage"]),
        offload=where == "cpu",
        bucket=number("reduce_bucket_size"),
        live=number("stage3_max_live_parameters"),
        sub_group=number("sub_group_size"),
    )


# ------------------------------------------------------------------------------------------------------------ print


def describe(plan: MemoryPlan, args: UnlearnArgs) -> str:
    """Put the plan into text, in GiB a process (MiB where all of it is below one GiB)."""
    unit, name = (GIB, "GiB") if plan.largest.total >= GIB else (GIB // 1024, "MiB")
    division, shape, machine = plan.division, plan.shape, plan.machine
    kind = f"ZeRO-{division.stage}" if division.deepspeed else "FSDP2" if division.fsdp else "DDP"
    how = (kind if division.processes > 1 or division.deepspeed else "no sharding") + ", optimizer offload" * division.offload
    parts = [field.name for field in fields(Parts) if any(getattr(phase.device, field.name) for phase in plan.phases)]
    columns = [*parts, "device", "host"]
    lines = [
        f"{args.model}: {shape.total:,} parameters, {shape.trainable:,} of them train; {plan.optim}",
        f"{how}, {division.processes} process{'es' if division.processes > 1 else ''}, "
        f"{'16-bit mixed precision' if division.half else 'float32'}; {name} per process at the peak of each phase:",
        f"  {'':<10}" + "".join(f"{part:>{_width(part)}}" for part in columns),
    ]
    for phase in plan.phases:
        own = [getattr(phase.device, part) for part in parts] + [phase.device.total, phase.host.total]
        lines.append(
            f"  {phase.name:<10}"
            + "".join(f"{size / unit:>{_width(part)}.2f}" for size, part in zip(own, columns, strict=True))
        )
    lengths = plan.lengths
    batch = f"a micro-batch has at most {lengths.micro_batch:,} tokens, {lengths.scored:,} of them scored"
    lines.append(f"  {batch}; the evaluation's longest text has {lengths.text:,} with its answer")
    lines += [f"  {one}" for one in lengths.steps[:SHOWN]]
    if len(lengths.steps) > SHOWN:
        lines.append(f"  and {len(lengths.steps) - SHOWN} more such")
    if lengths.why_not:
        lines.append(
            f"  (every text is taken to have --max-length {args.max_length}, for the data's are not known: {lengths.why_not})"
        )
    largest = plan.largest
    host = f"of {machine.host / unit:.2f} {name} of the process's share of the RAM"
    if machine.on_cuda:
        sizes = f"{largest.device.total / unit:.2f} of {machine.device / unit:.2f} {name} of the GPU, "
        sizes += f"{max(phase.host.total for phase in plan.phases) / unit:.2f} {host}"
    else:
        sizes = f"{largest.total / unit:.2f} {host}"
    return "\n".join([*lines, f"{'fits' if plan.fits else 'does not fit'}: {sizes} ({largest.name})"])


def _width(part: str) -> int:
    return max(len(part), 7) + 1


def advise(plan: MemoryPlan, args: UnlearnArgs) -> str:
    """Say with which launches and flags the run would fit, best first."""
    shapes = {args.use_lora: plan.shape}
    found = [f"  {choice}" for choice in choices(args, plan.machine, shapes, plan.lengths)]
    more = enough_processes(args, plan.machine, shapes, plan.lengths)
    if more:
        found.append(f"  {more[1]}, with --num_processes {more[0]} on as many such devices")
    how = "  dualoptim launch-file NAME prints where such a file lies, for accelerate launch --config_file"
    return "\n".join(["what would fit, best first:", *found, how]) if found else "no launch of accelerate_configs/ would fit"


def advise_bf16(machine: Machine) -> str:
    """Say that steps on a CPU are faster with 16-bit products, where the CPU has units for them."""
    info = Path("/proc/cpuinfo")  # as Linux has it: avx512_bf16, amx_bf16 on Intel's and AMD's, bf16 on ARM's
    units = {"avx512_bf16", "amx_bf16", "bf16"} & set(info.read_text().split() if info.exists() else ())
    if machine.on_cuda or machine.half or not units:
        return ""
    script = sys.argv[0] if Path(sys.argv[0]).name == "train_unlearn.py" else "-m dualoptim unlearn"  # as the user stands
    launch = f"accelerate launch --mixed_precision bf16 {script}, and the same flags"
    found = ", ".join(sorted(units))
    return f"\nthis CPU has units for bf16 ({found}), with which most measured steps took 0.6 to 0.8 of the time:\n  {launch}"


def dry_run(args: UnlearnArgs) -> MemoryPlan:
    """Print the memory plan of `args` in this launch, and return it.

    Raises:
        InputError: as `plan` does.
    """
    args = with_targets(args)
    accelerator = start_accelerator(args)
    result = plan(args, accelerator)
    for note in tasks_note(args):
        say(accelerator, note)
    advice = "" if result.fits else f"\n{advise(result, args)}"
    say(accelerator, describe(result, args) + advice + advise_bf16(result.machine))
    return result
