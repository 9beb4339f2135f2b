"""Published settings by name: which numbers, in one line, and where they come from.

A preset is a diff from the defaults, and presets combine, later ones over earlier ones: a scenario says which model, data and
batch, a method which objectives, optimizer and rates (`--preset tofu-phi-1.5 npo-gd`). Steps are those of one process; the
published runs of all scenarios and joint methods had two, so that one process doubles `--gradient-accumulation-steps` for as
many examples a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from dualoptim.config.args import UnlearnArgs
from dualoptim.errors import InputError

_DUALOPTIM = "github.com/CityU-MLO/DualOptim LLM/"
_CLOSER_LOOK = "github.com/sail-sg/closer-look-LLM-unlearning "
_OPEN_UNLEARNING = "github.com/locuslab/open-unlearning configs/trainer/"


@dataclass(frozen=True)
class Preset:
    """Settings by the names of `UnlearnArgs`' fields, what they are for, and their source."""

    about: str
    source: str
    settings: dict[str, Any]


def _dual(pair: str, coefficient: float, **more: Any) -> dict[str, Any]:
    """DualOptim's own runs, whose batch is the scenario's."""
    settings = {"forget_losses": (pair,), "optim": "dual-adamw", "learning_rates": (1e-5,), "forget_lr": 1e-5, "retain_freq": 5}
    return settings | {"forget_coeff": coefficient, "regularization_coeff": 1.0, "num_epochs": 5} | more


def _joint(pair: str, coefficient: float = 1.0, **more: Any) -> dict[str, Any]:
    """One state and both losses in a step, as everything before DualOptim; `forget_lr` undoes a scenario's."""
    settings = {"forget_losses": (pair,), "optim": "adamw", "learning_rates": (1e-5,), "forget_lr": None, "num_epochs": 5}
    sizes = {"forget_coeff": coefficient, "regularization_coeff": 1.0, "batch_size": 4, "gradient_accumulation_steps": 4}
    return settings | sizes | more


def _tofu(model: str, template: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": "locuslab/TOFU",
        "split": "forget10",
        "template": template,
        "batch_size": 5,
        "gradient_accumulation_steps": 4,
        "learning_rates": (1e-5,),
        "forget_coeff": 0.1,
        "gradient_checkpointing": True,
    }


def _of_benchmarks() -> dict[str, Preset]:
    """Read the presets that the package's benchmarks declare."""
    found = {}
    for file in sorted(resources.files("dualoptim").joinpath("data/benchmarks").iterdir(), key=lambda file: file.name):
        declared = yaml.safe_load(file.read_text(encoding="utf-8")).get("presets", {})
        for name, one in declared.items():
            settings = {key: tuple(value) if isinstance(value, list) else value for key, value in one["settings"].items()}
            found[name] = Preset(one["about"], one["source"], settings)
    return found


SCENARIOS = {
    "tofu-llama2-7b": Preset(
        "ME+GD by DualOptim on TOFU's Llama-2-7B, forget10",
        f"{_DUALOPTIM}config/llama_tofu.yaml, scripts/tofu/me_gd_dual.sh",
        _tofu("locuslab/tofu_ft_llama2-7b", "llama2"),
    ),
    # the published file's tags (<|user|> ...) are not those that this model was fine-tuned with; TOFU's own are these
    "tofu-phi-1.5": Preset(
        "ME+GD by DualOptim on TOFU's Phi-1.5, forget10",
        f"{_DUALOPTIM}config/phi1-5_tofu.yaml, scripts/tofu/me_gd_dual.sh",
        _tofu("locuslab/tofu_ft_phi-1.5", "qa"),
    ),
    "real-world-llama3-8b": Preset(
        "ME+GD by DualOptim on people that Llama-3-8B knows; give --data",
        f"{_DUALOPTIM}config/real_world.yaml",
        {
            "model": "meta-llama/Meta-Llama-3-8B-Instruct",
            "split": "forget",
            "template": "llama3",
            "gradient_accumulation_steps": 4,
            "learning_rates": (5e-6,),
            "forget_lr": 1e-5,
            "forget_coeff": 0.5,
            "gradient_checkpointing": True,
        },
    ),
    **_of_benchmarks(),
}

