"""Models and tokenizers: where they come from, which attention they run, and whether they can take packed rows."""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, disable_fsdp_ram_efficient_loading
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from dualoptim.config.args import CommonArgs, TrainArgs
from dualoptim.models.packing import BLOCKWISE
from dualoptim.data.tofu import Example, Formatter, choose_template, pack, pad
from dualoptim.errors import InputError, reason
from dualoptim.method.scores import Batch

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=12)


@dataclass
class Policy:
    """The model that is trained or measured, with everything needed to feed it."""

    model: Any
    formatter: Formatter
    template: str
    packed: bool
    shares: bool = False  # packed texts may have a question in common

    @property
    def tokenizer(self) -> Any:
        """The formatter's tokenizer."""
        return self.formatter.tokenizer

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        """Examples as this model takes them."""
        return (pack(examples, self.shares) if self.packed else pad(examples)).to(device)


def start_accelerator(args: CommonArgs) -> Accelerator:
    """The process group and device of this run; on a CPU also its share of the cores.

    `accelerate launch` leaves a CPU process with one thread unless told otherwise, which costs half the speed on two cores.

    Raises:
        InputError: if the launch asks for the first version of FSDP, or for 8-bit states under FSDP.
    """
    on_cpu = not torch.accelerator.is_available()
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        # without `cpu` several processes on a CPU would run as so many separate jobs; with it DeepSpeed would be switched off
        cpu=on_cpu and not with_deepspeed,
        # the main process may work for long while the others wait: it writes, hashes, and runs lm-eval
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=_PATIENCE)]
        if several or with_deepspeed
        else [],
    )
    if with_deepspeed:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "gradient_accumulation_steps": 1,  # the loop owns its micro-batches
            "train_micro_batch_size_per_gpu": 1,  # needed where no loader is prepared; nothing follows from it here
            "gradient_clipping": 0.0,  # set per phase; unset it would be 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # unset, offloading replaces our optimizer by another without a word
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if not accelerator.is_fsdp2:
            raise InputError("the launch asks for FSDP version 1; set fsdp_version: 2, as accelerate_configs/fsdp2.yaml does")
        if isinstance(args, TrainArgs) and args.state_bits == 8:
            raise InputError("--optim-bits 8 cannot divide its states under FSDP; use ddp.yaml or one of the zero*.yaml")
        # the other processes would have an empty model until it is prepared, and it is evaluated before that
        disable_fsdp_ram_efficient_loading()
        plugin.cpu_ram_efficient_loading = False
        if plugin.mixed_precision_policy:  # unset, gradients are accumulated and averaged in bf16
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
    if accelerator.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(args.threads or max(1, cores // here))
    return accelerator


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The launch's 16-bit products on float32 weights, for a model that is not prepared.

    Accelerate's own does nothing under DeepSpeed, whose engine has 16-bit weights; a whole model beside it still needs this,
    and flash-attention does not run without.
    """
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return torch.autocast(accelerator.device.type, precision) if precision else nullcontext()


def load_config(args: CommonArgs) -> tuple[Any, str, dict[str, str]]:
    """The configuration of `args.model`, and what else `from_pretrained` takes to load from there.

    Raises:
        InputError: if it cannot be found or read, or is not of a decoder-only language model.
    """
    _, base = _adapter_of(args.model)
    source, options = _source(base)
    config = _from_hub(base, AutoConfig, source, **options)
    if config.is_encoder_decoder or (config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder):
        raise InputError(
            f"--model {args.model}: {config.model_type} is not a decoder-only language model; unlearning here needs one that "
            "predicts the next token, such as Llama, Phi, Qwen or GPT"
        )
    return config, source, options


def load_policy(args: CommonArgs, accelerator: Accelerator, quantization: dict[str, Any] | None = None) -> Policy:
    """Model (float32 weights), tokenizer and template of `args.model`, on the accelerator's device and not yet prepared.

    `quantization` are options of `from_pretrained` (`quantization_options`).

    Raises:
        InputError: if the model cannot be found or read, is not a decoder-only language model, or its tokenizer cannot give
            character offsets or has no end-of-sequence token.
    """
    # in a ZeRO-3 launch transformers would divide the model while it loads, whatever zero3_init_flag says, and under bf16 round
    # its weights before the float32 masters are copied from them
    unset_hf_deepspeed_config()
    adapter, base = _adapter_of(args.model)
    _, source, options = load_config(args)
    tokenizer = _from_hub(args.model, AutoTokenizer, adapter) if adapter else _from_hub(base, AutoTokenizer, source, **options)
    formatter, template = make_formatter(args, tokenizer)
    attention = attention_implementation(args, accelerator)
    if isinstance(args, TrainArgs) and args.load_in_4bit:
        quantization = quantization_options(accelerator, 4)
    more = {"dtype": torch.float32, "attn_implementation": attention, **(quantization or {})}
    model = _from_hub(base, AutoModelForCausalLM, source, **options, **more)
    if "gguf_file" in options:  # weights were widened to float32 on loading; what remains says that they cannot be saved
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    learner = args if isinstance(args, TrainArgs) and args.use_lora else None
    if adapter:
        model = _load_adapter(model, adapter, is_trainable=learner is not None)
    elif learner:
        model = add_adapter(learner, model)
    return assemble(args, model, formatter, template, accelerator)


def _load_adapter(model: Any, folder: str, is_trainable: bool) -> Any:
    """`model` with the adapter of `folder`: to be trained on, or merged into the weights, which then train themselves.

    Raises:
        InputError: if its weights are missing, or are not of this model.
    """
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except Exception as error:  # a folder without weights is looked up on the hub, where its path is no valid name
        raise InputError(
            f"--model {folder}: its adapter cannot be loaded ({reason(error)}); give the whole folder "
            "that a --use-lora run wrote"
        ) from None
    # loading the adapter froze what is all there is once it is merged
    return adapted if is_trainable else adapted.merge_and_unload().requires_grad_(True)


def _adapter_of(name: str) -> tuple[str | None, str]:
    """The folder of an adapter and the model that it belongs to, or None and the model itself."""
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return None, name
    from peft import PeftConfig

    return str(folder), _from_hub(name, PeftConfig, str(folder)).base_model_name_or_path


def add_adapter(args: TrainArgs, model: Any) -> Any:
    """`model` with a fresh low-rank adapter (LoRA, arXiv 2106.09685), which alone trains. At first it changes nothing.

    Raises:
        InputError: if `--lora-target-modules` names no module of the model.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds and loads bitsandbytes, so only those wait who use it

    targets = list(args.lora_target_modules)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)  # every process draws the same adapter
    try:
        adapted = get_peft_model(model, config)
    except ValueError:
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        raise InputError(
            f"--lora-target-modules {' '.join(targets)}: not in this model; "
            f"choose from {', '.join(sorted(leaves))} or all-linear"
        ) from None
    # what loads the adapter has to find its base again, from any folder
    path = Path(args.model).expanduser()
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else args.model
    return adapted


def quantization_options(accelerator: Accelerator, bits: int) -> dict[str, Any]:
    """How `from_pretrained` loads weights that do not train in 8 or 4 bits.

    8: LLM.int8() (arXiv 2208.07339). 4: NF4, double quantization, bf16 products (QLoRA, arXiv 2305.14314).

    Raises:
        InputError: without CUDA.
    """
    if accelerator.device.type != "cuda":
        raise InputError("--load-in-4bit needs CUDA, and this run has none; drop the flag, or start it on a GPU")
    if bits == 8:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": settings, "device_map": {"": accelerator.device}}


def assemble(args: CommonArgs, model: Any, formatter: Formatter, template: str, accelerator: Accelerator) -> Policy:
    """A `Policy` of a loaded model, which is moved to its device and probed for packed rows and shared questions."""
    if not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):  # those lie there and cannot be moved
        model.to(accelerator.device)
    if args.attn_implementation == "auto" and accelerator.device.type == "cpu" and model._can_set_attn_implementation():
        model.set_attn_implementation(BLOCKWISE)
    with autocast(accelerator):
        packed = args.packing and takes_packed_rows(model)
        # other kernels take no mask for whole texts, and flash-attention would fail on the GPU for good
        masked = model.config._attn_implementation in ("sdpa", BLOCKWISE) and _sees_all(model, args.max_length)
        shares = packed and masked and takes_packed_rows(model, share=True)
    if args.packing and not packed:
        logger.warning("%s mixes packed examples; falling back to padded batches", type(model).__name__)
    return Policy(model, formatter, template, packed, shares)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether training divides the model among processes, or wraps it so that it does not come back as it was."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def release(policy: Policy, accelerator: Accelerator) -> None:
    """Free what training prepared. The plain model remains; a sharded one is gone and has to be loaded again."""
    accelerator.wait_for_everyone()
    engine = policy.model if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    policy.model = None if is_sharded(accelerator) else accelerator.unwrap_model(policy.model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if engine:  # hooks and a list of ZeRO-3's own hold a destroyed engine, and with it all of a training's memory, for good
        zero3 = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
        getattr(zero3, "FWD_MODULE_STACK", []).clear()
        for parameter in engine.module.parameters():
            vars(parameter).clear()
            parameter.data = torch.empty(0)
        vars(engine.optimizer).clear()
        vars(engine).clear()
        gc.collect()


def make_formatter(args: CommonArgs, tokenizer: Any) -> tuple[Formatter, str]:
    """The formatter for a tokenizer and the name of its template.

    Raises:
        InputError: if the tokenizer gives no character offsets or has no end-of-sequence token.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {args.model}: its tokenizer gives no character offsets; convert it to the fast (tokenizer.json) form"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {args.model}: its tokenizer has no end-of-sequence token; set eos_token and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    template, tags = choose_template(args, tokenizer)
    return Formatter(tokenizer, tags, args.max_length), template


def attention_implementation(args: CommonArgs, accelerator: Accelerator) -> str:
    """The kernel that `auto` stands for here.

    Raises:
        InputError: if flash-attention is asked for and cannot run.
    """
    on_cuda = accelerator.device.type == "cuda"
    can_flash = on_cuda and is_flash_attn_2_available() and accelerator.mixed_precision in ("bf16", "fp16")
    if args.attn_implementation == "flash_attention_2" and not can_flash:
        raise InputError(
            "--attn-implementation flash_attention_2 needs CUDA, the flash-attn package (the extra flash-attn) and "
            "--mixed_precision bf16 in the launch; choose sdpa"
        )
    if args.attn_implementation != "auto":
        return args.attn_implementation
    return "flash_attention_2" if can_flash else "sdpa"


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a hub id, a folder, or a .gguf file.

    Raises:
        InputError: if `name` is a path at which there is nothing.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"--model {name}: no such file; give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: the folder has no config.json; give the folder that save_pretrained wrote")
        return str(path), {}
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(f"--model {name}: no such folder; give a folder, a .gguf file or a hub id")
    return name, {}


def _from_hub(name: str, kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained`, with its many kinds of failure turned into one line."""
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # OSError, ValueError, KeyError, JSON and safetensors errors, by the library's version
        raise InputError(
            f"--model {name}: {kind.__name__} cannot load it ({reason(error)}); give a folder written by save_pretrained, "
            "a .gguf file, or a hub id that this machine can reach"
        ) from None


@torch.no_grad()
def takes_packed_rows(model: Any, share: bool = False) -> bool:
    """Whether a model keeps packed examples apart, found out by packing two and scoring each alone as well.

    With `share` the two have their first tokens in common. Nothing in a configuration says so reliably, and a model that mixes
    them trains on wrong numbers without a word.
    """
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    examples = [Example([(7 * k + shift) % vocabulary for k in range(length)], 1) for length, shift in ((9, 3), (7, 5))]
    if share:
        examples = [Example(examples[0].ids[:4] + example.ids, 4) for example in examples]
    try:
        together = _logits(model, pack(examples, share))
        alone = torch.cat([_logits(model, pack([example])) for example in examples])
    except (TypeError, ValueError, RuntimeError, IndexError):  # no position_ids, or buffers that end too early
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    return bool((together - alone).norm() <= tolerance * alone.norm())


def _sees_all(model: Any, length: int) -> bool:
    """Whether no window of the model's attention is shorter than a text; a mask for whole texts would leave it out."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return not window or window >= length


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    on_device = batch.to(model.device)
    return model(
        input_ids=on_device.input_ids,
        position_ids=on_device.position_ids,
        attention_mask=on_device.attention_mask,
        logits_to_keep=on_device.keep,
        use_cache=False,
    ).logits[0, on_device.column]
