"""Start and end what a launch needs around a run: processes, device, output folder, and the model prepared for training."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    compare_versions,
    disable_fsdp_ram_efficient_loading,
    is_deepspeed_available,
)
from accelerate.utils.memory import clear_device_cache

from dualoptim import signals
from dualoptim.config.args import CommonArgs, TrainArgs, UnlearnArgs
from dualoptim.config.waiting import waiting
from dualoptim.errors import InputError, reason
from dualoptim.method.dual import MakeOptimizer
from dualoptim.method.engine import Engine, prepare
from dualoptim.method.groups import decay_groups
from dualoptim.models.buckets import sized
from dualoptim.models.hashing import weights_changed
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.masters import keep, restore
from dualoptim.models.sharding import divides, hand_over, zero_of
from dualoptim.models.together import shared
from dualoptim.models.trainable import freeze_others

DEEPSPEED = "0.19"  # older versions take steps with gradients that are not numbers

T = TypeVar("T")


def start_accelerator(args: CommonArgs) -> Accelerator:
    """Start the process group and device of this run; on a CPU also take its share of the cores.

    `accelerate launch` leaves a process with one thread unless told otherwise, which costs half the speed on two cores, and
    steps that are offloaded to the CPU take 16 times as long.

    Raises:
        InputError: if the launch asks for what does not work here: fp16, DeepSpeed where it is missing or would take over the
            optimizer, the first version of FSDP, 8-bit states under FSDP, or divides weights that have to be whole.
    """
    on_cpu = not torch.accelerator.is_available()
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):  # fp16 skips a step whenever its loss scale is too large, and steps are counted here
        raise InputError(f"the launch asks for --mixed_precision {precision}; give bf16, or no")
    if with_deepspeed and (not is_deepspeed_available() or compare_versions("deepspeed", "<", DEEPSPEED)):
        raise InputError(
            f"the launch asks for DeepSpeed {DEEPSPEED} or newer, which is missing; pip install 'deepspeed>={DEEPSPEED}'"
        )
    try:
        accelerator = Accelerator(
            # without it several processes on a CPU would run as so many separate jobs; with it DeepSpeed would be switched off
            cpu=on_cpu and not with_deepspeed,
            # the loop owns its micro-batches; unset, a variable of the launch would divide every loss
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # elsewhere the device says which one, and how long it waits; `together` has the waits that may take longer
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else each gradient lies there twice
                *([InitProcessGroupKwargs(backend="gloo")] if on_cpu and (several or with_deepspeed) else []),
            ],
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise InputError(f"Accelerate refuses the launch ({reason(error)}); mend its file or its flags") from None
    if with_deepspeed:
        _settle_deepspeed(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        _settle_fsdp(accelerator, isinstance(args, TrainArgs) and args.state_bits == 8)
    if isinstance(args, TrainArgs) and args.load_in_4bit and divides(accelerator):
        raise InputError(
            "--load-in-4bit keeps weights in bytes, which ZeRO-3 and FSDP cannot divide; launch with ddp.yaml or zero2.yaml"
        )
    if isinstance(args, UnlearnArgs) and args.sam_rho and is_sharded(accelerator):
        asks = f"--sam-rho {args.sam_rho:g} moves whole weights"
        raise InputError(f"{asks}, which ZeRO and FSDP divide; launch with ddp.yaml, or drop it")
    if isinstance(args, UnlearnArgs) and args.average_cycles and with_deepspeed:
        raise InputError(
            f"--average-cycles {args.average_cycles:g} keeps a mean beside each weight, and ZeRO lays weights end to end; "
            "launch with ddp.yaml or fsdp2.yaml, or drop it"
        )
    if accelerator.device.type == "cpu" or _offloads(accelerator):
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(args.threads or max(1, cores // here))
    return accelerator


def _offloads(accelerator: Accelerator) -> bool:
    """Whether the optimizer's steps are taken on the CPU."""
    return (zero_of(accelerator).get("offload_optimizer") or {}).get("device") == "cpu"


def _settle_deepspeed(accelerator: Accelerator) -> None:
    """Set what DeepSpeed needs here, or refuse a file that asks for what cannot be."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise InputError(
                f"the launch's DeepSpeed file has a section {section!r}, which is this program's part; remove it there"
            )
    if accelerator.mixed_precision == "fp16":
        raise InputError('the launch\'s DeepSpeed file enables fp16; give "bf16": {"enabled": true} there instead')
    if (config["zero_optimization"].get("offload_optimizer") or {}).get("device") == "nvme":
        raise InputError(
            "the launch's DeepSpeed file offloads the optimizer to NVMe, where no checkpoint finds it; give cpu there"
        )
    config |= {
        "gradient_accumulation_steps": 1,  # the loop owns its micro-batches
        "train_micro_batch_size_per_gpu": 1,  # needed where no loader is prepared; nothing follows from it here
        "train_batch_size": "auto",
        "gradient_clipping": 0.0,  # set per phase; unset it would be 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # unset, offloading replaces our optimizer by another without a word
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # else it cannot be saved in the end
    for name in {"bf16", "bfloat16"} & config.keys():
        config[name]["check_grad_overflow"] = True  # else a step with a NaN would be taken


def _settle_fsdp(accelerator: Accelerator, in_bytes: bool) -> None:
    """Set what FSDP2 needs here, or refuse what it cannot do."""
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise InputError("the launch asks for FSDP version 1; set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does")
    if in_bytes:
        raise InputError("--optim-bits 8 cannot divide its states under FSDP; use ddp.yaml or one of the zero*.yaml")
    # the other processes would have an empty model until it is prepared, and it is evaluated before that
    disable_fsdp_ram_efficient_loading()
    plugin.cpu_ram_efficient_loading = False
    if plugin.mixed_precision_policy:  # unset, gradients are accumulated and averaged in bf16
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def say(accelerator: Accelerator, text: str) -> None:
    """Print on the main process alone. Accelerate's own `print` goes by the local rank, which spawned processes may lack."""
    if accelerator.is_main_process:
        print(text, flush=True)


