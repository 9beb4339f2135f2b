"""Load a model and its tokenizer, from a hub, a folder, a .gguf file or an adapter, as a run needs them."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from dualoptim.config.args import DEMO, CommonArgs, MeasureArgs, TrainArgs
from dualoptim.config.waiting import waiting
from dualoptim.data.demo import tiny_model
from dualoptim.data.prompts import Formatter, make_formatter
from dualoptim.errors import InputError, blamed
from dualoptim.models.adapter import add_adapter, base_of, has_tokenizer, hub_revision, load_adapter
from dualoptim.models.hashing import loaded_from
from dualoptim.models.launch import say
from dualoptim.models.limits import answered_at_once, check_padding, keeps_apart, last_position, packed_row
from dualoptim.models.loaded import Answering, Layout, LoadedModel, Loading, Use, autocast, is_coarse
from dualoptim.models.measured import chosen, how_measured
from dualoptim.models.packing import BLOCKWISE
from dualoptim.models.places import takes_places
from dualoptim.models.rounding import row_by_row
from dualoptim.models.sharding import divides, is_divided, load_divided, settle, whole_shape
from dualoptim.models.weights import check_loaded, no_load_report

logger = logging.getLogger(__name__)

_WITH_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_LOADABLE = "give a folder written by save_pretrained, a .gguf file, or a hub id that this machine can reach"


def load_config(args: CommonArgs) -> tuple[Any, str, dict[str, str]]:
    """Read the configuration of `args.model`, and what else `from_pretrained` takes to load from there.

    Raises:
        InputError: if it cannot be found or read, or is not of a decoder-only language model.
    """
    base = base_of(args.model)
    name = _name(args.model, base)
    source, options = _source(base, name)
    config = _pretrained(name, AutoConfig, source, **options)
    with blamed("--model", name, _LOADABLE, "its config.json cannot be used"):
        _check_numbers(name, config.get_text_config())
    if config.is_encoder_decoder or (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    ):
        raise InputError(
            f"--model {args.model}: {config.model_type} is not a decoder-only language model; unlearning here needs one that "
            "predicts the next token, such as Llama, Phi, Qwen or GPT"
        )
    return config, source, options


def _check_numbers(name: str, config: Any) -> None:
    """Refuse numbers of a configuration that make a model of nothing, or one that fails where it trains.

    Raises:
        InputError: naming the first.
    """
    for key, value in vars(config).items():
        is_size, is_share = key in ("num_hidden_layers", "hidden_size", "vocab_size"), "drop" in key
        if isinstance(value, (int, float)) and ((is_size and value < 1) or (is_share and not 0 <= value <= 1)):
            raise InputError(f"--model {name}: {key} is {value} in its config.json; give the folder that save_pretrained wrote")


def _check_stops(name: str, settings: Any) -> None:
    """Make sure that what a model's answers stop at and never say are token ids.

    Raises:
        InputError: naming the first setting that is not.
    """
    for key in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        value = getattr(settings, key, None)
        if not all(type(token) is int for token in (value if isinstance(value, list) else [] if value is None else [value])):
            raise InputError(f"--model {name}: {key} is {value!r} in its generation_config.json; give token ids, or remove it")


def load_model(
    args: CommonArgs, accelerator: Accelerator, use: Use = "train", quantization: dict[str, Any] | None = None
) -> LoadedModel:
    """Load model, tokenizer and template of `args.model` for a use, on the accelerator's device and not yet prepared.

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
    base = base_of(args.model)
    say(accelerator, f"loading {args.model}")
    with waiting("reading the tokenizer", accelerator.is_main_process):  # of a .gguf file it takes ten seconds
        config, source, options = load_config(args)
        prompting = read_prompting(args, base, (source, options))
    if isinstance(args, TrainArgs) and args.load_in_4bit:
        quantization = quantization_options(accelerator, 4)
    # a .gguf file has types of its own, which nothing but it can store
    known = {torch.bfloat16: "bfloat16", torch.float16: "float16"} if "gguf_file" not in options else {}
    stored: Any = known.get(config.dtype, "float32") if isinstance(config.dtype, torch.dtype) else "float32"
    name, learner = _name(args.model, base), args if isinstance(args, TrainArgs) and args.use_lora else None
    how = Loading.of(args, accelerator, use, stored)
    if quantization:
        how = replace(how, divided=False)
    weights = {"dtype": how.dtype, "attn_implementation": attention_implementation(args, accelerator, config)}
    load = partial(_pretrained, name, AutoModelForCausalLM, source, **options, **weights, **_WITH_REPORT)
    with no_load_report():
        place = {"device_map": {"": "meta" if how.divided else accelerator.device}}
        model, info = load(**place, **(quantization or {}))
        check_loaded(f"--model {name}", model, info)
        if how.divided:
            how = chosen(how, args, accelerator, model) if use == "measure" else how
            model, _ = load_divided(accelerator, model, load) if how.divided else load(device_map={"": accelerator.device})
        if use == "measure" and divides(accelerator):
            say(accelerator, how_measured(how, args, accelerator, model))
    _check_stops(name, model.generation_config)
    if "gguf_file" in options:  # weights were widened on loading; what remains says that they cannot be saved
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if base == args.model and not quantization:
        loaded_from(model, source)
    if base != args.model:
        model = load_adapter(model, args.model, learner)
    elif learner:
        model = add_adapter(learner, model)
    if how.divided:
        settle(accelerator, model)
    with waiting("trying what the model takes", accelerator.is_main_process):
        return replace(assemble(args, model, prompting, accelerator), stored=stored)


