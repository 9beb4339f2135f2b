"""Find out, before a run, what a model can be asked: how long texts may be, which share a row, which are answered at once.

Nothing in a configuration says so reliably, so the model is tried.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from dualoptim.config.args import CommonArgs, MeasureArgs, TrainArgs
from dualoptim.data.batches import pack, pad
from dualoptim.data.declaration import longest_answer
from dualoptim.data.prompts import Example
from dualoptim.errors import InputError, reason
from dualoptim.method.scores import score
from dualoptim.models.continuing import Texts, continue_greedily
from dualoptim.models.loaded import Together, is_coarse
from dualoptim.models.sharding import is_divided, layer_lists

_LONGEST_ROW = 2304  # tokens on a CPU, where the time to find out counts; 16 texts of TOFU have fewer
_LONGEST_TEXT = 2**14  # tokens; a model that takes as many is taken to have no end
_FINE, _COARSE, _SAME = 1e-5, 5e-2, 1e-3  # what rounding may change: in float32, in 16 bits, and there in equal shapes
_TEXT, _LONGER = [7, 4, 8, 3, 9], [5, 3, 8, 6, 4, 9, 7, 2, 8, 5, 3]  # token ids


def last_position(args: CommonArgs, model: Any) -> int | None:
    """Find how many positions a model has, if texts and answers of this run could go beyond them.

    Where positions are learned or stand in a table a longer text fails; on CUDA it would take the process with it, so that it
    is a few layers on the CPU that are asked.

    Raises:
        InputError: if the model cannot score a text at all, or if `max_length` goes beyond its positions.
    """
    wanted = args.max_length + (longest_answer(args) if isinstance(args, MeasureArgs) else 0)
    if getattr(model, "hf_quantizer", None) is not None:  # weights in few bits, which lie where they are used
        return None
    if is_divided(model) and model.device.type != "cpu":
        model = _blank(model)
    with _one_layer_of_each_kind(model):
        model = on_cpu(model)
        if error := _failure(model, 4):
            raise InputError(
                f"--model {args.model}: {type(model).__name__} fails on a plain text ({reason(error)}); choose another model"
            )
        tried = min(wanted, _LONGEST_TEXT)
        fits, fails = 4, tried + 1
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        if known >= wanted or not _failure(model, tried):
            fits = fails = wanted
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (fits, middle) if _failure(model, middle) else (middle, fails)
    if fits < args.max_length:
        raise InputError(f"--max-length {args.max_length}: the model has {fits} positions; give --max-length {fits}")
    return fits if fits < wanted else None


def _raise_if_of_the_device(error: Exception) -> None:
    """Raise again what says nothing of the model: a GPU that is full, or that has failed and does nothing any more."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
        raise error


def on_cpu(model: Any) -> Any:
    """Copy a model to the CPU, with a kernel that this has; one that lies there is given as it is. No values become zeros."""
    if model.device.type == "cpu":
        return model

    def moved(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()

    there: dict[int, Any] = {id(one): torch.nn.Parameter(moved(one), one.requires_grad) for one in model.parameters()}
    copied = copy.deepcopy(model, there | {id(one): moved(one) for one in model.buffers()})
    if copied.config._attn_implementation == "flash_attention_2":
        copied.set_attn_implementation("sdpa")
    return copied


def _blank(model: Any) -> Any:
    """Make a model of the same kind without values, on the meta device."""
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)](model.config)


@torch.no_grad()
def _failure(model: Any, length: int) -> Exception | None:
    """What goes wrong with a text of so many tokens."""
    try:
        score(model, pad([Example([1] * length, length - 1)]))
    except Exception as error:  # models that are not ours raise anything
        _raise_if_of_the_device(error)
        return error
    return None


