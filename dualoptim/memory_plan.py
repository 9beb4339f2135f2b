"""What a run would take in memory, from the model's configuration alone: `train_unlearn.py --dry-run`.

The arithmetic is pure functions over numbers of parameters. Bytes of DeepSpeed are those that version 0.19 was measured to hold
with the settings that `start_accelerator` gives it. Everything is per process and at its largest within one optimizer step.
"""

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dualoptim.data import demo
from dualoptim.config.args import DEMO, UnlearnArgs, split_objectives
from dualoptim.errors import InputError, reason
from dualoptim.models.load import add_adapter, load_config, start_accelerator
from dualoptim.method.dual import decay_groups
from dualoptim.method.plus import BLOCK
from dualoptim.reporting.log import say

LOGIT_COPIES = 3  # the logits, their gradient, and a part of each that is worked on; measured
GB = 1024**3


@dataclass(frozen=True)
class Shape:
    """A model as the arithmetic sees it: numbers of parameters and sizes."""

    quantizable: int  # trainable parameters whose optimizer state can be 8 bit
    other: int  # trainable parameters whose state stays 32 bit: embeddings, norms, biases
    frozen: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient."""
        return self.quantizable + self.other

    @property
    def total(self) -> int:
        """All parameters; tied ones count once."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Layout:
    """How a launch divides the model; `offload` moves masters and optimizer state to the host."""

    processes: int = 1
    stage: int = 0  # of ZeRO; 0: whole in every process
    deepspeed: bool = False
    half: bool = False  # 16-bit mixed precision: autocast in a plain process, 16-bit weights under DeepSpeed
    offload: bool = False
    bucket: int = 0  # elements that DeepSpeed reduces at once
    live: int = 0  # elements that ZeRO-3 keeps gathered
    sub_group: int = 10**9  # elements that ZeRO-3 updates at once


@dataclass(frozen=True)
class Parts:
    """Bytes of each kind in one memory."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0  # float32 copies of 16-bit or flattened weights
    optimizer: int = 0
    buffers: int = 0  # of communication, gathered layers, and the 16-bit copies that autocast makes
    activations: int = 0
    logits: int = 0
    reference: int = 0  # the frozen output head, for KL and UNDIAL

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process: on its device and (with offload) on the host, against what is there."""

    device: Parts
    host: Parts
    optimizer_by_bits: dict[int, int]  # what the optimizer state would take with 32 and with 8 bits for all moments
    whole: int  # the whole model in float32, which is loaded before it is divided, and evaluated
    capacity: int  # of the device; on a CPU the process's share of the machine
    host_capacity: int  # the process's share of the machine
    shared: bool  # the device is the CPU, so both memories are one
    shape: Shape
    layout: Layout
    tokens: int
    optim: str

    @property
    def needed(self) -> int:
        """The device's largest load: a training step, or the whole model while it is loaded or evaluated."""
        return max(self.device.total + (self.host.total if self.shared else 0), self.whole)

    @property
    def fits(self) -> bool:
        """Whether device and host hold the run."""
        return self.needed <= self.capacity and (self.shared or max(self.host.total, self.whole) <= self.host_capacity)


# ------------------------------------------------------------------------------------------------------- arithmetic


def moments_of(args: UnlearnArgs) -> tuple[int, int]:
    """How many moments of every parameter the optimizer keeps: in 32 bits, and in 8 where a tensor can be quantized.

    AdamW has two, SGD one, sign SGD none; an optimizer by import path is taken to have two.
    """
    narrow = args.optim_bits == 8
    if args.optim == "dual-adamw-plus":
        in_bytes = 4 * (narrow or args.quantize_delta) + 2 * (narrow or args.quantize_base)
        return 6 - in_bytes, in_bytes
    if args.optim != "dual-adamw" or args.decouple == "none":
        return (0, 2) if narrow else (2, 0)
    if args.decouple != "both":
        return 3, 0
    standard = "adamw-8bit" if narrow else "adamw"
    names = args.forget_optimizer or standard, args.retain_optimizer or standard
    wide = {"adamw-8bit": 0, "sgd": 1, "signsgd": 0}
    return sum(wide.get(name, 2) for name in names), 2 * names.count("adamw-8bit")


