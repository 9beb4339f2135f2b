"""Put a model's trainable parameters into the groups that an optimizer gets."""

import torch

from dualoptim.method.adamw import SMALLEST_QUANTIZED
from dualoptim.method.dual import Groups


def decay_groups(model: torch.nn.Module, weight_decay: float, bits: int = 32, quantize_embeddings: bool = False) -> Groups:
    """Sort the trainable parameters into groups: weights with `weight_decay`, biases and norms without.

    With `bits` 8 a group says in `bits` whether its states may be quantized: not those of biases, norms, tensors of fewer than
    4,096 elements and (unless `quantize_embeddings`) embeddings. It has to be a property of the group, because ZeRO lays all
    tensors of a group end to end before the optimizer sees them.
    """
    undecayed, embeddings = set(), set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias") or "norm" in type(module).__name__.lower():
                undecayed.add(id(parameter))
            if isinstance(module, torch.nn.Embedding):
                embeddings.add(id(parameter))
    groups: dict[tuple[bool, int], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed = id(parameter) not in undecayed
            size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 may have divided it already, and left 0 here
            wide = not decayed or size < SMALLEST_QUANTIZED
            wide = wide or (id(parameter) in embeddings and not quantize_embeddings)
            groups.setdefault((decayed, 32 if wide else bits), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "decayed": decayed, "bits": own_bits}
        for (decayed, own_bits), parameters in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]
