"""Compute what a run takes in memory from numbers of parameters: pure arithmetic, per process, in bytes.

Bytes of DeepSpeed are those that version 0.19 was measured to hold with the settings that `start_accelerator` gives it.
Everything is at its largest within one optimizer step.
"""

from dataclasses import dataclass, fields, replace

from dualoptim.config.optimizers import Moments
from dualoptim.method.kernels import BLOCK

LOGIT_COPIES = 3  # the logits, their gradient, and a part of each that is worked on; measured


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
        """Count the parameters that get a gradient."""
        return self.quantizable + self.other

    @property
    def total(self) -> int:
        """Count all parameters; tied ones count once."""
        return self.trainable + self.frozen


@dataclass(frozen=True)
class Division:
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
        """Add all of them up."""
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
    division: Division
    tokens: int
    optim: str

    @property
    def needed(self) -> int:
        """Find the device's largest load: a training step, or the whole model while it is loaded or evaluated."""
        return max(self.device.total + (self.host.total if self.shared else 0), self.whole)

    @property
    def fits(self) -> bool:
        """Tell whether device and host hold the run."""
        return self.needed <= self.capacity and (self.shared or max(self.host.total, self.whole) <= self.host_capacity)


# ------------------------------------------------------------------------------------------------------- arithmetic


def state_bytes(shape: Shape, moments: Moments) -> int:
    """Count the bytes of a model's optimizer state.

    8 bits: one byte a value and one float32 absmax per 256 values, of parameters that can be quantized.
    """
    quantizable = 4 * moments.wide + (1 + 4 / BLOCK) * moments.in_bytes
    return round(shape.quantizable * quantizable + shape.other * 4 * (moments.wide + moments.in_bytes))


def activation_bytes(shape: Shape, tokens: int, half: bool, checkpointing: bool) -> int:
    """Count the bytes that the forward pass keeps for the backward pass.

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


def divide(shape: Shape, division: Division, optimizer: int) -> tuple[Parts, Parts]:
    """Divide weights, gradients, masters, state (`optimizer` bytes before division) and buffers into device and host bytes."""
    trained, shares, width = shape.trainable, division.processes, 2 if division.half else 4
    if not division.deepspeed:  # float32 everywhere; DDP copies gradients into its buckets
        gradients = 4 * trained * (2 if shares > 1 else 1)
        buffers = 2 * shape.total if division.half else 0
        return Parts(weights=4 * shape.total, gradients=gradients, optimizer=optimizer, buffers=buffers), Parts()
    share = rounded_up(4 * trained, shares)  # float32 values of one process's part
    weights, buffers = width * shape.total, width * division.bucket
    if division.stage <= 1:
        # whole gradients in float32; 16-bit ones beside them, or the flattened part
        gradients = 4 * trained + (2 * trained if division.half else share)
    elif division.stage == 2:
        gradients = share if division.half else 2 * share  # in float32 flattened once more for the step
    else:
        weights = rounded_up(weights, shares)
        gradients = share + min(share, 4 * division.sub_group)  # one sub-group is flattened once more for the step
        buffers += width * min(division.live, shape.total)
    masters, state = share, rounded_up(optimizer, shares)
    device = Parts(weights=weights, gradients=gradients, buffers=buffers)
    if not division.offload:
        return replace(device, masters=masters, optimizer=state), Parts()
    on_host = Parts(gradients=share, masters=masters, optimizer=state)
    if division.stage == 3:  # both copies of the gradients lie on the host, one pinned
        return replace(device, gradients=0), replace(on_host, gradients=2 * share)
    return device, on_host


def rounded_up(value: int, parts: int) -> int:
    """Size one of so many equal parts, the last of which may be padded."""
    return -(-value // parts)