METHODS = {
    "me-gd": Preset("ME+GD by DualOptim", f"{_DUALOPTIM}scripts/tofu/me_gd_dual.sh", _dual("ME+GD", 0.1)),
    "idk-ap": Preset("IDK+AP by DualOptim", f"{_DUALOPTIM}scripts/tofu/idk_ap_dual.sh", _dual("IDK+AP", 1.0)),
    "me-gd-plus": Preset(
        "ME+GD by DualOptim+",
        "github.com/CityU-MLO/DualOptimPlus config/phi1-5_tofu.yaml",
        _dual("ME+GD", 0.1, optim="dual-adamw-plus", adam_betas=(0.9, 0.95), base_betas=(0.99, 0.999))
        | {"batch_size": 4, "gradient_accumulation_steps": 5},
    ),
    "me-gd-joint": Preset(
        "ME+GD over question and answer, one state", f"{_CLOSER_LOOK}scripts/tofu/me_gd.sh", _joint("ME+GD", 0.1, mask=False)
    ),
    "idk-ap-joint": Preset("IDK+AP, one state", f"{_CLOSER_LOOK}scripts/tofu/idk_ap.sh", _joint("IDK+AP")),
    **{
        f"{forget}-{retain}".lower(): Preset(
            f"{forget}+{retain}, one state", f"{_CLOSER_LOOK}scripts/tofu/baselines.sh", _joint(f"{forget}+{own}")
        )
        for retain, own in (("GD", "GD"), ("KL", "KLQ"))  # its KL is over question and answer
        for forget in ("GA", "NPO", "IDK", "DPO")
    },
    "simnpo-gd": Preset(
        "SimNPO+GD, one state", f"{_OPEN_UNLEARNING}SimNPO.yaml", _joint("SimNPO+GD", 0.125, beta=4.5, gamma=0.0, num_epochs=10)
    ),
    "rmu-embed": Preset(
        "RMU and its embedding loss, one state",
        f"{_OPEN_UNLEARNING}RMU.yaml",
        _joint("RMU+EMBED", beta=2.0, layer=7, num_epochs=10),
    ),
    "rmu-wmdp": Preset(
        "RMU and its embedding loss on WMDP's passages, three layers' down projections alone",
        "github.com/locuslab/open-unlearning configs/experiment/unlearn/wmdp/default.yaml",
        _joint("RMU+EMBED", beta=2.0, layer=7, learning_rates=(5e-5,), lr_schedule="constant", warmup_epochs=0.0, max_steps=80)
        | {"trainable": "layers.(5|6|7).mlp.down_proj", "batch_size": 1, "gradient_accumulation_steps": 16, "max_length": 512},
    ),
    "undial": Preset(
        "UNDIAL, regularization off, one state",
        f"{_OPEN_UNLEARNING}UNDIAL.yaml",
        _joint("UNDIAL+none", beta=10.0, learning_rates=(1e-4,), num_epochs=10)
        | {"batch_size": 2, "gradient_accumulation_steps": 8},
    ),
    "wga-gd": Preset("WGA+GD, one state", f"{_OPEN_UNLEARNING}WGA.yaml", _joint("WGA+GD", beta=1.0)),
    "satimp-gd": Preset(
        "SatImp+GD, one state", f"{_OPEN_UNLEARNING}SatImp.yaml", _joint("SatImp+GD", 0.1, beta=5.0, gamma=1.0)
    ),
    "ce-u": Preset("CE-U alone, one state", f"{_OPEN_UNLEARNING}CEU.yaml", _joint("CE-U+none", num_epochs=10)),
}
PRESETS = SCENARIOS | METHODS


def listing() -> str:
    """List all presets, a line each."""
    width = max(map(len, PRESETS))
    return "\n".join(f"{name:{width}}  {preset.about}; {preset.source}" for name, preset in PRESETS.items())


def preset(*names: str, **overrides: Any) -> UnlearnArgs:
    """Make `UnlearnArgs` with the published settings of `names`, later ones over earlier ones, changed by `overrides`.

    Raises:
        InputError: if there is no such preset.
    """
    return UnlearnArgs(**{**published(names), **overrides})


def published(names: Sequence[str]) -> dict[str, Any]:
    """Join the settings of the presets called `names`, later ones over earlier ones.

    Raises:
        InputError: if there is no such preset.
    """
    settings: dict[str, Any] = {}
    for name in names:
        if name not in PRESETS:
            raise InputError(f"--preset {name!r} is unknown; --preset without a name lists them all")
        settings |= PRESETS[name].settings
    return settings
