"""Divide a model among the processes of a ZeRO-3 or FSDP2 launch while it is loaded, so that none ever holds the whole of it.

Every process holds a share of each weight. What needs whole ones gathers some of them for a while, on all processes alike:
a forward pass a layer at a time, hashing and saving a tensor at a time.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import compare_versions
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

_HOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def zero_of(accelerator: Accelerator) -> dict[str, Any]:
    """Give what DeepSpeed's file says of ZeRO, nothing in other launches."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin.deepspeed_config["zero_optimization"] if plugin else {}


def divides(accelerator: Accelerator) -> bool:
    """Tell whether the launch divides the weights themselves."""
    return accelerator.distributed_type == DistributedType.FSDP or zero_of(accelerator).get("stage") == 3


def can_divide(accelerator: Accelerator) -> bool:
    """Tell whether the launch can divide weights while they are loaded: older libraries do it after that."""
    if accelerator.distributed_type == DistributedType.FSDP:
        several = accelerator.num_processes > 1
        return several and compare_versions("torch", ">=", "2.8") and compare_versions("transformers", ">=", "5.24")
    return divides(accelerator)


@contextlib.contextmanager
def dividing(accelerator: Accelerator, outline: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Have `from_pretrained` divide what it loads as `dtype`: gives what it has to be told for it.

    `outline` is the same model on the meta device. Nothing else may be loaded within.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        from transformers.distributed import DistributedConfig

        plugin = accelerator.state.fsdp_plugin
        # in 16 bits float32 weights are cast on their way, and their gradients summed in float32; others stay what they are
        mixed = accelerator.mixed_precision == "bf16" and dtype == torch.float32
        config = DistributedConfig(
            fsdp_size=accelerator.num_processes,
            fsdp_plan={f"{name}.*": "free_full_weight" for name in layer_lists(outline)},
            fsdp_cpu_offload=plugin.cpu_offload is not None and "CPU" in type(plugin.cpu_offload).__name__,
            fsdp_mixed_precision=mixed,
        )
        yield {"distributed_config": config, "dtype": dtype}
        return
    zero = {name: value for name, value in zero_of(accelerator).items() if name == "offload_param"}
    # transformers finds out by this object's life; the launch's own asks for 16 bits, and has values still to be settled
    alive = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False, **zero},
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
    )
    try:
        yield {"dtype": dtype}
    finally:
        unset_hf_deepspeed_config()
        del alive


def settle(model: nn.Module) -> None:
    """Let a model that was just loaded divided be called, on all processes alike: what it needs is gathered on its way."""
    for config in {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}.values():
        vars(config).pop("distributed_config", None)  # of this launch, and none of those that load what is saved
    if _is_zero(model):
        _HOOKS[model] = [handle for unit in _units(model) for handle in _gathering(*unit)]
    else:
        with torch.no_grad(), contextlib.suppress(Exception):  # models that are not ours raise anything
            # FSDP2 takes note of its parts in the first forward pass, and later ones may leave some out
            model(input_ids=torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device))
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Let go of all that a forward pass has left gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def hand_over(model: nn.Module) -> None:
    """Leave gathering to the engine that is prepared next."""
    for handle in _HOOKS.pop(model, []):
        handle.remove()
    reshard(model)


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find the lists of a model's layers, the outer ones alone (experts are lists as well)."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: inner for name, inner in model.named_modules() if isinstance(inner, nn.ModuleList) and len(inner) == depth}
    return {name: inner for name, inner in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def _is_zero(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[Any]]]:
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
    """Make ZeRO-3's parameters whole for a while, on all processes; others, and those that are whole already, stay as they are."""
    divided = [one for one in parameters if hasattr(one, "ds_id") and one.ds_status.name == "NOT_AVAILABLE"]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def whole_shape(tensor: Any) -> torch.Size:
    """Give the shape that a weight has over all processes."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))  # FSDP2's tensors speak for all of them


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give all that a model's state holds by name, in the order of names, each whole until the next is asked for.

    All processes have to ask for all of them.
    """
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor):
            with whole([tensor]), torch.no_grad():
                yield name, (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
