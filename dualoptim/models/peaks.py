"""Find what each phase of a run holds at its peak: pure arithmetic, per process, in bytes.

A run loads its model, prepares it for training, takes a first step, in which the optimizer's state comes into being, trains,
evaluates and saves.
"""

from dataclasses import dataclass, replace

from dualoptim.method.kernels import LARGE_PIECE, PIECE, AgainstTargets, Statistics, rows_at_once
from dualoptim.models.memory import Demand, Division, Parts, Shape, divide, frozen_bytes, state_bytes

LOGIT_COPIES = 3  # the logits, their gradient, and a part of each that is worked on; measured
BY_HAND = 4  # float32 values that an update which is written out holds per weight: both moments, a square, a difference
DDP_SENDS = 250 * 2**20  # bytes at once
CUDA, NCCL, LIBRARIES = 2**30 // 2, 2**30, 2**30 // 2  # taken before there is a model: by CUDA, by NCCL, on the host
KERNELS = 36 * 2**20  # that a CPU compiles for products in 16 bits, one for each shape that comes along, and keeps; measured


@dataclass(frozen=True)
class Phase:
    """What a process holds at the peak of one phase, on its device and on the host."""

    name: str
    device: Parts
    host: Parts

    @property
    def total(self) -> int:
        """Add up both memories, which are one on a CPU."""
        return self.device.total + self.host.total


def phases(shape: Shape, division: Division, demand: Demand) -> list[Phase]:
    """Plan every phase of a run, in order."""
    device, host = divide(shape, division, demand)
    on_device, on_host = first_step(shape, division, demand)
    found = [
        Phase("load", *loading(shape, division, demand)),
        Phase("prepare", replace(device, optimizer=0) + preparing(shape, division, demand), replace(host, optimizer=0)),
        Phase("first step", device + on_device, host + on_host),
        Phase("train", device + training(shape, division, demand), host),
        *([Phase("midway", device + midway(shape, division, demand), host)] if demand.midway else []),
        *([Phase("evaluate", evaluating(shape, division, demand), Parts())] if demand.evaluates else []),
        Phase("save", device + saving(shape, division, demand), host),
    ]
    context = Parts(context=CUDA + (NCCL if division.processes > 1 else 0)) if division.on_cuda else Parts()
    libraries = Parts(context=LIBRARIES + (KERNELS if division.half and not division.on_cuda else 0))
    return [Phase(one.name, one.device + context, one.host + libraries) for one in found]


# ------------------------------------------------------------------------------------------------------- the phases themselves


def loading(shape: Shape, division: Division, demand: Demand) -> tuple[Parts, Parts]:
    """Plan how a model is read: whole or divided from the start, and a tensor at a time through the host."""
    width = demand.stored if division.deepspeed and division.half else 4
    wide, frozen = (shape.total, 0) if demand.partly else (shape.trainable, frozen_bytes(shape, division, demand))
    weights = width * wide + frozen
    if not division.divides:
        return Parts(weights=weights), Parts(buffers=4 * shape.read)
    # a tensor is gathered, filled with what was read, and divided again; then ZeRO-3 rounds what it computes with
    rounded = 2 * shape.trainable if division.deepspeed and division.half and demand.stored == 4 else 0
    buffers = max(2 * 4 * shape.read, division.share(rounded))
    return Parts(weights=division.share(weights), buffers=buffers), Parts(buffers=4 * shape.read)


def preparing(shape: Shape, division: Division, demand: Demand) -> Parts:
    """Plan what lies beside weights and masters until training begins.

    DeepSpeed copies weights, and those that were loaded are held until its masters are made of them. DDP lays out all gradients
    and sends the weights of the first process to the others; under FSDP2 states that can be are made at once, for checkpoints.
    """
    whole = 4 * shape.trainable
    if division.deepspeed:
        loaded = demand.stored * shape.trainable if division.half else whole
        if division.stage < 3:
            return Parts(buffers=loaded)
        kept = 0 if division.offload else division.share(whole)
        return Parts(gradients=kept, buffers=division.share(loaded + division.width * shape.total))  # laid out end to end
    if division.fsdp:
        state = division.share(state_bytes(shape, demand.moments)) if demand.tries or demand.by_hand else 0
        return Parts(optimizer=state, buffers=division.share(4 * shape.largest) if demand.tries else 0)
    return Parts(gradients=whole, buffers=min(whole, DDP_SENDS)) if division.processes > 1 else Parts()


