"""Measure the shape of a model that is built without data, and say what the arguments of a run ask for."""

import itertools
from typing import Any

import torch
from torch.nn import Embedding, Linear, ModuleList
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from dualoptim.config.args import DEMO, UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.data.declaration import longest_answer
from dualoptim.data.demo import tiny_model
from dualoptim.errors import blamed
from dualoptim.method.groups import decay_groups
from dualoptim.method.objectives import Objective, split_objectives
from dualoptim.models.adapter import add_adapter
from dualoptim.models.load import load_config
from dualoptim.models.memory import Demand, Lengths, Shape
from dualoptim.models.trainable import freeze_others


def empty_model(args: UnlearnArgs) -> Any:
    """Build the model that a run with `args` trains, on the meta device: no weights are read.

    Raises:
        InputError: if its configuration cannot be read, or is not of a decoder-only model.
    """
    if args.model == DEMO:
        with torch.device("meta"):
            model = tiny_model(args.seed)[0]
    else:
        config, _, _ = load_config(args)
        remedy = "give one that AutoModelForCausalLM can build"
        # the class itself: from_config divides real weights in a ZeRO-3 launch
        with blamed("--model", args.model, remedy, "its configuration builds no language model"), torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    freeze_others(args, model)
    return add_adapter(args, model) if args.use_lora else model


def shape_of(model: Any, quantize_embeddings: bool = False) -> Shape:
    """Measure the shape of a model, whose parameters may have no data (meta device)."""
    groups = decay_groups(model, 0.0, 8, quantize_embeddings)
    quantizable = sum(p.numel() for group in groups if group["bits"] == 8 for p in group["params"])
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    total, head = _size(model), model.get_output_embeddings()
    looked_up = {one.weight for one in model.modules() if isinstance(one, Embedding) and one.weight.requires_grad}
    frozen = [one.weight for one in model.modules() if isinstance(one, Linear) and one is not head]
    layers = max((one for one in model.modules() if isinstance(one, ModuleList)), key=_size, default=ModuleList([model]))
    trains = [any(parameter.requires_grad for parameter in one.parameters()) for one in layers]
    reached = len(trains) if looked_up else sum(itertools.accumulate(trains, max))
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return Shape(
        quantizable=quantizable,
        other=sum(sizes) - quantizable,
        frozen=total - sum(sizes),
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=max(intermediate) if isinstance(intermediate, (list, tuple)) else intermediate,
        vocabulary=config.vocab_size,
        largest=max(sizes),
        read=max(parameter.numel() for parameter in model.parameters()),
        layer=_size(layers) // len(layers),
        reached=reached,
        looked_up=sum(weight.numel() for weight in looked_up - {getattr(head, "weight", None)}),
        packable=sum(weight.numel() for weight in frozen if not weight.requires_grad),
        cached=2
        * (getattr(config, "head_dim", None) or hidden // heads)
        * (getattr(config, "num_key_value_heads", None) or heads),
    )


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def at_worst(args: UnlearnArgs, why: str) -> Lengths:
    """Take every text to have `--max-length` tokens, all of them scored, where the data's own lengths are not known."""
    texts = args.batch_size * max(len(objective.reads) for objective in _objectives(args))
    return Lengths(texts * args.max_length, texts * args.max_length, args.max_length + longest_answer(args), why)


def _objectives(args: UnlearnArgs) -> list[Objective]:
    return [objective for pair in args.forget_losses for objective in split_objectives(pair) if objective]


def demand_of(args: UnlearnArgs, lengths: Lengths) -> Demand:
    """Read what a run with `args` asks for, whose texts have these lengths."""
    moments = kind_of(args).moments(args)
    return Demand(
        moments=moments._replace(wide=moments.wide + (args.average_cycles > 0)),  # a mean of the weights takes as much as one
        tokens=lengths.micro_batch,
        scored=lengths.scored,
        rows=(args.eval_batch_size, lengths.text),
        checkpointing=args.gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1 or not kind_of(args).alternates,
        frozen_head=any(objective.reference == "logits" for objective in _objectives(args)),
        tries=args.optim == "dual-adamw" and args.decouple == "both",
        moves=args.sam_rho > 0,
        projects=args.project_forget != "none",
        by_hand=args.optim == "dual-adamw-plus" or args.decouple in ("m", "v"),
        in_4bit=args.load_in_4bit,
        partly=args.trainable is not None,
        stored=2 if args.model != DEMO and load_config(args)[0].dtype == torch.bfloat16 else 4,
        evaluates=args.eval,
        sharded=args.evaluate_sharded,
        midway=args.measures_on_the_way,
    )
