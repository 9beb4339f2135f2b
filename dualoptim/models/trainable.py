"""Find the weights that `--trainable` names, and let them train alone."""

import re
from typing import Any

from dualoptim.config.args import TrainArgs
from dualoptim.errors import InputError
from dualoptim.models.sharding import layer_lists


def chosen_weights(args: TrainArgs, model: Any) -> list[str]:
    """List the names of the weights that train, in the model's order: all of them without `--trainable`.

    A tensor that goes by several names, as a tied output head does, trains where one of them is meant, and has them all.

    Raises:
        InputError: if none is meant.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    if args.trainable is None:
        return [name for name, _ in named]
    meant = _last_layers(args.trainable, model) if args.trainable.startswith("last:") else re.compile(args.trainable)
    tensors = {id(parameter) for name, parameter in named if meant.search(name)}
    if not tensors:
        kinds = {re.sub(r"\d+", "", name): name for name, _ in reversed(named)}  # one of those that differ by a number
        raise InputError(
            f"--trainable {args.trainable}: no weight of {args.model} has such a name; they are called "
            f"{', '.join([*kinds.values()][:-9:-1])} and so on"
        )
    return [name for name, parameter in named if id(parameter) in tensors]


def _last_layers(asked: str, model: Any) -> re.Pattern[str]:
    """Write `last:K` as a pattern."""
    lists, count = layer_lists(model), int(asked.removeprefix("last:"))
    depth = max(map(len, lists.values()), default=0)
    if count > depth:
        remedy = f"give last:1 to last:{depth}" if depth else "give a pattern of names"
        raise InputError(f"--trainable {asked}: the model has {depth or 'no'} layers that can be told apart; {remedy}")
    places = [re.escape(f"{name}.{number}.") for name in lists for number in range(depth - count, depth)]
    return re.compile(f"^({'|'.join(places)})")


def freeze_others(args: TrainArgs, model: Any) -> None:
    """Let the weights that `--trainable` names train alone, until the model is released."""
    if args.trainable is not None:
        names = set(chosen_weights(args, model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)


def check_reach(args: TrainArgs, model: Any, layer: int) -> None:
    """Make sure that a weight trains which what `layer` puts out depends on.

    Raises:
        InputError: if all of them lie in later layers.
    """
    above = tuple(f"{name}.{number}." for name, own in layer_lists(model).items() for number in range(layer + 1, len(own)))
    names = chosen_weights(args, model)
    if all(name.startswith(above) for name in names):
        raise InputError(
            f"--trainable {args.trainable}: {names[0]} and all others lie behind layer {layer}, which the objective reads; "
            "give weights of that layer or an earlier one, or another --layer"
        )