def first_step(shape: Shape, division: Division, demand: Demand) -> tuple[Parts, Parts]:
    """Plan the step in which the optimizer's state comes into being, where this takes a zero gradient: device, host."""
    part = division.share(4 * shape.trainable) if division.deepspeed else 4 * shape.largest
    zeros = at_once(shape, division) if division.stage == 3 else part
    zeros = zeros if demand.tries and not division.fsdp else 0
    step = stepping(shape, division, demand)
    if division.offload:
        return replace(step, gradients=0), Parts(buffers=zeros)
    return replace(step, buffers=step.buffers + zeros), Parts()


def gathered(shape: Shape, division: Division) -> int:
    """Count the bytes of weights that are whole while layers are gathered: ZeRO-3 keeps as many as it may.

    FSDP2 has those that are in no layer, a layer, and the next one.
    """
    return division.width * (shape.around + 2 * shape.layer if division.fsdp else min(division.live, shape.total))


def at_once(shape: Shape, division: Division) -> int:
    """Count the bytes of gradients that ZeRO-3 updates at once: of a sub-group, which has at least one tensor's share."""
    return 4 * min(division.share(shape.trainable), max(division.sub_group, division.share(shape.largest)))


def stepping(shape: Shape, division: Division, demand: Demand) -> Parts:
    """Plan the gradients and temporaries of an optimizer's step."""
    whole, part = 4 * shape.trainable, division.share(4 * shape.trainable)
    if not division.deepspeed:
        gradients = part if division.fsdp and not demand.accumulates else whole
    elif division.stage <= 1:
        gradients = whole + (0 if division.half else part)
    elif division.stage == 2:
        gradients = part if division.half else 2 * part  # in float32 flattened once more
    else:
        gradients = part + at_once(shape, division)  # one sub-group is flattened once more
    buffers = gathered(shape, division) if division.divides else 0  # layers stay as they are
    piece = min(LARGE_PIECE if division.on_cuda and not division.offload else PIECE, shape.largest)
    if division.fsdp:  # of whose tensors a process has a part
        piece = min(piece, division.share(shape.largest))
    if demand.projects:
        buffers += 4 * (division.share(shape.largest) if division.fsdp or division.deepspeed else shape.largest)
    widened = 4 if demand.moments.in_bytes else 0  # moments in bytes are read into float32
    return Parts(gradients=gradients, buffers=buffers + (4 * piece * (BY_HAND + widened) if demand.by_hand else 0))


