"""Say what a run would take in memory, from the model's configuration alone: `--dry-run`, or `dualoptim plan`.

Where it does not fit, the same arithmetic finds the launches and flags with which it would.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from accelerate import Accelerator, DistributedType

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.errors import InputError
from dualoptim.models.launch import say, start_accelerator
from dualoptim.models.launches import Machine, choices, enough_processes, planned
from dualoptim.models.measured import GIB, memory_of
from dualoptim.models.memory import Division, Parts, Shape
from dualoptim.models.peaks import Phase
from dualoptim.models.shapes import demand_of, empty_model, shape_of


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
    found = planned(args, shape, division, machine)
    return MemoryPlan(found, shape, division, machine, demand_of(args).tokens, args.optim)


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
        f"  at worst: every text has {args.max_length} tokens (--max-length), a micro-batch {plan.tokens:,}, all scored"
    )
    largest = plan.largest
    host = f"of {machine.host / unit:.2f} {name} of the process's share of the RAM"
    if machine.on_cuda:
        sizes = f"{largest.device.total / unit:.2f} of {machine.device / unit:.2f} {name} of the GPU, "
        sizes += f"{max(phase.host.total for phase in plan.phases) / unit:.2f} {host}"
    else:
        sizes = f"{largest.total / unit:.2f} {host}"
    return "\n".join([*lines, f"{'fits' if plan.fits else 'does not fit'}: {sizes} ({largest.name})"])


def advise(plan: MemoryPlan, args: UnlearnArgs) -> str:
    """Say with which launches and flags the run would fit, best first."""
    shapes = {args.use_lora: plan.shape}
    found = [f"  {choice}" for choice in choices(args, plan.machine, shapes)]
    more = enough_processes(args, plan.machine, shapes)
    if more:
        found.append(f"  {more[1]}, with --num_processes {more[0]} on as many such devices")
    return "\n".join(["what would fit, best first:", *found]) if found else "no launch of accelerate_configs/ would fit"


def advise_bf16(machine: Machine) -> str:
    """Say that steps on a CPU may be faster with 16-bit products, where the CPU has units for them."""
    info = Path("/proc/cpuinfo")  # as Linux has it: avx512_bf16, amx_bf16 on Intel's and AMD's, bf16 on ARM's
    units = {"avx512_bf16", "amx_bf16", "bf16"} & set(info.read_text().split() if info.exists() else ())
    if machine.on_cuda or machine.half or not units:
        return ""
    return f"\nthis CPU has units for bf16 ({', '.join(sorted(units))}): with --mixed_precision bf16 steps may be faster"


def dry_run(args: UnlearnArgs) -> MemoryPlan:
    """Print the memory plan of `args` in this launch, and return it.

    Raises:
        InputError: as `plan` does.
    """
    accelerator = start_accelerator(args)
    result = plan(args, accelerator)
    advice = "" if result.fits else f"\n{advise(result, args)}"
    say(accelerator, describe(result, args) + advice + advise_bf16(result.machine))
    return result


if __name__ == "__main__":
    main(UnlearnArgs, dry_run)