@torch.no_grad()
def check_padding(model: Any, name: str) -> None:
    """Make sure that a model scores a text that is padded on the right, beside a longer one, as it scores it alone.

    Raises:
        InputError: if not. `name` is the model's.
    """
    text, longer = Example(_TEXT, 1), Example(_LONGER, 1)
    was_training = model.training
    model.eval()
    try:
        both, alone = (score(model, pad(texts).to(model.device)).logits.float() for texts in ([text, longer], [text]))
    finally:
        model.train(was_training)
    if _off(both[: len(alone)], alone) > (_COARSE if is_coarse(model) else _FINE):
        raise InputError(
            f"--model {name}: {type(model).__name__} scores a text differently beside a longer one, packed or padded; choose "
            "another model"
        )


@torch.no_grad()
def answered_at_once(model: Any, name: str) -> Together:
    """Find out which texts a model goes on from in one batch as it does from each alone.

    Not all take padding on the left for absent, and some mix up the rows of a batch.

    Raises:
        InputError: if it cannot go on from a text at all. `name` is the model's.
    """
    settings = GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    text, longer, absent = torch.tensor([_TEXT]), torch.tensor([_LONGER]), len(_LONGER) - len(_TEXT)
    tolerance = _COARSE if is_coarse(model) else _FINE

    def same(ids: Tensor, mask: Tensor) -> bool:
        try:
            batch = continue_greedily(model, settings, ids, mask).logits
        except Exception as error:  # models that are not ours raise anything
            _raise_if_of_the_device(error)
            return False
        return all(_off(both[:1], one) <= tolerance for both, one in zip(batch, alone, strict=True))

    was_training = model.training
    model.eval()
    try:
        alone = continue_greedily(model, settings, text).logits
        pad, ones = torch.nn.functional.pad, torch.ones_like(longer)
        if same(torch.cat([pad(text, (absent, 0)), longer]), torch.cat([pad(torch.ones_like(text), (absent, 0)), ones])):
            return "refilled" if _takes_others(model, settings, tolerance) else "any"
        return "equally long" if same(torch.cat([text, text + 1]), torch.ones(2, len(_TEXT), dtype=torch.long)) else "none"
    except Exception as error:
        _raise_if_of_the_device(error)
        raise InputError(
            f"--model {name}: {type(model).__name__} cannot generate answers ({reason(error)}); choose another model, or train "
            "with --no-eval"
        ) from None
    finally:
        model.train(was_training)


def _takes_others(model: Any, settings: GenerationConfig, tolerance: float) -> bool:
    """Find out whether a model goes on from a text alike after its neighbour has left, and another has come.

    One layer of each kind is enough.
    """
    try:
        with _one_layer_of_each_kind(model):
            begun = [Texts.of(dict(enumerate(known)), 0) for known in ([_LONGER, _TEXT], [_LONGER], [_TEXT])]
            texts, other, alone = (one.with_cache(model) for one in begun)
            for one in begun:
                one.go_on(model, settings)
            texts.keep([1])
            texts.add(other)
            both, expected = (one.go_on(model, settings) for one in (texts, alone))
    except Exception as error:  # models that are not ours keep anything
        _raise_if_of_the_device(error)
        return False
    return all(_off(here[:1], there) <= tolerance for here, there in zip(both, expected, strict=True))


def packed_row(model: Any, args: CommonArgs) -> int:
    """Find how many tokens a row of packed texts may have: as many as the run packs at most, fewer, or 0 if texts are mixed.

    A mask or a table may end at the model's positions, so that as many are tried as well.
    """
    cap = _LONGEST_ROW if model.device.type == "cpu" else 4 * _LONGEST_ROW
    wanted = min(texts_per_batch(args) * args.max_length, cap)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or wanted
    for row in sorted({wanted, min(wanted, positions)}, reverse=True):
        if keeps_apart(model, row, args.max_length):
            return row
    return 0


def texts_per_batch(args: CommonArgs) -> int:
    """Count the texts that a batch of the run has at most: objectives read one or two of a row."""
    training = 2 * args.batch_size if isinstance(args, TrainArgs) else 1
    return max(2, training, args.eval_batch_size if isinstance(args, MeasureArgs) else 1)