def output_folder(args: CommonArgs, accelerator: Accelerator) -> Path:
    """Say where this run writes, the same on all processes. Nothing is created yet."""
    return Path(shared(accelerator, args.output_dir or time.strftime("runs/%Y%m%d-%H%M%S"))).expanduser()


def decided(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Give all processes what `decide` returns on the main one, or raise there what it raises, so that none waits for another.

    Raises:
        InputError: if `decide` does.
    """
    found: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            found[0] = decide()
        except InputError as error:
            found[1] = str(error)
    value, problem = shared(accelerator, found)
    if problem:
        raise InputError(problem)
    return value


# ------------------------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def training(loaded: LoadedModel, args: TrainArgs, make_optimizer: MakeOptimizer) -> Iterator[Engine]:
    """Prepare a model and its optimizer for steps; both stay prepared, to be saved (`export_model`) and then released.

    A signal that asks the command to end waits until the end of a step, where all processes agree on it (`saving.steps_of`).
    """
    torch.manual_seed(args.seed)
    model = loaded.model
    weights_changed(model)
    hand_over(model)
    freeze_others(args, model)
    groups = decay_groups(model, args.weight_decay, args.state_bits, args.quantize_embeddings)
    shares = [list(group["params"]) for group in groups]
    optimizer = make_optimizer(groups)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = keep(loaded)
    shown = waiting("preparing for training", loaded.accelerator.is_main_process)
    with shown, _as_divided(loaded), sized(loaded.accelerator, model):
        engine = prepare(loaded.accelerator, model, optimizer)
    restore(engine.model, weights)
    del weights
    if loaded.divided:
        _give_back(engine.raw_optimizer, shares)
    if isinstance(args, UnlearnArgs):
        engine.project_forget, engine.average_cycles = args.project_forget, args.average_cycles
    engine.asked_to_stop = lambda: bool(signals.asked())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # where both are one tensor, its dense gradient comes from the head, and that of the embeddings needs no second one
    embeddings.sparse = not is_sharded(loaded.accelerator) and head is not None and head.weight is embeddings.weight
    try:
        with signals.held():
            yield engine
    finally:
        weights_changed(model)
        embeddings.sparse = False
        if args.gradient_checkpointing:
            model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _as_divided(loaded: LoadedModel) -> Iterator[None]:
    """Have Accelerate take a model as it was divided: it would look for the names of layers, which FSDP2 has changed."""
    plugin = getattr(loaded.accelerator.state, "fsdp_plugin", None)
    policy = plugin.auto_wrap_policy if plugin else None
    try:
        if plugin and loaded.divided:
            plugin.auto_wrap_policy = None
        yield
    finally:
        if plugin:
            plugin.auto_wrap_policy = policy


def _give_back(optimizer: Any, groups: Sequence[list[Any]]) -> None:
    """Give an optimizer the shares of FSDP2 again: Accelerate tells them by their addresses, and empty ones have the same."""
    if any(hasattr(parameter, "to_local") for group in groups for parameter in group):
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = own
        if hasattr(optimizer, "materialize"):
            optimizer.materialize()


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether training divides the model among processes, or wraps it so that it does not come back as it was."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def prepared(loaded: LoadedModel) -> Any:
    """Find what Accelerate made of the model for training, or the model itself where nothing is prepared."""
    wrapped = (one for one in loaded.accelerator._models if loaded.accelerator.unwrap_model(one) is loaded.model)
    return next(wrapped, loaded.model)


def release(loaded: LoadedModel) -> None:
    """Free what training prepared. A plain model is whole again; a sharded one (`is_sharded`) has to be loaded anew."""
    accelerator, model = loaded.accelerator, prepared(loaded)
    if not is_sharded(accelerator):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(loaded.model).pop("_is_accelerate_prepared", None)  # or a next training would compute in 32 bits
        if not hasattr(loaded.model, "peft_config"):
            loaded.model.requires_grad_(True)  # what did not train is measured like the rest
    accelerator.free_memory()
    if accelerator.distributed_type == DistributedType.DEEPSPEED and model is not loaded.model:
        # hooks and a list of ZeRO-3's own hold a destroyed engine, and with it all of a training's memory, for good
        zero3 = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
        getattr(zero3, "FWD_MODULE_STACK", []).clear()
        for parameter in model.module.parameters():
            vars(parameter).clear()
            parameter.data = torch.empty(0)
        vars(model.optimizer).clear()
        vars(model).clear()
        clear_device_cache(garbage_collection=True)  # now, when nothing holds it any more: a whole model is loaded next