def state_bytes(quantizable: int, other: int, wide: int, narrow: int = 0) -> int:
    """Bytes of `wide` moments in 32 bits and `narrow` ones in 8, over parameters that can be quantized and others.

    8 bits: one byte a value and one float32 absmax per 256 values; `other` stays in 32.
    """
    return round(quantizable * (4 * wide + (1 + 4 / BLOCK) * narrow) + other * 4 * (wide + narrow))


def activation_bytes(shape: Shape, tokens: int, half: bool, checkpointing: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass.

    For a layer as in Llama (hidden h, intermediate i): inputs and normalized inputs of two norms, queries, keys, values, the
    output of attention, and four vectors of the MLP:

        layers * tokens * (48 h + 16 i) in float32, (38 h + 8 i) in 16 bits, where norms and the residual stay wider.

    Measured within 10 % for Llama in float32; GPT-2, with dropout and an unfused activation, takes 1.8 times that. With
    checkpointing each layer keeps its input alone (4 h), and one layer at a time is recomputed. Attention is taken to be sdpa
    or flash; eager adds scores that grow with the square of an example's length.
    """
    per_token = 38 * shape.hidden + 8 * shape.intermediate if half else 48 * shape.hidden + 16 * shape.intermediate
    kept = shape.layers * 4 * shape.hidden + per_token if checkpointing else shape.layers * per_token
    return tokens * kept


def divide(shape: Shape, layout: Layout, optimizer: int) -> tuple[Parts, Parts]:
    """Device and host bytes of weights, gradients, masters, state (`optimizer` bytes before division) and buffers."""
    trained, shares, narrow = shape.trainable, layout.processes, 2 if layout.half else 4
    if not layout.deepspeed:  # float32 everywhere; DDP copies gradients into its buckets
        gradients = 4 * trained * (2 if shares > 1 else 1)
        return Parts(4 * shape.total, gradients, 0, optimizer, 2 * shape.total if layout.half else 0), Parts()
    share = _ceil(4 * trained, shares)  # float32 values of one process's part
    weights, buffers = narrow * shape.total, narrow * layout.bucket
    if layout.stage <= 1:
        # whole gradients in float32; 16-bit ones beside them, or the flattened part
        gradients = 4 * trained + (2 * trained if layout.half else share)
    elif layout.stage == 2:
        gradients = share if layout.half else 2 * share  # in float32 flattened once more for the step
    else:
        weights = _ceil(weights, shares)
        gradients = share + min(share, 4 * layout.sub_group)  # one sub-group is flattened once more for the step
        buffers += narrow * min(layout.live, shape.total)
    masters, state = share, _ceil(optimizer, shares)
    if not layout.offload:
        return Parts(weights, gradients, masters, state, buffers), Parts()
    if layout.stage == 3:  # both copies of the gradients lie on the host, one pinned
        return Parts(weights, 0, 0, 0, buffers), Parts(0, 2 * share, masters, state)
    return Parts(weights, gradients, 0, 0, buffers), Parts(0, share, masters, state)


def _ceil(value: int, parts: int) -> int:
    return -(-value // parts)


# ------------------------------------------------------------------------------------------------- model and launch


def shape_of(model: Any, quantize_embeddings: bool = False) -> Shape:
    """The shape of a model, whose parameters may have no data (meta device)."""
    groups = decay_groups(model, 0.0, 8, quantize_embeddings)
    quantizable = sum(p.numel() for group in groups if group["bits"] == 8 for p in group["params"])
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config.get_text_config()
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return Shape(
        quantizable,
        trainable - quantizable,
        total - trainable,
        config.num_hidden_layers,
        hidden,
        intermediate,
        config.vocab_size,
    )


def layout_of(accelerator: Accelerator) -> Layout:
    """How this launch divides the model.

    Raises:
        InputError: for FSDP and for offload of weights or to NVMe, which the plan does not know.
    """
    half = accelerator.mixed_precision in ("bf16", "fp16")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("--dry-run does not know FSDP; launch it with one of accelerate_configs/ (single, DDP or ZeRO)")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return Layout(accelerator.num_processes, half=half)
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

    return Layout(
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
    """The memory of a run with `args` in this launch. No weights are read and nothing is written.

    Activations and logits are taken at their worst: every example has `--max-length` tokens and all of them are scored.

    Raises:
        InputError: if the configuration cannot be read, is not of a decoder-only model, or the launch is one the plan does
            not know.
    """
    layout = layout_of(accelerator)
    if args.model == DEMO:
        with torch.device("meta"):
            model = demo.tiny_model(args.seed)[0]
    else:
        config, _, _ = load_config(args)
        try:
            with torch.device("meta"):  # the class itself: from_config divides real weights in a ZeRO-3 launch
                model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        except Exception as error:  # as many kinds as there are architectures
            raise InputError(
                f"--model {args.model}: its configuration builds no language model ({reason(error)}); "
                f"give one that AutoModelForCausalLM can build"
            ) from None
    if args.load_in_4bit:
        raise InputError("--dry-run does not know --load-in-4bit; drop one of them")
    if args.use_lora:
        model = add_adapter(args, model)
    shape = shape_of(model, args.quantize_embeddings)
    wide, narrow = moments_of(args)
    optimizer = {
        bits: state_bytes(shape.quantizable, shape.other, *((wide + narrow, 0) if bits == 32 else (0, wide + narrow)))
        for bits in (32, 8)
    }
    device, host = divide(shape, layout, state_bytes(shape.quantizable, shape.other, wide, narrow))

    objectives = [objective for pair in args.forget_losses for objective in split_objectives(pair) if objective]
    texts = args.batch_size * max(len(objective.reads) for objective in objectives)
    tokens = texts * args.max_length
    device = replace(
        device,
        activations=activation_bytes(shape, tokens, layout.half, args.gradient_checkpointing),
        logits=tokens * shape.vocabulary * 4 * LOGIT_COPIES,
        reference=4 * shape.vocabulary * shape.hidden if any(o.reference == "logits" for o in objectives) else 0,
    )
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = ram // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    on_cuda = accelerator.device.type == "cuda"
    return MemoryPlan(
        device=device,
        host=host,
        optimizer_by_bits={bits: _ceil(size, layout.processes if layout.deepspeed else 1) for bits, size in optimizer.items()},
        whole=4 * shape.total,
        capacity=torch.cuda.get_device_properties(accelerator.device).total_memory if on_cuda else share,
        host_capacity=share,
        shared=not on_cuda,
        shape=shape,
        layout=layout,
        tokens=tokens,
        optim=args.optim,
    )


# ------------------------------------------------------------------------------------------------------------ print


def describe(plan: MemoryPlan, args: UnlearnArgs) -> str:
    """The plan as text, in GiB a process (MiB where all of it is below one GiB)."""
    unit, name = (GB, "GiB") if plan.needed >= GB else (GB // 1024, "MiB")
    layout, shape = plan.layout, plan.shape
    how = f"ZeRO-{layout.stage}" if layout.deepspeed else ("DDP" if layout.processes > 1 else "no sharding")
    how += ", optimizer offload" if layout.offload else ""
    lines = [
        f"{args.model}: {shape.total:,} parameters, {shape.trainable:,} of them train; {plan.optim}",
        f"{how}, {layout.processes} process{'es' if layout.processes > 1 else ''}, "
        f"{'16-bit mixed precision' if layout.half else 'float32'}; {name} per process:",
        f"  {'':<16}{'device':>10}" + (f"{'host':>10}" if layout.offload else ""),
    ]
    for field in [*(field.name for field in fields(Parts)), "total"]:
        on_host = f"{getattr(plan.host, field) / unit:>10.2f}" if layout.offload else ""
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
