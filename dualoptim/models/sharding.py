"""Divide a model among the processes of a ZeRO-3 or FSDP2 launch while it is loaded, so that none ever holds the whole of it.

Every process holds a share of each weight. What needs whole ones gathers some of them for a while, on all processes alike:
a forward pass a layer at a time, hashing and saving a tensor at a time.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import compare_versions
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

_HOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_IN_HALF: WeakSet[nn.Module] = WeakSet()
_EXACT: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by parameters, which compare by their values


def zero_of(accelerator: Accelerator) -> dict[str, Any]:
    """Give what DeepSpeed's file says of ZeRO, nothing in other launches."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin.deepspeed_config["zero_optimization"] if plugin else {}


def divides(accelerator: Accelerator) -> bool:
    """Tell whether the launch divides the weights themselves."""
    return accelerator.distributed_type == DistributedType.FSDP or zero_of(accelerator).get("stage") == 3


def can_divide(accelerator: Accelerator) -> bool:
    """Tell whether the launch can divide weights while they are loaded; otherwise they are divided when they train."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plain = accelerator.num_processes > 1 and not accelerator.state.fsdp_plugin.activation_checkpointing
        return plain and compare_versions("torch", ">=", "2.8") and compare_versions("transformers", ">=", "5.24")
    return divides(accelerator) and (zero_of(accelerator).get("offload_param") or {}).get("device") != "nvme"


def load_divided(accelerator: Accelerator, outline: Any, load: Callable[..., Any]) -> Any:
    """Load a model divided: `load` is its `from_pretrained`, and `outline` the same model on the meta device.

    `settle` has to follow, once it has the adapter that it may get.
    """
    with _dividing(accelerator, outline) as how:
        return load(**how)


@contextlib.contextmanager
def _dividing(accelerator: Accelerator, outline: Any) -> Iterator[dict[str, Any]]:
    """Have `from_pretrained` divide what it loads, and nothing else: gives what it has to be told for it."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from transformers.distributed import DistributedConfig

        plugin, layers = accelerator.state.fsdp_plugin, layer_lists(outline)
        # in 16 bits float32 weights are cast on their way, and their gradients summed in float32; others stay what they are
        mixed = accelerator.mixed_precision == "bf16" and outline.dtype == torch.float32
        config = DistributedConfig(
            fsdp_size=accelerator.num_processes,
            fsdp_plan={f"{name}.*": f"{'free' if plugin.reshard_after_forward else 'keep'}_full_weight" for name in layers},
            fsdp_cpu_offload=plugin.cpu_offload is not None and "CPU" in type(plugin.cpu_offload).__name__,
            fsdp_mixed_precision=mixed,
        )
        yield {"distributed_config": config}
        return
    zero = {name: value for name, value in zero_of(accelerator).items() if name == "offload_param"}
    # transformers finds out by this object's life; the launch's own asks for 16 bits, and has values still to be settled
    alive = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False, **zero},
            "bf16": {"enabled": outline.dtype == torch.bfloat16},
        }
    )
    try:
        yield {}
    finally:
        unset_hf_deepspeed_config()
        del alive


def settle(accelerator: Accelerator, model: Any) -> None:
    """Let a model that was just loaded divided be called, on all processes alike: what it needs is gathered on its way.

    In 16 bits it computes as it will in training. Under ZeRO-3 what trains is rounded for that, and `exact_share` keeps what
    it was before.
    """
    half = accelerator.mixed_precision == "bf16"
    for module in model.modules():
        vars(getattr(module, "config", module)).pop("distributed_config", None)  # of this launch, not of what is saved
        vars(module).pop("_tp_size", None)  # by which PEFT takes it for a model in tensor parallelism
    if half:
        _IN_HALF.add(model)
    if is_zero(model):
        for parameter in model.parameters():
            share = getattr(parameter, "ds_tensor", None)
            if half and share is not None and share.dtype == torch.float32:
                _EXACT[parameter] = share.data
                share.data, parameter.data = share.data.bfloat16(), parameter.data.bfloat16()
        _HOOKS[model] = [handle for unit in _units(model) for handle in _gathering(*unit)]
        return
    if hasattr(model, "peft_config"):
        _divide_adapter(accelerator, model)
    with torch.no_grad(), contextlib.suppress(Exception):  # models that are not ours raise anything
        # FSDP2 takes note of its parts in the first forward pass, and later ones may leave some out
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=accelerator.device))
    reshard(model)


def _divide_adapter(accelerator: Accelerator, model: Any) -> None:
    """Have FSDP2 divide an adapter whose base is divided: what it adds to a layer is gathered together."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    how = {"mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(), "offload_policy": plugin.cpu_offload}

    def added(outer: nn.Module) -> list[nn.Module]:
        return [
            module
            for module in outer.modules()
            if any(not hasattr(parameter, "to_local") for parameter in module.parameters(recurse=False))
        ]

    for layers in layer_lists(model).values():
        for layer in layers:
            if parts := added(layer):
                fully_shard(parts, **how)
    fully_shard([*added(model), model], **how)


def exact_share(parameter: Any) -> Tensor:
    """Give this process's share of a weight as it was loaded, once: nothing holds on to it afterwards."""
    return _EXACT.pop(parameter, own_share(parameter).data)


