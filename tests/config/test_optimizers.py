"""What `--optim` and its flags build, and the mistakes that this finds."""

import pytest
import torch

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.method.dual import PHASES
from dualoptim.method.groups import decay_groups
from dualoptim.method.plus import DualAdamWPlus, PartlyDecoupledAdamW


def betas(optimizer):
    return [optimizer._settings[phase][0]["betas"] for phase in PHASES]


def decays(optimizer):
    return [[group["weight_decay"] for group in optimizer._settings[phase]] for phase in PHASES]


def kinds(optimizer):
    return [type(inner).__name__ for inner in optimizer._inner.values()]


@pytest.mark.parametrize(
    ("changes", "read", "expected"),
    [
        ({}, betas, [(0.9, 0.999), (0.9, 0.999)]),
        ({"adam_betas": (0.5, 0.6)}, betas, [(0.5, 0.6), (0.5, 0.6)]),
        ({"forget_adam_betas": (0.5, 0.6)}, betas, [(0.5, 0.6), (0.9, 0.999)]),
        ({"forget_optimizer": "torch.optim.Adam", "forget_adam_betas": (0.5, 0.6)}, betas, [(0.5, 0.6), (0.9, 0.999)]),
        ({"forget_optimizer": "torch.optim.Adam"}, kinds, ["Adam", "AdamW"]),
        ({"weight_decay": 0.3, "forget_weight_decay": 0.0}, decays, [[0.0, 0.0], [0.3, 0.0]]),
        ({"weight_decay": 0.3}, decays, [[0.3, 0.0], [0.3, 0.0]]),
        ({"forget_optimizer": "sgd", "retain_optimizer": "signsgd"}, kinds, ["SGD", "SignSGD"]),
        ({"forget_optimizer": "sgd"}, lambda o: o._settings["forget"][0]["momentum"], 0.9),
        ({"forget_optimizer": "adamw-8bit"}, kinds, ["GroupwiseAdamW8bit", "AdamW"]),
        ({"optim_bits": 8}, kinds, ["GroupwiseAdamW8bit", "GroupwiseAdamW8bit"]),
        ({"decouple": "v"}, lambda o: (type(o), o.defaults["decouple"]), (PartlyDecoupledAdamW, "v")),
        ({"decouple": "none"}, type, torch.optim.AdamW),
        ({"optim": "adamw-alternate"}, type, torch.optim.AdamW),
        ({"optim": "dual-adamw-plus"}, lambda o: (type(o), o.defaults["base_betas"]), (DualAdamWPlus, (0.9, 0.999))),
        ({"optim": "dual-adamw-plus", "base_betas": (0.9, 0.95)}, lambda o: o.defaults["base_betas"], (0.9, 0.95)),
        ({"optim": "dual-adamw-plus", "max_update": 3.0}, lambda o: o.defaults["max_update"], 3.0),
        ({"optim": "dual-adamw-plus", "quantize_base": True}, lambda o: [*o.defaults["quantized"].values()], [0, 0, 1]),
        ({"optim": "dual-adamw-plus", "quantize_delta": True}, lambda o: [*o.defaults["quantized"].values()], [1, 1, 0]),
        ({"optim": "dual-adamw-plus", "optim_bits": 8}, lambda o: [*o.defaults["quantized"].values()], [1, 1, 1]),
    ],
)
def test_flags_reach_the_optimizer(changes, read, expected):
    args = UnlearnArgs(**changes)
    model = torch.nn.Linear(4, 3)
    assert read(kind_of(args).build(args)(decay_groups(model, args.weight_decay, args.state_bits))) == expected