@torch.no_grad()
def keeps_apart(model: Any, row: int, longest: int, share: bool = False) -> bool:
    """Find out whether a model scores texts that are packed into a row of so many tokens as it scores each alone.

    Nothing in a configuration says so reliably, and a model that mixes them trains on wrong numbers without a word. Some mix
    their first tokens, some the last ones of long texts (windows, chunks, selected keys), some round positions far into a row:
    so the row is full, of texts as long as there are and of short ones. With `share` each has a twin with which it shares all
    but its last tokens. One layer of each kind is enough.
    """
    texts = _probe_texts(row, longest, model.config.get_text_config().vocab_size, share)
    coarse = is_coarse(model)
    was_training = model.training
    model.eval()
    try:
        with _one_layer_of_each_kind(model):
            packed = _last_logits(model, texts, share)
            for n in range(share, len(texts), 1 + share):  # a first twin lies there as it would without the other
                if _off(packed[n], _last_logits(model, [texts[n]])[0]) > (_COARSE if coarse else _FINE):
                    return False
            if share or not coarse:
                return True
            # what rounds differently in each shape has the same bits in the same shape, whatever the neighbours are
            changed = [text if n % 2 else Example(text.ids[::-1], text.start) for n, text in enumerate(texts)]
            other = _last_logits(model, changed)
            return all(_off(packed[n], other[n]) <= _SAME for n in range(1, len(texts), 2))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # no position_ids, or buffers that end too early
        _raise_if_of_the_device(error)
        return False
    finally:
        model.train(was_training)


def _probe_texts(row: int, longest: int, vocabulary: int, twins: bool) -> list[Example]:
    """Make texts of random tokens, as long as there are and short ones in turn, that fill a row."""
    longest, lengths = min(longest, max(row - 32, 2)), list[int]()
    while row - sum(lengths) >= 12:
        lengths.append(min(row - sum(lengths), longest, (longest, 9, 7)[len(lengths) % 3]))
    drawn = np.random.default_rng(0).integers(1, min(vocabulary, 1000), (len(lengths), 2, longest)).tolist()
    texts = []
    for length, (ids, others) in zip(lengths, drawn, strict=True):
        start = max(length - 4, 1)
        texts.append(Example(ids[:length], start if twins or length > 9 else 1))
        if twins:
            texts.append(Example(ids[:start] + others[start:length], start))
    return texts


def _last_logits(model: Any, texts: Sequence[Example], share: bool = False) -> list[Tensor]:
    """Compute the logits [n, V] that predict each text's scored tokens."""
    scores = score(model, pack(texts, share).to(model.device))
    return list(scores.logits.float().split([int(length) for length in scores.lengths()]))


def _off(logits: Tensor, expected: Tensor) -> float:
    """Measure the largest relative difference of a token's logits [n, V].

    Tokens whose expected logits are not finite say nothing: that the numbers of a broken model are none is told when it is
    measured.
    """
    off = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(torch.inf)
    return float(off.where(expected.isfinite().all(-1), 0).max())


@contextlib.contextmanager
def _one_layer_of_each_kind(model: Any) -> Iterator[None]:
    """Cut a model for a while to the first of its layers, as many as it takes to have one of each kind among them.

    Layers are of one kind if their modules and settings are, and what the configuration says of each.
    """
    depth, lists = getattr(model.config.get_text_config(), "num_hidden_layers", None), layer_lists(model)
    whole = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layers) for name, layers in lists.items()]
    each = [value for value in vars(model.config.get_text_config()).values() if isinstance(value, list) and len(value) == depth]
    try:
        for module, name, layers in whole:
            kinds = [(_kind(layer), [str(value[n]) for value in each]) for n, layer in enumerate(layers)]
            first = max(kinds.index(kind) for kind in kinds) + 1
            setattr(module, name, layers[: max(first, 2)])
        yield
    finally:
        for module, name, layers in whole:
            setattr(module, name, layers)


def _kind(layer: torch.nn.Module) -> list[Any]:
    """List what the modules of a layer are and how they are set, but for their numbers."""
    settings = (bool, int, float, str, type(None))
    return [
        (name, type(module), {k: v for k, v in vars(module).items() if isinstance(v, settings) and "idx" not in k})
        for name, module in layer.named_modules()
    ]
