"""Write what is trained, and the optimizer's state of it, in pieces of named weights, which any other launch puts together.

A launch divides weights and states in its own way: whole on every process, by rows (FSDP2), or laid end to end and cut (ZeRO).
A file says of each piece of which weight it is and where it begins there, so that one process or eight read what two have
written, each of them no more than its own part.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualoptim.method.engine import Engine

_FILE_BYTES = 2**30  # after so many a file ends: what a process copies to its host at a time
_WEIGHT, _MEAN, _WHOLE = "weight", "mean", "*"


@dataclass(frozen=True)
class Part:
    """Says which part of a weight lies where in a tensor, both laid out flat."""

    weight: str
    start: int
    place: int
    size: int


@dataclass(frozen=True)
class Held:
    """Holds a tensor that this process's optimizer updates, what of which weights it is, and a name for the whole of it."""

    tensor: Tensor
    parts: list[Part]
    name: str


def held_by(engine: Engine) -> list[Held]:
    """List what the optimizer of this process updates: weights, or the float32 masters of them."""
    accelerator = engine.accelerator
    model, zero = accelerator.unwrap_model(engine.model), getattr(engine.model, "optimizer", None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for flat, groups, part_of in (
        ("fp32_partitioned_groups_flat", "fp16_groups", _third_stage),
        ("single_partition_of_fp32_groups", "bit16_groups", _first_stages),
        ("fp32_groups_flat_partition", "bf16_groups", _first_stages),
    ):
        if accelerator.distributed_type == DistributedType.DEEPSPEED and hasattr(zero, flat):
            found = []
            for number, (tensor, group) in enumerate(zip(getattr(zero, flat), getattr(zero, groups), strict=True)):
                parts = [part for one in group for part in part_of(zero, one, names[id(one)])]
                found.append(Held(tensor, parts, f"{number} of {accelerator.process_index}"))
            return found
    parameters = [parameter for group in engine.raw_optimizer.param_groups for parameter in group["params"]]
    return [Held(one, [_rows(one, names[id(one)])], names[id(one)]) for one in parameters]


def _third_stage(zero: Any, parameter: Any, name: str) -> Iterator[Part]:
    """Cut weight by weight; the last process's part is filled up, as are those behind it."""
    _, place, size = zero.grad_position[zero.get_param_id(parameter)]
    start = torch.distributed.get_rank(parameter.ds_process_group) * size
    if start < parameter.ds_numel:
        yield Part(name, start, place, min(size, parameter.ds_numel - start))


def _first_stages(_: Any, parameter: Any, name: str) -> Iterator[Part]:
    """Cut where the weights of a group, end to end, are cut."""
    if parameter._hp_mapping is not None:
        of_weight, of_master = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
        yield Part(name, of_weight.start, of_master.start, of_weight.numel)


def _rows(parameter: Any, name: str) -> Part:
    """Give the whole weight, or of one of FSDP's the rows that lie here."""
    if not hasattr(parameter, "to_local"):
        return Part(name, 0, 0, parameter.numel())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert shape[1:] == tuple(parameter.shape[1:]), "divided otherwise than by rows"
    return Part(name, offset[0] * parameter.shape[1:].numel(), 0, parameter.to_local().numel())


def _flat(tensor: Any) -> Tensor:
    """Lay out what lies here of a tensor, as a view where that can be."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.detach().reshape(-1)


def _is_in_step(tensor: Tensor, value: Any) -> bool:
    """Tell whether a value of a state has a number for each of a tensor; bytes have not, whose blocks share a scale."""
    return isinstance(value, Tensor) and value.shape == tensor.shape and value.dtype != torch.uint8


# -------------------------------------------------------------------------------------------------------------- writing


def write_parts(engine: Engine, folder: Path) -> tuple[list[str], bool]:
    """Write this process's share of weights and states; name its files, and tell whether all of it can be cut otherwise.

    States in bytes cannot: a block of them has one scale, and under ZeRO blocks lie across weights.
    """
    accelerator, held = engine.accelerator, held_by(engine)
    if accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP):  # all have the same
        held = held[accelerator.process_index :: accelerator.num_processes]
    names, size, portable = [_random_file(accelerator)], 0, True
    tensors: dict[str, Tensor] = {}
    save_file(_random_states(accelerator), folder / names[0])
    for position, one in enumerate(held, start=1):
        state = engine.raw_optimizer.state.get(one.tensor, {})
        for key, value in _pieces_of(one, {_WEIGHT: one.tensor, _MEAN: engine.means.get(one.tensor), **state}):
            tensors[key] = value.cpu()
            size += value.nbytes
            portable &= f"@{_WHOLE}:" not in key
        if size >= _FILE_BYTES or position == len(held):
            names.append(f"part-{accelerator.process_index}-{len(names)}.safetensors")
            save_file(tensors, folder / names[-1])
            tensors, size = {}, 0
    return names, portable


def _pieces_of(held: Held, values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Give each value in the parts that it is of, a counter with each of them, and what cannot be cut under the name of all."""
    for entry, value in values.items():
        if value is None:
            continue
        if _is_in_step(held.tensor, value):
            for part in held.parts:
                yield f"{entry}@{part.start}:{part.weight}", _flat(value)[part.place : part.place + part.size].contiguous()
        elif not isinstance(value, Tensor) or not value.dim():
            for part in held.parts:
                yield f"{entry}@{part.start}:{part.weight}", torch.as_tensor(value).clone()
        else:
            yield f"{entry}@{_WHOLE}:{held.name}", value.clone()  # several share the table of what bytes mean


def _random_file(accelerator: Accelerator) -> str:
    return f"random-{accelerator.process_index}.safetensors"


def _random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type != "cpu":
        module, named = _generator(accelerator.device)
        states["device"] = module.get_rng_state(*named)
    return states


def _generator(device: torch.device) -> tuple[Any, list[torch.device]]:
    """Give the module that keeps a device's random state, and how its functions are told which: MPS has one, and no name."""
    return torch.get_device_module(device), [] if device.type == "mps" else [device]


# -------------------------------------------------------------------------------------------------------------- reading


def read_parts(engine: Engine, folder: Path) -> None:
    """Put what this process needs of what all have written into weights and states; random states too if as many wrote it.

    Raises:
        ValueError: if a piece is missing, or does not fit.
    """
    optimizer, zero = engine.raw_optimizer, getattr(engine.model, "optimizer", None)
    stored = _Stored(folder, any(group.get("fused") for group in optimizer.param_groups))
    if hasattr(optimizer, "materialize"):
        with _groups_filled(zero):
            optimizer.materialize()
    with torch.no_grad():
        for held in held_by(engine):
            stored.fill(held, _WEIGHT, held.tensor)
            state = optimizer.state[held.tensor]
            for entry in stored.entries(held) - {_WEIGHT}:
                if entry == _MEAN:
                    engine.means[held.tensor] = stored.value(held, entry, None)
                else:
                    state[entry] = stored.value(held, entry, state.get(entry))
        _hand_on(zero)
    if len(list(folder.glob("random-*.safetensors"))) == engine.accelerator.num_processes:
        states, device = load_file(folder / _random_file(engine.accelerator)), engine.accelerator.device
        torch.set_rng_state(states["cpu"])
        if "device" in states and device.type != "cpu":
            module, named = _generator(device)
            module.set_rng_state(states["device"], *named)


class _Stored:
    """Finds the pieces in the files of a checkpoint, and puts them together."""

    def __init__(self, folder: Path, fused: bool) -> None:
        self._fused = fused  # such steps count where the weights lie
        self._pieces: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
        for path in sorted(folder.glob("part-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118
                entry, _, place = key.partition("@")
                start, _, weight = place.partition(":")
                self._pieces[weight][entry][start] = file.get_slice(key)

    def entries(self, held: Held) -> set[str]:
        """Name what is stored of a tensor."""
        return {entry for weight in (held.name, *(part.weight for part in held.parts)) for entry in self._pieces[weight]}

    def value(self, held: Held, entry: str, before: Any) -> Any:
        """Read one value of the state of a tensor, into the one that it has where that can be."""
        if whole := self._pieces[held.name][entry].get(_WHOLE):
            return before.copy_(whole[...]) if isinstance(before, Tensor) else whole[...].to(held.tensor.device)
        pieces = [piece for part in held.parts for piece in self._pieces[part.weight][entry].values()]
        if pieces[0].get_shape():
            value = torch.zeros_like(held.tensor, requires_grad=False) if before is None else before
            self.fill(held, entry, value)
            return value
        # a counter: of weights that ZeRO lays together all have the same, but for those that have had no step yet
        counters = {piece[...].item() for piece in pieces} - {0} or {0}
        if len(counters) > 1:
            raise ValueError(f"{entry} of {held.parts[0].weight} is not that of the weights that it now lies with")
        if before is None and pieces[0].get_dtype() != "I64":  # which are Python's own numbers
            before = pieces[0][...].to(_flat(held.tensor).device if self._fused else "cpu")
        return torch.full_like(before, *counters) if isinstance(before, Tensor) else counters.pop()

    def fill(self, held: Held, entry: str, value: Tensor) -> None:
        """Copy what is stored of an entry into `value`, which lies as the tensor does; nothing where nothing is stored."""
        own = value.to_local() if hasattr(value, "to_local") else value
        flat = _flat(value)
        for part in held.parts:
            missing = part.size
            for place, piece in self._pieces[part.weight][entry].items():
                start, (size,) = int(place), piece.get_shape()
                first, last = max(start, part.start), min(start + size, part.start + part.size)
                if first < last:
                    here = part.place + first - part.start
                    flat[here : here + last - first] = piece[first - start : last - start].to(flat)
                    missing -= last - first
            if missing and (missing < part.size or entry == _WEIGHT):
                raise ValueError(f"{missing} of {part.size} values are missing of {entry} of {part.weight}")
        if flat.data_ptr() != own.data_ptr():  # it could not be laid out flat as it is
            own.copy_(flat.view_as(own))


@contextlib.contextmanager
def _groups_filled(zero: Any) -> Iterator[None]:
    """Have ZeRO-3's tensors in the optimizer's groups, where they are for a step alone."""
    third = hasattr(zero, "fp32_partitioned_groups_flat")
    if third:
        zero._set_fp32_optimizer_param_groups()
    yield
    if third:
        zero._clear_fp32_optimizer_param_groups()


def _hand_on(zero: Any) -> None:
    """Have ZeRO make its weights of the masters again, as it does after a step."""
    if hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
    elif hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.checkpoint_event_prologue()
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
