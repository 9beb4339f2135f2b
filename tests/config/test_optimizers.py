"""What `--optim` and its flags build, and the mistakes that this finds."""

import pytest
import torch

from dualoptim import InputError, UnlearnArgs
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
        ({"decouple": "m"}, lambda o: o.defaults["max_update"], 1.0),
        ({"decouple": "m", "max_update": 0.0}, lambda o: o.defaults["max_update"], 0.0),
        ({"optim": "dual-adamw-plus"}, lambda o: o.defaults["max_update"], 0.0),
        ({"decouple": "none"}, type, torch.optim.AdamW),
        ({"optim": "adamw-alternate"}, type, torch.optim.AdamW),
        ({"optim": "dual-adamw-plus"}, lambda o: (type(o), o.defaults["base_betas"]), (DualAdamWPlus, (0.9, 0.999))),
        ({"optim": "dual-adamw-plus", "base_betas": (0.9, 0.95)}, lambda o: o.defaults["base_betas"], (0.9, 0.95)),
        ({"optim": "dual-adamw-plus", "max_update": 3.0}, lambda o: o.defaults["max_update"], 3.0),
        ({"optim": "dual-adamw-plus", "quantize_base": True}, lambda o: [*o.defaults["quantized"].values()], [0, 0, 1]),
        ({"optim": "dual-adamw-plus", "quantize_delta": True}, lambda o: [*o.defaults["quantized"].values()], [1, 1, 0]),
        ({"project_forget": "tensor", "forget_optimizer": "signsgd"}, kinds, ["SignSGD", "AdamW"]),
        ({"project_forget": "global", "retain_optimizer": "sgd"}, kinds, ["AdamW", "SGD"]),
        ({"project_forget": "global", "decouple": "m"}, type, PartlyDecoupledAdamW),
        ({"project_forget": "global", "optim": "dual-adamw-plus"}, type, DualAdamWPlus),
        ({"optim": "dual-adamw-plus", "optim_bits": 8}, lambda o: [*o.defaults["quantized"].values()], [1, 1, 1]),
    ],
)
def test_flags_reach_the_optimizer(changes, read, expected):
    args = UnlearnArgs(**changes)
    model = torch.nn.Linear(4, 3)
    assert read(kind_of(args).build(args)(decay_groups(model, args.weight_decay, args.state_bits))) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": "adamw"}, "has no effect here; it needs --optim dual-adamw with --decouple both"),
        ({"optim": "adamw-alternate"}, "has no effect here; it needs --optim dual-adamw with --decouple both"),
        ({"decouple": "none"}, "has no effect here"),
        ({"decouple": "v"}, "needs a first moment of retain steps, and --decouple v shares it; give --decouple m or both"),
        ({"retain_optimizer": "signsgd"}, "which signsgd has not; give --retain-optimizer adamw, or --project-forget none"),
        ({"retain_optimizer": "torch.optim.RMSprop"}, "which torch.optim.RMSprop has not; give --retain-optimizer adamw"),
        ({"optim_bits": 8}, "which adamw-8bit has not; give --retain-optimizer adamw"),
        ({"optim": "dual-adamw-plus", "optim_bits": 8}, "which --optim-bits 8 keeps in 8; drop one"),
        ({"optim": "dual-adamw-plus", "quantize_base": True}, "which --quantize-base keeps in 8; drop one"),
    ],
)
def test_a_projection_needs_a_moment_of_retain_steps(changes, said):
    def build():
        args = UnlearnArgs(project_forget="global", **changes)
        kind_of(args).build(args)  # which a run does before it writes anything

    with pytest.raises(InputError) as error:
        build()
    assert str(error.value).startswith("--project-forget global ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def forgotten(optim, coefficient):
    """How far forget steps lead whose gradients have a factor, among retain steps that pull elsewhere."""
    args, generator = UnlearnArgs(optim=optim), torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(500))
    optimizer = kind_of(args).build(args)([{"params": [weight], "decayed": False, "bits": 32}])
    pulls = {phase: torch.randn(500, generator=generator) for phase in ("forget", "retain")}
    moved = torch.zeros(500)
    for step in range(60):
        phase = "retain" if step % 6 else "forget"
        if hasattr(optimizer, "use"):
            optimizer.use(phase, 1e-3)
        weight.grad = pulls[phase] + torch.randn(500, generator=generator)
        weight.grad *= coefficient if phase == "forget" else 1
        before = weight.detach().clone()
        optimizer.step()
        moved += weight.detach() - before if phase == "forget" else 0
    return moved


@pytest.mark.parametrize(
    ("optim", "divided_out"), [("dual-adamw", True), ("dual-adamw-plus", False), ("adamw-alternate", False)]
)
def test_a_state_of_its_own_divides_a_factor_out(optim, divided_out):
    little, much = forgotten(optim, 0.1), forgotten(optim, 10.0)
    assert (float((much - little).norm() / much.norm()) < 1e-4) is divided_out