def training(shape: Shape, division: Division, demand: Demand) -> Parts:
    """Find the fullest moment of a later step: when its backward pass begins, when that ends, or when the weights are updated.

    When it begins, all activations lie there and only gradients that are never freed; when it ends, all gradients do and one
    layer's activations.
    """
    whole, part = 4 * shape.trainable, division.share(4 * shape.trainable)
    # DeepSpeed asks for a whole bucket, of which a CPU gives the pages that are used
    bucket = division.bucket if division.on_cuda else min(division.bucket, shape.trainable)
    width, held_here = division.width, 0 if division.offload else part
    kept = activation_bytes(shape, demand.tokens, division.half, demand.checkpointing)
    logits = demand.scored * shape.vocabulary * width * LOGIT_COPIES

    def rows(on_cpu: int) -> int:
        return rows_at_once("cuda" if division.on_cuda else "cpu", shape.vocabulary, on_cpu)

    if division.on_cuda:  # on a CPU the rows that are worked on are few, and measured among the copies
        logits += 4 * min(rows(Statistics.rows), demand.scored) * shape.vocabulary
    begin, end = Parts(activations=kept + logits), Parts(activations=kept // shape.layers)
    if division.fsdp:
        layers = gathered(shape, division)
        begin += Parts(gradients=whole if demand.accumulates else 0, buffers=layers)
        end += Parts(
            gradients=whole if demand.accumulates else part, buffers=layers + (width + 4) * max(shape.layer, shape.around)
        )
    elif not division.deepspeed:
        casts = 2 * max(0, shape.trainable - shape.looked_up) if division.half else 0
        stays = whole if demand.accumulates or division.processes > 1 else 4 * shape.largest  # that of the output head
        begin += Parts(gradients=stays, buffers=casts)
        end += Parts(gradients=whole)
    elif division.stage == 3:
        layers = gathered(shape, division)
        begin += Parts(gradients=held_here, buffers=layers + width * bucket)
        end += Parts(gradients=held_here, buffers=layers + 2 * width * bucket + 4 * shape.largest)
    elif division.stage == 2:
        begin += Parts(gradients=part if demand.accumulates else 0, buffers=width * bucket)
        end += Parts(gradients=part, buffers=2 * width * bucket + 4 * shape.largest)
    else:
        begin += Parts(gradients=whole if division.half or demand.accumulates else 0)
        end += Parts(gradients=whole + (2 * shape.trainable if division.half else 0), buffers=width * bucket)
    if demand.frozen_head:  # its logits are made and compared some rows at a time
        begin += Parts(activations=4 * 4 * rows(AgainstTargets.rows) * shape.vocabulary)
        begin += Parts(buffers=width * shape.head if division.divides else 0)
    if demand.moves:
        begin, end = begin + Parts(buffers=whole), end + Parts(buffers=whole)
    step = stepping(shape, division, demand)
    moments = (begin, end) if division.offload else (begin, end, step)
    return max(moments, key=lambda moment: moment.total)


def evaluating(shape: Shape, division: Division, demand: Demand) -> Parts:
    """Plan the evaluation: weights in the precision of measuring, and a batch that is scored or answered.

    No gradient is kept, so a batch holds the logits of all its tokens and one layer's values, or (while it is answered) keys
    and values of all layers and the logits of the last tokens.
    """
    width, (texts, length) = division.width, demand.rows
    weights = width * shape.trainable + frozen_bytes(shape, division, replace(demand, partly=False))
    head = width * shape.head if demand.frozen_head else 0  # of the reference, which a task keeps to its end
    layers = 0 if division.on_cuda or not division.half else width * shape.head  # a CPU was seen to hold as much more
    if demand.evaluates_divided:
        weights = division.share(weights)
        layers += gathered(shape, division) if division.fsdp else width * shape.layer
    scored = texts * length * (width * shape.vocabulary + width * (6 * shape.hidden + 3 * shape.intermediate))
    answered = texts * (length * width * shape.layers * shape.cached + (width + 4) * shape.vocabulary)
    weights += division.share(head) if division.divides else head
    return Parts(weights=weights, buffers=layers, activations=max(scored, answered))


def midway(shape: Shape, division: Division, demand: Demand) -> Parts:
    """Plan an evaluation between steps: beside all that trains, in 16 bits with copies of float32 weights that are rounded."""
    measured = evaluating(shape, division, replace(demand, evaluates_divided=division.divides))
    wide = shape.total if demand.partly else shape.trainable
    copies = 2 * wide if division.half and not (division.deepspeed or division.fsdp) else 0
    gradients = saving(shape, division, demand).gradients
    return Parts(gradients=gradients, buffers=measured.buffers + copies, activations=measured.activations)


def saving(shape: Shape, division: Division, demand: Demand) -> Parts:
    """Plan what saving adds: one tensor at a time, whole and in float32, and as it is saved; some launches keep gradients."""
    kept = division.share(4 * shape.trainable) if division.stage == 3 and not division.offload else 0
    if (division.stage == 1 and division.half) or (division.processes > 1 and not division.deepspeed and not division.fsdp):
        kept = 4 * shape.trainable
    layers = gathered(shape, division) if division.divides else 0  # some stay from the last step
    return Parts(gradients=kept, buffers=layers + 2 * 4 * (shape.read if demand.partly else shape.largest))


def activation_bytes(shape: Shape, tokens: int, half: bool, checkpointing: bool) -> int:
    """Count the bytes that the forward pass keeps for the backward pass.

    For a layer as in Llama (hidden h, intermediate i): inputs and normalized inputs of two norms, queries, keys, values, the
    output of attention, and four vectors of the MLP:

        layers * tokens * (48 h + 16 i) in float32, (38 h + 8 i) in 16 bits, where norms and the residual stay wider.

    Measured within 10 % for Llama in float32; GPT-2, with dropout and an unfused activation, takes 1.8 times that. With
    checkpointing each layer keeps its input alone (4 h), and one layer at a time is recomputed. Layers before the first weight
    that trains keep nothing. Attention is taken to be sdpa or flash; eager adds scores that grow with the square of the length.
    """
    per_token = 38 * shape.hidden + 8 * shape.intermediate if half else 48 * shape.hidden + 16 * shape.intermediate
    layers = shape.layers if shape.reached is None else shape.reached
    kept = layers * 4 * shape.hidden + per_token if checkpointing else layers * per_token
    return tokens * kept