def computes_in_half(model: Any) -> bool:
    """Tell whether a divided model computes in 16 bits, whatever its weights are."""
    return model in _IN_HALF


def reshard(model: Any) -> None:
    """Let go of all that a forward pass of FSDP2 has left gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def hand_over(model: nn.Module) -> None:
    """Leave gathering to the engine that is prepared next."""
    for handle in _HOOKS.pop(model, []):
        handle.remove()
    reshard(model)


def layer_lists(model: Any) -> dict[str, nn.ModuleList]:
    """Find the lists of a model's layers, the outer ones alone (experts are lists as well)."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: inner for name, inner in model.named_modules() if isinstance(inner, nn.ModuleList) and len(inner) == depth}
    return {name: inner for name, inner in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def is_divided(model: nn.Module) -> bool:
    """Tell whether a model was loaded divided."""
    return any(own_share(parameter) is not parameter for parameter in model.parameters())


def is_zero(model: nn.Module) -> bool:
    """Tell whether a model was divided by ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _units(model: Any) -> Iterator[tuple[nn.Module, list[Any]]]:
    """List the modules around whose forward passes parameters are gathered, and which: layers, and all that is in none."""
    layers = [layer for layers in layer_lists(model).values() for layer in layers]
    within = {id(module) for layer in layers for module in layer.modules()}
    yield from ((layer, list(layer.parameters())) for layer in layers)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and id(module) not in within:
            yield module, own


def _gathering(module: nn.Module, parameters: list[Any]) -> Iterator[Any]:
    """Gather ZeRO-3's parameters before each forward pass of a module, and let go of them afterwards."""
    open_: list[contextlib.ExitStack] = []

    def before(*_: Any) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(whole(parameters))
        open_.append(stack)

    def after(*_: Any) -> None:
        open_.pop().close()

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after, always_call=True)


@contextlib.contextmanager
def whole(parameters: Iterable[Any]) -> Iterator[None]:
    """Make ZeRO-3's parameters whole for a while, on all processes; others, and those that are whole, stay as they are."""
    divided = [one for one in parameters if hasattr(one, "ds_id") and one.ds_status.name == "NOT_AVAILABLE"]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def own_share(tensor: Any) -> Any:
    """Give what lies on this process of a weight, or of anything else that a model's state holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)


def whole_shape(tensor: Any) -> torch.Size:
    """Give the shape that a weight has over all processes."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))  # FSDP2's tensors speak for all of them


def whole_tensors(model: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Give all that a model's state holds, or what it holds under some names, each whole until the next is asked for.

    They come in the order of names. All processes have to ask for all of them.
    """
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor) and (names is None or name in names):
            with whole([tensor]), torch.no_grad():
                yield name, (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def bare(module: Any, of_values: bool = True) -> Any:
    """Copy a module without what ZeRO-3 or FSDP2 made of it: its weights are whole, or (not `of_values`) those that it has.

    The copy shares all else with it.
    """
    kind = type(module)
    kind = kind.__mro__[2] if hasattr(kind, "unshard") else kind  # FSDP2 puts two classes before a module's own
    copied: Any = object.__new__(kind)
    nn.Module.__init__(copied)
    hooks = {name: value for name, value in vars(copied).items() if "hook" in name}
    vars(copied).update(vars(module) | hooks)
    if of_values:
        own, inner = module._parameters.items(), module._modules.items()
        copied._parameters = {name: one if one is None else nn.Parameter(_copied(one), False) for name, one in own}
        copied._modules = {name: one if one is None else bare(one) for name, one in inner}
    return copied


def _copied(parameter: Any) -> Tensor:
    """Gather a parameter, and give it to this process for good."""
    with whole([parameter]), torch.no_grad():
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach().clone()


@dataclass(frozen=True)
class Share:
    """Holds this process's part of a tensor that does not change, cut into equal parts."""

    part: Tensor
    shape: torch.Size
    processes: int

    @staticmethod
    def of(tensor: Tensor, accelerator: Accelerator) -> "Share":
        """Cut it; the last parts may be padded."""
        processes, index = accelerator.num_processes, accelerator.process_index
        flat = tensor.flatten()
        size = -(-flat.numel() // processes)
        part = flat[index * size : (index + 1) * size]
        return Share(nn.functional.pad(part, (0, size - part.numel())).clone(), tensor.shape, processes)

    def gathered(self) -> Tensor:
        """Put the parts of all processes together again, on all of them."""
        if self.processes == 1:
            return self.part.view(self.shape)
        flat = self.part.new_empty(self.processes * self.part.numel())
        dist.all_gather_into_tensor(flat, self.part)
        return flat[: self.shape.numel()].view(self.shape)
