"""Hold a model together with everything that is needed to feed it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType

from dualoptim.config.args import DEMO, CommonArgs, SaveDtype, TrainArgs
from dualoptim.config.saved import to_dict
from dualoptim.config.waiting import waiting
from dualoptim.data.batches import own_texts, pack, pad
from dualoptim.data.prompts import Example, Formatter
from dualoptim.data.stream import Stream
from dualoptim.method.scores import Batch, Reference, score
from dualoptim.models.adapter import base_of
from dualoptim.models.hashing import weights_changed, weights_hash
from dualoptim.models.places import places_of
from dualoptim.models.sharding import can_divide, computes_in_half
from dualoptim.models.together import in_step, shared


@dataclass(frozen=True)
class Layout:
    """How texts are laid out as a batch for a model, and on which device."""

    device: torch.device
    packed: bool  # end to end in one row, or one row each
    shares: bool = False  # packed texts may have the tokens in common that they begin with
    row: int | None = None  # tokens that a packed row has at most; texts that have more together get one row each
    told: bool = False  # the kernel is told where texts lie in a packed row

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Lay out the batch, on the device."""
        if self.packed:
            batch = pack(examples, self.shares)
            if self.row is None or batch.input_ids.shape[1] <= self.row:
                batch = replace(batch, places=places_of(examples) if self.told else {}).to(self.device)
                if self.shares and batch.attention_mask is None and len(examples) > 1:  # transformers would ask the device
                    return replace(batch, attention_mask=own_texts(batch.position_ids))
                return batch
        return pad(examples).to(self.device)


Together = Literal["refilled", "any", "equally long", "none"]
"""Questions that a model answers in one batch as it answers each alone; `refilled`: any, and others take the places of those
that are answered."""


@dataclass(frozen=True)
class Answering:
    """What a model's answers are bound by."""

    positions: int | None = None  # tokens of question and answer together; None: as many as are asked for
    together: Together = "refilled"


Use = Literal["train", "measure"]
"""What a model is loaded for."""


@dataclass(frozen=True)
class Loading:
    """How the weights of a model lie once it is loaded; those of an adapter that trains are float32 beside it."""

    dtype: torch.dtype
    divided: bool = False

    @staticmethod
    def of(args: CommonArgs, accelerator: Accelerator, use: Use, stored: SaveDtype) -> "Loading":
        """Say how a launch needs weights, which were `stored` in some type, for a use.

        In 16 bits what is measured or frozen has 2 bytes a weight, and what trains the values of its float32 masters:
        DeepSpeed makes these itself, of 16-bit weights if the checkpoint has no others. They are divided among processes where
        the launch does that at all, but for files of other kinds and adapters, which are merged into whole weights; what is
        measured only by choice (`measured.chosen`).
        """
        learns = isinstance(args, TrainArgs) and args.use_lora
        mergeless = not args.model.endswith(".gguf") and (learns or base_of(args.model) == args.model)
        divided = args.model != DEMO and can_divide(accelerator) and mergeless
        if precision_of(accelerator) == torch.float32:
            return Loading(torch.float32, divided)
        widened = accelerator.distributed_type == DistributedType.DEEPSPEED and stored == "bfloat16"
        frozen = use == "measure" or learns
        return Loading(torch.bfloat16 if frozen or widened else torch.float32, divided)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its tokenizer and template, and the launch that it runs in.

    `model` is never wrapped by Accelerate: while it trains, what wraps it is `models.launch.prepared(loaded)`.
    """

    model: Any
    formatter: Formatter
    template: str
    accelerator: Accelerator
    layout: Layout
    answering: Answering = Answering()
    stored: SaveDtype = "float32"  # the type that the weights had where they were loaded from
    divided: bool = False  # its weights lie among the processes, which have to call it equally often

    @property
    def tokenizer(self) -> Any:
        """Give the formatter's tokenizer."""
        return self.formatter.tokenizer

    @property
    def device(self) -> torch.device:
        """Name the device of the model and its batches."""
        return self.accelerator.device

    @property
    def share(self) -> tuple[int, int]:
        """Give the number of this process, and how many there are."""
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def precision(self) -> str:
        """Name the type of the weights that are measured here; those that are divided compute in the launch's."""
        return str(precision_of(self.accelerator) if self.divided else self.model.dtype).removeprefix("torch.")

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Lay out examples as the model takes them, on its device."""
        return self.layout(examples)

    def resolved(self, args: CommonArgs) -> dict[str, Any]:
        """Give every argument as this run resolved it, readable by `--config`, and how many processes it has."""
        settings = to_dict(args) | {
            "data": args.data if args.forget_file or args.benchmark else args.data_source,
            "template": self.template,
            "output_dir": str(args.output_dir),
            "processes": self.accelerator.num_processes,
        }
        formatter, tags = self.formatter, self.formatter.tags
        if tags is None:
            return settings | {"date_string": formatter.date_string, "system_prompt": formatter.system_prompt}
        return settings | {f"{name}_tag": text for name, text in asdict(tags).items()}

    def saved_type(self, args: TrainArgs) -> SaveDtype:
        """Name the type in which training with `args` saves weights: that of `--save-dtype`, or the checkpoint's."""
        if args.save_dtype != "auto":
            return args.save_dtype
        return "float32" if args.use_lora else self.stored

    def weights_hash(self) -> str:
        """Hash the weights as they stand, the same on all processes; the main one computes it, or all if they are divided.

        In 16 bits it is that of the rounded weights, which is the same whatever they are loaded for.
        """
        asked = self.divided or self.accelerator.is_main_process
        with waiting("hashing weights", self.accelerator.is_main_process):
            return shared(self.accelerator, weights_hash(self.model, precision_of(self.accelerator)) if asked else "")

    def in_step(self) -> AbstractContextManager[None]:
        """Have processes among which the model is divided call it equally often, however many texts each of them has."""
        if not self.divided:
            return nullcontext()
        short = self.batch([Example([0, 0], 1)])
        return in_step(self.accelerator, self.model, torch.no_grad()(lambda: score(self.model, short)))

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the launch's 16 bits, while the model is not prepared; 16-bit or divided weights do that by themselves."""
        wide = self.model.dtype == torch.float32 and not self.divided
        return autocast(self.accelerator) if wide else nullcontext()


