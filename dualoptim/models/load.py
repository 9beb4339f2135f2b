"""Load a model and its tokenizer, from a hub, a folder, a .gguf file or an adapter, as a run needs them."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from dualoptim.config.args import DEMO, CommonArgs, MeasureArgs, TrainArgs
from dualoptim.data.demo import tiny_model
from dualoptim.data.prompts import Formatter, make_formatter
from dualoptim.errors import InputError, blamed
from dualoptim.models.adapter import add_adapter, base_of, load_adapter
from dualoptim.models.limits import answered_at_once, is_coarse, keeps_apart, last_position, packed_row
from dualoptim.models.loaded import Answering, Layout, LoadedModel, autocast
from dualoptim.models.packing import BLOCKWISE

logger = logging.getLogger(__name__)

_LOADABLE = "give a folder written by save_pretrained, a .gguf file, or a hub id that this machine can reach"


def load_config(args: CommonArgs) -> tuple[Any, str, dict[str, str]]:
    """Read the configuration of `args.model`, and what else `from_pretrained` takes to load from there.

    Raises:
        InputError: if it cannot be found or read, or is not of a decoder-only language model.
    """
    base = base_of(args.model)
    source, options = _source(base)
    config = _pretrained(base, AutoConfig, source, **options)
    if config.is_encoder_decoder or (config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder):
        raise InputError(
            f"--model {args.model}: {config.model_type} is not a decoder-only language model; unlearning here needs one that "
            "predicts the next token, such as Llama, Phi, Qwen or GPT"
        )
    return config, source, options


def load_model(args: CommonArgs, accelerator: Accelerator, quantization: dict[str, Any] | None = None) -> LoadedModel:
    """Load model (float32 weights), tokenizer and template of `args.model`, on the accelerator's device and not yet prepared.

    The demo's model is untrained. `quantization` are options of `from_pretrained` (`quantization_options`).

    Raises:
        InputError: if the model cannot be found or read, is not a decoder-only language model, or its tokenizer cannot give
            character offsets or has no end-of-sequence token.
    """
    # in a ZeRO-3 launch transformers would divide the model while it loads, whatever zero3_init_flag says, and under bf16 round
    # its weights before the float32 masters are copied from them
    unset_hf_deepspeed_config()
    if args.model == DEMO:
        model, tokenizer = tiny_model(args.seed if isinstance(args, TrainArgs) else 0)
        return assemble(args, model, make_formatter(args, tokenizer), accelerator)
    adapter = base_of(args.model) != args.model
    _, source, options = load_config(args)
    place, more = (str(Path(args.model).expanduser()), {}) if adapter else (source, options)
    prompting = make_formatter(args, _pretrained(args.model, AutoTokenizer, place, **more))
    attention = attention_implementation(args, accelerator)
    if isinstance(args, TrainArgs) and args.load_in_4bit:
        quantization = quantization_options(accelerator, 4)
    weights = {"dtype": torch.float32, "attn_implementation": attention, **(quantization or {})}
    model = _pretrained(base_of(args.model), AutoModelForCausalLM, source, **options, **weights)
    if "gguf_file" in options:  # weights were widened to float32 on loading; what remains says that they cannot be saved
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    learner = args if isinstance(args, TrainArgs) and args.use_lora else None
    if adapter:
        model = load_adapter(model, args.model, is_trainable=learner is not None)
    elif learner:
        model = add_adapter(learner, model)
    return assemble(args, model, prompting, accelerator)


def quantization_options(accelerator: Accelerator, bits: int) -> dict[str, Any]:
    """Say how `from_pretrained` loads weights that do not train in 8 or 4 bits.

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


def assemble(args: CommonArgs, model: Any, prompting: tuple[Formatter, str], accelerator: Accelerator) -> LoadedModel:
    """Put a model together with its formatter and template.

    The model is moved to its device, and asked for how long a text may be, how it answers several questions at once, and
    whether it keeps packed texts and shared questions apart.

    Raises:
        InputError: if it cannot score or answer a text, or if `max_length` goes beyond its positions.
    """
    formatter, template = prompting
    positions = last_position(args, model)
    formatter.vocabulary = model.get_input_embeddings().weight.shape[0]
    if not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):  # those lie there and cannot be moved
        model.to(accelerator.device)
    if args.attn_implementation == "auto" and accelerator.device.type == "cpu" and model._can_set_attn_implementation():
        model.set_attn_implementation(BLOCKWISE)
    # everything that can be is found out in float32, in which nothing that matters hides behind rounding
    with autocast(accelerator) if is_coarse(model) else nullcontext():
        answers = isinstance(args, MeasureArgs) and getattr(args, "eval", True)
        together = answered_at_once(model, args.model) if answers else "any"
        if together == "any" and positions is not None:
            together = "equally long"  # each of a batch then has room for an answer of the same length
        row = packed_row(model, args) if args.packing else 0
        # other kernels take no mask for whole texts, and flash-attention would fail on the GPU for good
        masked = model.config._attn_implementation in ("sdpa", BLOCKWISE)
        shares = row > 0 and masked and keeps_apart(model, row, args.max_length, share=True)
    if args.packing and not row:
        logger.warning("%s mixes packed examples; falling back to padded batches", type(model).__name__)
    layout = Layout(accelerator.device, row > 0, shares, row)
    return LoadedModel(model, formatter, template, accelerator, layout, Answering(positions, together))


def attention_implementation(args: CommonArgs, accelerator: Accelerator) -> str:
    """Choose the kernel that `auto` stands for here.

    Raises:
        InputError: if flash-attention is asked for and cannot run.
    """
    on_cuda = accelerator.device.type == "cuda"
    can_flash = on_cuda and is_flash_attn_2_available() and accelerator.mixed_precision in ("bf16", "fp16")
    if args.attn_implementation == "flash_attention_2" and not can_flash:
        raise InputError(
            "--attn-implementation flash_attention_2 needs CUDA, the package flash-attn (pip install flash-attn) and "
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


def _pretrained(name: str, kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained`, with its many kinds of failure turned into one line."""
    with blamed("--model", name, _LOADABLE, f"{kind.__name__} cannot load it"):
        return kind.from_pretrained(source, **options)
