"""Say what a run would take in memory, from the model's configuration alone: `--dry-run`, or `dualoptim plan`."""

import os
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.config.optimizers import Moments, kind_of
from dualoptim.data.demo import tiny_model
from dualoptim.errors import InputError, blamed
from dualoptim.method.groups import decay_groups
from dualoptim.method.objectives import split_objectives
from dualoptim.models.adapter import add_adapter
from dualoptim.models.launch import say, start_accelerator
from dualoptim.models.load import load_config
from dualoptim.models.memory import (
    LOGIT_COPIES,
    Division,
    MemoryPlan,
    Parts,
    Shape,
    activation_bytes,
    divide,
    rounded_up,
    state_bytes,
)

GIB = 1024**3


def shape_of(model: Any, quantize_embeddings: bool = False) -> Shape:
    """Measure the shape of a model, whose parameters may have no data (meta device)."""
    groups = decay_groups(model, 0.0, 8, quantize_embeddings)
    quantizable = sum(p.numel() for group in groups if group["bits"] == 8 for p in group["params"])
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config.get_text_config()
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return Shape(
        quantizable=quantizable,
        other=trainable - quantizable,
        frozen=total - trainable,
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=max(intermediate) if isinstance(intermediate, (list, tuple)) else intermediate,
        vocabulary=config.vocab_size,
    )


def division_of(accelerator: Accelerator) -> Division:
    """Find out how this launch divides the model.

    Raises:
        InputError: for FSDP and for offload of weights or to NVMe, which the plan does not know.
    """
    half = accelerator.mixed_precision == "bf16"
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("--dry-run does not know FSDP; launch it with one of accelerate_configs/ (single, DDP or ZeRO)")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return Division(accelerator.num_processes, half=half)
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    where = (zero.get("offload_optimizer") or {}).get("device") or "none"
    weights = (zero.get("offload_param") or {}).get("device") or "none"
    if where not in ("none", "cpu") or weights != "none":
        raise InputError(
            f"--dry-run does not know offload of the optimizer to {where} with weights to {weights}; "
            "launch it with offload_optimizer_device none or cpu and offload_param_device none"
        )

    def number(key: str, default: float) -> int:
        value = zero.get(key, default)
        return int(default if value == "auto" else value)

    return Division(
        processes=accelerator.num_processes,
        stage=int(zero["stage"]),
        deepspeed=True,
        half=half,
        offload=where == "cpu",
        bucket=number("reduce_bucket_size", 5e8),
        live=number("stage3_max_live_parameters", 1e9),
        sub_group=number("sub_group_size", 1e9),
    )


def plan(args: UnlearnArgs, accelerator: Accelerator) -> MemoryPlan:
    """Plan the memory of a run with `args` in this launch. No weights are read and nothing is written.

    Activations and logits are taken at their worst: every example has `--max-length` tokens and all of them are scored.

    Raises:
        InputError: if the configuration cannot be read, is not of a decoder-only model, or the launch is one the plan does
            not know.
    """
    division = division_of(accelerator)
    if args.model == DEMO:
        with torch.device("meta"):
            model = tiny_model(args.seed)[0]
    else:
        config, _, _ = load_config(args)
        remedy = "give one that AutoModelForCausalLM can build"
        # the class itself: from_config divides real weights in a ZeRO-3 launch
        with blamed("--model", args.model, remedy, "its configuration builds no language model"), torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    if args.load_in_4bit:
        raise InputError("--dry-run does not know --load-in-4bit; drop one of them")
    if args.use_lora:
        model = add_adapter(args, model)
    shape = shape_of(model, args.quantize_embeddings)
    moments = kind_of(args).moments(args)
    every = moments.wide + moments.in_bytes
    optimizer = {32: state_bytes(shape, Moments(every)), 8: state_bytes(shape, Moments(0, every))}
    device, host = divide(shape, division, state_bytes(shape, moments))

    objectives = [objective for pair in args.forget_losses for objective in split_objectives(pair) if objective]
    texts = args.batch_size * max(len(objective.reads) for objective in objectives)
    tokens = texts * args.max_length
    device = replace(
        device,
        activations=activation_bytes(shape, tokens, division.half, args.gradient_checkpointing),
        logits=tokens * shape.vocabulary * 4 * LOGIT_COPIES,
        reference=4 * shape.vocabulary * shape.hidden if any(o.reference == "logits" for o in objectives) else 0,
    )
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = ram // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    on_cuda = accelerator.device.type == "cuda"
    return MemoryPlan(
        device=device,
        host=host,
        optimizer_by_bits={
            bits: rounded_up(size, division.processes if division.deepspeed else 1) for bits, size in optimizer.items()
        },
        whole=4 * shape.total,
        capacity=torch.cuda.get_device_properties(accelerator.device).total_memory if on_cuda else share,
        host_capacity=share,
        shared=not on_cuda,
        shape=shape,
        division=division,
        tokens=tokens,
        optim=args.optim,
    )


# ------------------------------------------------------------------------------------------------------------ print


def describe(plan: MemoryPlan, args: UnlearnArgs) -> str:
    """Put the plan into text, in GiB a process (MiB where all of it is below one GiB)."""
    unit, name = (GIB, "GiB") if plan.needed >= GIB else (GIB // 1024, "MiB")
    division, shape = plan.division, plan.shape
    how = f"ZeRO-{division.stage}" if division.deepspeed else ("DDP" if division.processes > 1 else "no sharding")
    how += ", optimizer offload" if division.offload else ""
    lines = [
        f"{args.model}: {shape.total:,} parameters, {shape.trainable:,} of them train; {plan.optim}",
        f"{how}, {division.processes} process{'es' if division.processes > 1 else ''}, "
        f"{'16-bit mixed precision' if division.half else 'float32'}; {name} per process:",
        f"  {'':<16}{'device':>10}" + (f"{'host':>10}" if division.offload else ""),
    ]
    for field in [*(field.name for field in fields(Parts)), "total"]:
        on_host = f"{getattr(plan.host, field) / unit:>10.2f}" if division.offload else ""
        lines.append(f"  {field:<16}{getattr(plan.device, field) / unit:>10.2f}{on_host}")
    sizes = ", ".join(f"{bits}-bit {size / unit:.2f}" for bits, size in plan.optimizer_by_bits.items())
    lines += [
        f"  optimizer state: {sizes}",
        f"  loading and evaluation: the whole model in float32, {plan.whole / unit:.2f}, before and after it is divided",
        f"  activations and logits: at worst, {plan.tokens:,} tokens a micro-batch (every text as long as --max-length "
        f"{args.max_length}, all of it scored)",
    ]
    place = "this process's share of the RAM" if plan.shared else "the GPU"
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(f"{verdict}: {plan.needed / unit:.2f} of {plan.capacity / unit:.2f} {name} of {place}")
    if not plan.shared:
        host = max(plan.host.total, plan.whole)
        lines[-1] += f", {host / unit:.2f} of {plan.host_capacity / unit:.2f} {name} of the host"
    return "\n".join(lines)


def dry_run(args: UnlearnArgs) -> MemoryPlan:
    """Print the memory plan of `args` in this launch, and return it.

    Raises:
        InputError: as `plan` does.
    """
    accelerator = start_accelerator(args)
    result = plan(args, accelerator)
    say(accelerator, describe(result, args))
    return result


if __name__ == "__main__":
    main(UnlearnArgs, dry_run)