def read_prompting(args: CommonArgs, base: str, place: tuple[str, dict[str, str]]) -> tuple[Formatter, str]:
    """Load the tokenizer and template of `args.model`, which may be an adapter that has none; then they are its `base`'s.

    `place` is what `from_pretrained` takes to load the base.
    """
    asked, (source, options) = args, place
    if base != args.model and has_tokenizer(args.model):
        source, options = str(Path(args.model).expanduser()), {}
    elif base != args.model:  # an adapter alone reads and writes as its base does
        asked = replace(args, model=base)
    tokenizer = _pretrained(args.model, AutoTokenizer, source, **options)
    with blamed("--model", args.model, _LOADABLE, "its tokenizer cannot be used"):
        tokenizer("a")
    return make_formatter(asked, tokenizer)


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
    return {"quantization_config": settings}


def assemble(args: CommonArgs, model: Any, prompting: tuple[Formatter, str], accelerator: Accelerator) -> LoadedModel:
    """Put a model together with its formatter and template.

    The model is moved to its device, and asked for how long a text may be, how it answers several questions at once, and
    whether it keeps packed texts and shared questions apart.

    Raises:
        InputError: if it cannot score or answer a text, or if `max_length` goes beyond its positions.
    """
    formatter, template = prompting
    positions = last_position(args, model)
    if isinstance(args, TrainArgs) and args.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable()
            model.gradient_checkpointing_disable()
        except ValueError:
            raise InputError(f"--gradient-checkpointing: {type(model).__name__} has none; drop it") from None
    formatter.vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
    divided = is_divided(model)
    if not (divided or any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))):  # those lie there already
        model.to(accelerator.device)
    can_set = model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()
    if args.attn_implementation == "auto" and accelerator.device.type == "cpu" and can_set:
        model.set_attn_implementation(BLOCKWISE)
    # what has float32 weights is asked in float32, in which nothing that matters hides behind rounding
    with row_by_row(model), autocast(accelerator) if is_coarse(model) and model.dtype == torch.float32 else nullcontext():
        answers = isinstance(args, MeasureArgs) and getattr(args, "eval", True)
        together = answered_at_once(model, args.model) if answers else "any"
        if together in ("refilled", "any") and positions is not None:
            together = "equally long"  # each of a batch then has room for an answer of the same length
        row = packed_row(model, args) if args.packing else 0
        # other kernels take no mask for whole texts, and flash-attention would fail on the GPU for good
        masked = model.config._attn_implementation in ("sdpa", BLOCKWISE)
        shares = row > 0 and masked and keeps_apart(model, row, args.max_length, share=True)
        told = row > 0 and takes_places(model)
        if not row:
            check_padding(model, args.model)
    if args.packing and not row:
        logger.warning("%s mixes packed examples; falling back to padded batches", type(model).__name__)
    layout = Layout(accelerator.device, row > 0, shares, row, told)
    return LoadedModel(model, formatter, template, accelerator, layout, Answering(positions, together), divided=divided)


