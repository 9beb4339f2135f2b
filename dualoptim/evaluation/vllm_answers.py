"""Have the package vllm answer questions, on one GPU: the same token ids, greedily, to the same end tokens."""

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from dualoptim.config.args import MeasureArgs
from dualoptim.data.declaration import longest_answer
from dualoptim.errors import InputError
from dualoptim.models.loaded import LoadedModel

_SHARE = 0.9
"""Of the memory that is free beside the model that is scored."""

Answers = Iterator[tuple[int, list[int]]]
"""The numbers of texts as they end, each with the tokens that were added; what comes after an end is not cut off yet."""


@dataclass(frozen=True)
class Unfinished:
    """A text to go on from."""

    ids: list[int]
    room: int  # tokens that may be added
    missing: int  # tokens that are likely to be: those of the true answer


def check_generation(args: MeasureArgs, accelerator: Accelerator) -> None:
    """Make sure that the launch can do what `--generate-with` asks for.

    Raises:
        InputError: if not.
    """
    how = getattr(args, "generate_with", "transformers")
    if how != "transformers" and accelerator.device.type != "cuda":
        raise InputError(f"--generate-with {how} needs CUDA, and this run has none; drop the flag, or start it on a GPU")
    if how == "vllm" and accelerator.num_processes > 1:
        raise InputError(
            f"--generate-with vllm is for one process, and this launch has {accelerator.num_processes}; drop the flag, or add "
            "--num_processes 1 to accelerate launch"
        )


_engines: dict[str, Any] = {}  # by the hash of their weights; at most one


def by_vllm(loaded: LoadedModel, args: MeasureArgs, unfinished: Mapping[int, Unfinished], ends: Sequence[int]) -> Answers:
    """Go on from texts by their numbers."""
    from vllm import SamplingParams  # a minute, and only for this

    asked = [{"prompt_token_ids": one.ids} for one in unfinished.values()]
    settings = [
        SamplingParams(temperature=0.0, max_tokens=one.room, stop_token_ids=list(ends), detokenize=False)
        for one in unfinished.values()
    ]
    if asked:
        outputs = _engine(loaded, args).generate(asked, settings, use_tqdm=False)
        yield from ((n, list(output.outputs[0].token_ids)) for n, output in zip(unfinished, outputs, strict=True))


def _engine(loaded: LoadedModel, args: MeasureArgs) -> Any:
    """Start vLLM on the weights as they stand, which it reads from a folder; once for each."""
    from vllm import LLM

    weights = loaded.weights_hash()
    if weights not in _engines:
        _engines.clear()  # another model's, which ends with it
        gc.collect()
        longest = args.max_length + longest_answer(args)
        free, total = torch.cuda.mem_get_info(loaded.device)
        with tempfile.TemporaryDirectory() as folder:
            loaded.model.save_pretrained(folder)
            _engines[weights] = LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype=loaded.precision,
                max_model_len=min(longest, loaded.answering.positions or longest),
                gpu_memory_utilization=_SHARE * free / total,
            )
    return _engines[weights]