@dataclass(frozen=True)
class MicroBatches:
    """Give a stream's micro-batches as a model takes them, with what reads the frozen model's word about them."""

    stream: Stream
    layout: Layout
    reference: Callable[[Sequence[Example], torch.device], Reference] | None = None

    def __call__(self, step: int) -> Iterator[Batch]:
        """Give this process's micro-batches of the phase's step `step`."""
        for examples in self.stream.window(step):
            read = partial(self.reference, examples, self.layout.device) if self.reference else None
            yield replace(self.layout(examples), reference=read)


def precision_of(accelerator: Accelerator) -> torch.dtype:
    """Name the type that the launch computes in, and that models have in it which do not train."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def is_coarse(model: Any) -> bool:
    """Tell whether a model's kernel or its weights have 16 bits or fewer, whatever it is asked to compute in."""
    in_bits = getattr(model, "hf_quantizer", None) is not None or model.dtype != torch.float32 or computes_in_half(model)
    return in_bits or model.config._attn_implementation == "flash_attention_2"


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Compute with the launch's 16-bit products on float32 weights, for a model that is not prepared.

    Accelerate's own does nothing under DeepSpeed, whose engine has 16-bit weights; a whole model beside it still needs this,
    and flash-attention does not run without.
    """
    half = accelerator.mixed_precision == "bf16"
    return torch.autocast(accelerator.device.type, torch.bfloat16) if half else nullcontext()


@contextmanager
def as_measured(loaded: LoadedModel) -> Iterator[None]:
    """Give a model that trains for a while the weights, and the forward pass, of one that is loaded to be measured.

    That is, 16 bits where the launch has them and its weights are float32; these are kept beside. A divided one computes so.
    """
    model = loaded.model
    weights_changed(model)  # where PyTorch may not have counted it
    if loaded.divided or precision_of(loaded.accelerator) == model.dtype:
        yield
        return
    prepared = vars(model).pop("forward", None)  # Accelerate's, which computes with 16-bit products
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter, weights in kept:
        parameter.data = weights.to(precision_of(loaded.accelerator))
    try:
        yield
    finally:
        weights_changed(model)
        for parameter, weights in kept:
            parameter.data = weights
        if prepared:
            model.forward = prepared