def attention_implementation(args: CommonArgs, accelerator: Accelerator, config: Any) -> str:
    """Choose the kernel that `auto` stands for here, of those that the model of `config` has.

    Raises:
        InputError: if one is asked for that cannot run, or that the model has not.
    """
    # its kernels are for compute capability 8.0 and more, and for heads of at most 256
    on_cuda = accelerator.device.type == "cuda" and torch.cuda.get_device_capability(accelerator.device) >= (8, 0)
    can_flash = on_cuda and is_flash_attn_2_available() and accelerator.mixed_precision == "bf16" and _head_size(config) <= 256
    if args.attn_implementation == "flash_attention_2" and not can_flash:
        raise InputError(
            "--attn-implementation flash_attention_2 needs CUDA on an Ampere GPU or a newer one, the package flash-attn (pip "
            "install flash-attn), --mixed_precision bf16 in the launch, and heads of at most 256; choose sdpa"
        )
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)  # which sdpa leaves out; older Gemma 2 has it
    sdpa = getattr(kind, "_supports_sdpa", True) and not capped
    has = {"flash_attention_2": getattr(kind, "_supports_flash_attn", True), "sdpa": sdpa}
    if not has.get(args.attn_implementation, True):
        best = "sdpa" if has["sdpa"] else "eager"
        raise InputError(f"--attn-implementation {args.attn_implementation}: {kind.__name__} has no such kernel; choose {best}")
    if args.attn_implementation != "auto":
        return args.attn_implementation
    if can_flash and has["flash_attention_2"]:
        return "flash_attention_2"
    return "sdpa" if has["sdpa"] else "eager"


def _head_size(config: Any) -> int:
    """Read how many numbers an attention head of a model has; 0 where its configuration does not say."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return getattr(text, "head_dim", None) or (text.hidden_size // heads if isinstance(heads, int) and heads else 0)


def _name(model: str, base: str) -> str:
    """Say what a user knows the loaded weights by: `--model`, or the base of an adapter there."""
    return model if base == model else f"{model}: its base {base}"


def _source(model: str, name: str) -> tuple[str, dict[str, str]]:
    """Find what `from_pretrained` takes for a hub id, a folder, or a .gguf file, which a user knows as `name`.

    Raises:
        InputError: if `model` is a path at which there is nothing.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"--model {name}: no such file; give the path of a .gguf file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: the folder has no config.json; give the folder that save_pretrained wrote")
        return str(path), {}
    hub, revision = hub_revision(model)
    if hub.startswith(("/", ".", "~")) or hub.count("/") > 1:
        raise InputError(f"--model {name}: no such folder; give a folder, a .gguf file or a hub id")
    if revision == "":
        raise InputError(f"--model {name}: no revision after the @; give a branch, a tag or a commit, or leave out the @")
    return hub, {"revision": revision} if revision else {}


def _pretrained(name: str, kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained`, with its many kinds of failure turned into one line; no code that lies there is run."""
    with blamed("--model", name, _LOADABLE, f"{kind.__name__} cannot load it"):
        return kind.from_pretrained(source, trust_remote_code=False, **options)
