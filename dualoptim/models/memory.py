"""Compute what a run takes in memory from numbers of parameters: pure arithmetic, per process, in bytes.

Here is what lies there throughout, in `peaks` what each phase of a run adds. Bytes of DeepSpeed are those that version 0.19 was
measured to hold with the settings that `start_accelerator` gives it (tests/speed/memory.py).
"""

from dataclasses import dataclass, fields

from dualoptim.config.optimizers import Moments
from dualoptim.method.kernels import BLOCK

DOUBLE_QUANT = 4 + 8 / 64 + 32 / 2**14  # bits of a weight in NF4 with scales of 64 weights, quantized once more


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
    largest: int = 0  # parameters of the largest tensor that trains
    read: int = 0  # parameters of the largest tensor of all
    layer: int = 0  # parameters of one layer
    reached: int | None = None  # layers through which gradients go, the last ones; None: all of them
    looked_up: int = 0  # trainable parameters that are never multiplied: embeddings that are no output head
    packable: int = 0  # frozen parameters that --load-in-4bit holds in 4 bits
    cached: int = 0  # values that a layer keeps of a token while a text is continued: its key and its value

    @property
    def trainable(self) -> int:
        """Count the parameters that get a gradient."""
        return self.quantizable + self.other

    @property
    def total(self) -> int:
        """Count all parameters; tied ones count once."""
        return self.trainable + self.frozen

    @property
    def head(self) -> int:
        """Count the weights of the output head."""
        return self.vocabulary * self.hidden

    @property
    def around(self) -> int:
        """Count the parameters that are in no layer."""
        return self.total - self.layers * self.layer


@dataclass(frozen=True)
class Division:
    """How a launch divides the model; `offload` moves masters and optimizer state to the host."""

    processes: int = 1
    stage: int = 0  # of ZeRO; 0: whole in every process
    deepspeed: bool = False
    fsdp: bool = False
    half: bool = False  # 16-bit mixed precision: autocast in a plain process, 16-bit weights under DeepSpeed and FSDP
    offload: bool = False
    bucket: int = 0  # elements that DeepSpeed reduces at once; 0, as the two below: what `buckets` chooses for the model
    live: int = 0  # elements that ZeRO-3 keeps gathered
    sub_group: int = 0  # elements that ZeRO-3 updates at once
    on_cuda: bool = False

    @property
    def divides(self) -> bool:
        """Tell whether the weights themselves are divided."""
        return self.fsdp or self.stage == 3

    @property
    def width(self) -> int:
        """Count the bytes of a weight in which the launch computes."""
        return 2 if self.half else 4

    def share(self, size: float) -> int:
        """Size a process's part of what is divided among all, the last of which may be padded."""
        return -(-round(size) // self.processes)


@dataclass(frozen=True)
class Lengths:
    """How many tokens the texts of a run have, at most."""

    micro_batch: int
    scored: int  # of a micro-batch, those whose logits are computed
    text: int  # of an evaluation, with the answer that is generated
    why_not: str = ""  # the data's own could be read; empty where they are these
    steps: tuple[str, ...] = ()  # of each pair, rate and task, in words


@dataclass(frozen=True)
class Demand:
    """What the arguments of a run ask for."""

    moments: Moments
    tokens: int  # of the longest micro-batch
    scored: int  # tokens of a micro-batch whose logits are computed
    rows: tuple[int, int] = (1, 1)  # texts of an evaluation's batch, and how long each gets at worst
    checkpointing: bool = False
    accumulates: bool = False  # several micro-batches a step
    frozen_head: bool = False  # KL, JSD and UNDIAL keep a copy of the output head
    tries: bool = False  # states are made by a step with a zero gradient (DualOptimizer)
    by_hand: bool = False  # the update is written out (DualOptim+)
    moves: bool = False  # weights are kept while they are moved for a second pass (`--sam-rho`)
    projects: bool = False  # a tensor's gradient or moment is made beside it (`--project-forget`)
    in_4bit: bool = False
    partly: bool = False  # some weights train, of a model that is loaded as if all did
    stored: int = 4  # bytes of a weight in the checkpoint
    evaluates: bool = True
    evaluates_divided: bool = False
    sharded: str = "auto"  # what `--evaluate-sharded` asks for
    midway: bool = False  # evaluates between steps too


@dataclass(frozen=True)
class Parts:
    """Bytes of each kind in one memory."""

    weights: int = 0
    gradients: int = 0
    masters: int = 0  # float32 copies of 16-bit or flattened weights
    optimizer: int = 0
    buffers: int = 0  # of communication, gathered layers, the 16-bit copies that autocast makes, temporaries of a step
    activations: int = 0  # with logits, and with keys and values
    context: int = 0  # of Python, PyTorch, CUDA and NCCL

    @property
    def total(self) -> int:
        """Add all of them up."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


# ------------------------------------------------------------------------------------------- what training holds throughout


def state_bytes(shape: Shape, moments: Moments) -> int:
    """Count the bytes of a model's optimizer state.

    8 bits: one byte a value and one float32 absmax per 256 values, of parameters that can be quantized.
    """
    quantizable = 4 * moments.wide + (1 + 4 / BLOCK) * moments.in_bytes
    return round(shape.quantizable * quantizable + shape.other * 4 * (moments.wide + moments.in_bytes))


def frozen_bytes(shape: Shape, division: Division, demand: Demand) -> int:
    """Count the bytes of weights that do not train: in the launch's precision, or in 4 bits where these are held so.

    Beside own weights that train they are float32 as these, but for DeepSpeed, which rounds them.
    """
    packed = shape.packable if demand.in_4bit else 0
    width = 4 if demand.partly and not division.deepspeed else division.width
    return round(packed * DOUBLE_QUANT / 8) + width * (shape.frozen - packed)


def exact_bytes(shape: Shape, division: Division, demand: Demand) -> int:
    """Count the bytes on the host of what DeepSpeed rounds though it does not train, as it was loaded."""
    rounds = demand.partly and division.deepspeed and division.half and demand.stored == 4
    whole = 4 * shape.frozen if rounds else 0
    return division.share(whole) if division.divides else whole


def divide(shape: Shape, division: Division, demand: Demand) -> tuple[Parts, Parts]:
    """Divide weights, masters and optimizer state into device and host bytes; gradients come and go, but for those on the host.

    There ZeRO-3 has them twice, once as they arrive.
    """
    state, frozen = state_bytes(shape, demand.moments), frozen_bytes(shape, division, demand)
    masters, exact = 0, exact_bytes(shape, division, demand)
    if division.deepspeed:
        weights = division.width * shape.trainable + frozen
        masters, state = division.share(4 * shape.trainable), division.share(state)
    else:  # the weights that train are float32 and their own masters
        weights = 4 * shape.trainable + frozen
        state = division.share(state) if division.fsdp else state
    weights += division.width * shape.head if demand.frozen_head else 0
    weights = division.share(weights) if division.divides else weights
    if division.offload:
        gradients = (2 if division.stage == 3 else 1) * masters
        return Parts(weights=weights), Parts(gradients=gradients, masters=masters + exact, optimizer=state)
    return Parts(weights=weights, masters=masters, optimizer=state), Parts(masters=exact)
