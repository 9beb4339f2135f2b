"""Published settings by name: which numbers, in one line, and where they come from.

A preset is a diff from what the released runs share (`RELEASED`), so that none of its numbers is a default of ours, and presets
combine, later ones over earlier ones: a scenario says which model, data and batch, a method which objectives, optimizer and
rates (`--preset tofu-phi-1.5 npo-gd`). The published runs of scenarios and methods had two processes, and one doubles
`--gradient-accumulation-steps` for as many rows a step; `batch_note` says so where it is not done.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

import yaml

from dualoptim.config.args import UnlearnArgs
from dualoptim.errors import InputError

_DUALOPTIM = "github.com/CityU-MLO/DualOptim LLM/"
_CLOSER_LOOK = "github.com/sail-sg/closer-look-LLM-unlearning "
_DUALOPTIM_PLUS = "github.com/CityU-MLO/DualOptimPlus scripts/tofu_phi1-5/"
_OPEN_UNLEARNING = "github.com/locuslab/open-unlearning configs/trainer/"


@dataclass(frozen=True)
class Preset:
    """Settings by the names of `UnlearnArgs`' fields, what they are for, and their source.

    `processes`: on how many the published run shared out its batch; 0 if nobody says.
    """

    about: str
    source: str
    settings: dict[str, Any]
    processes: int = 2


RELEASED: dict[str, Any] = {
    "task_list": (1,),
    "tasks_independent": False,
    "max_length": 500,
    "forget_losses": ("ME-floor+GD",),
    "beta": None,
    "gamma": None,
    "layer": None,
    "fix_ref_model": False,
    "mask": True,
    "forget_coeff": 1.0,
    "regularization_coeff": 1.0,
    "optim": "dual-adamw",
    "trainable": None,
    "weight_decay": 0.01,
    "adam_betas": (0.9, 0.999),
    "forget_optimizer": None,
    "retain_optimizer": None,
    "forget_adam_betas": None,
    "forget_weight_decay": None,
    "decouple": "both",
    "base_betas": None,
    "max_update": None,
    "learning_rates": (1e-5,),
    "forget_lr": None,
    "forget_strength": 1.0,
    "forget_freq": 1,
    "retain_freq": 5,
    "retain_held_out": 0.0,
    "project_forget": "none",
    "average_cycles": 0.0,
    "sam_rho": 0.0,
    "keep_budget": None,
    "forget_until": None,
    "seed": 1001,
    "num_epochs": 5,
    "max_steps": 0,
    "max_grad_norm": 1.0,
    "forget_max_grad_norm": None,
    "lr_schedule": "linear",
    "warmup_epochs": 1.0,
    "warmup_steps": None,
    "optim_bits": 32,
    "quantize_embeddings": False,
    "quantize_delta": False,
    "quantize_base": False,
    "use_lora": False,
    "load_in_4bit": False,
}
"""What a released run has where its preset says nothing else: all of it is stated, because defaults change."""

LORA = {"lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": ("all-linear",)}
"""What its adapter has, once `--use-lora` asks for one."""

_NEW = {name: RELEASED[name] for name in "tasks_independent mask beta gamma layer adam_betas base_betas max_steps".split()}
"""What a method undoes of one before it."""


def _dual(pair: str, **more: Any) -> dict[str, Any]:
    """DualOptim's own runs, whose batch is the scenario's."""
    settings = {"forget_losses": (pair,), "optim": "dual-adamw", "learning_rates": (1e-5,), "forget_lr": 1e-5, "retain_freq": 5}
    sizes = {"forget_coeff": 1.0, "regularization_coeff": 1.0, "num_epochs": 5}
    return _NEW | settings | sizes | {"tasks_independent": True} | more


def _plus(pair: str, forget_lr: float = 1e-5, **more: Any) -> dict[str, Any]:
    """DualOptim+'s, of 300 steps whatever the split."""
    betas = {"optim": "dual-adamw-plus", "adam_betas": (0.9, 0.95), "base_betas": (0.9, 0.95)}
    steps = {"forget_lr": forget_lr, "max_steps": 300, "batch_size": 4, "gradient_accumulation_steps": 5}
    return _dual(pair, **betas, **steps, **more)


def _joint(pair: str, coefficient: float = 1.0, **more: Any) -> dict[str, Any]:
    """One state and both losses in a step, as everything before DualOptim; `forget_lr` undoes a scenario's."""
    settings = {"forget_losses": (pair,), "optim": "adamw", "learning_rates": (1e-5,), "forget_lr": None, "num_epochs": 5}
    sizes = {"forget_coeff": coefficient, "regularization_coeff": 1.0, "batch_size": 4, "gradient_accumulation_steps": 4}
    return _NEW | settings | sizes | more


def _tofu(model: str, template: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": "locuslab/TOFU",
        "split": "forget10",
        "tasks_independent": True,
        "template": template,
        "batch_size": 5,
        "gradient_accumulation_steps": 4,
        "forget_lr": 1e-5,
        "gradient_checkpointing": True,
        "eval_rows": 300,
    }


@cache
def of_benchmarks() -> dict[str, Preset]:
    """Read the presets that the package's benchmarks declare; one may be like another, of which it says what differs."""
    found = {}
    for file in sorted(resources.files("dualoptim").joinpath("data/benchmarks").iterdir(), key=lambda file: file.name):
        declared = yaml.safe_load(file.read_text(encoding="utf-8")).get("presets", {})
        for name, one in declared.items():
            like = declared.get(one.get("like"), {"settings": {}})
            settings = like["settings"] | one["settings"]
            settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
            found[name] = Preset(one["about"], (like | one)["source"], settings, processes=0)
    return found


SCENARIOS = {
    "tofu-llama2-7b": Preset(
        "ME+GD by DualOptim on TOFU's Llama-2-7B, forget10",
        f"{_DUALOPTIM}config/llama_tofu.yaml, scripts/tofu/dualoptim.sh",
        _tofu("locuslab/tofu_ft_llama2-7b", "llama2"),
    ),
    # the published file's tags (<|user|> ...) are not those that this model was fine-tuned with; TOFU's own are these
    "tofu-phi-1.5": Preset(
        "ME+GD by DualOptim on TOFU's Phi-1.5, forget10",
        f"{_DUALOPTIM}config/phi1-5_tofu.yaml, scripts/tofu/dualoptim.sh",
        _tofu("locuslab/tofu_ft_phi-1.5", "qa"),
    ),
    "real-world-llama3-8b": Preset(
        "ME+GD by DualOptim on people that Llama-3-8B knows; give --data",
        f"{_DUALOPTIM}config/real_world.yaml",
        {
            "model": "meta-llama/Meta-Llama-3-8B-Instruct",
            "split": "forget",
            "template": "llama3",
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rates": (5e-6,),
            "forget_lr": 1e-5,
            "forget_coeff": 0.5,
            "gradient_checkpointing": True,
            "eval_rows": 0,
        },
    ),
}

METHODS = {
    "me-gd": Preset("ME+GD by DualOptim", f"{_DUALOPTIM}scripts/tofu/dualoptim.sh", _dual("ME-floor+GD")),
    "idk-ap": Preset("IDK+AP by DualOptim", f"{_DUALOPTIM}scripts/tofu/dualoptim.sh", _dual("IDK+AP", beta=0.1)),
    "me-gd-plus": Preset("ME+GD by DualOptim+", f"{_DUALOPTIM_PLUS}me_gd_dual.sh", _plus("ME-floor+GD")),
    "idk-ap-plus": Preset("IDK+AP by DualOptim+", f"{_DUALOPTIM_PLUS}idk_ap_dual.sh", _plus("IDK+AP", beta=0.1)),
    "npo-gd-plus": Preset("NPO+GD by DualOptim+", f"{_DUALOPTIM_PLUS}npo_gd_dual.sh", _plus("NPO+GD", beta=0.1)),
    "dpo-gd-plus": Preset("DPO+GD by DualOptim+", f"{_DUALOPTIM_PLUS}dpo_gd_dual.sh", _plus("DPO+GD", 1.5e-5, beta=0.1)),
    "me-gd-joint": Preset(
        "ME+GD over question and answer, one state",
        f"{_CLOSER_LOOK}scripts/tofu/me_gd.sh",
        _joint("ME-floor+GD", 0.1, mask=False),
    ),
    "idk-ap-joint": Preset("IDK+AP, one state", f"{_CLOSER_LOOK}scripts/tofu/idk_ap.sh", _joint("IDK+AP", beta=0.1)),
    **{
        f"{forget}-{retain}".lower(): Preset(
            f"{forget}+{retain}, one state", f"{_CLOSER_LOOK}scripts/tofu/baselines.sh", _joint(f"{forget}+{own}", **beta)
        )
        for retain, own in (("GD", "GD"), ("KL", "KLQ"))  # its KL is over question and answer
        for forget, beta in (("GA", {}), ("NPO", {"beta": 0.1}), ("IDK", {}), ("DPO", {"beta": 0.1}))
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
        processes=0,
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


def presets() -> dict[str, Preset]:
    """Give all presets by name: scenarios, what benchmarks declare, methods."""
    return SCENARIOS | of_benchmarks() | METHODS


def listing() -> str:
    """List all presets, a line each, by what they say."""
    kinds = {"scenarios: model, data, batch": SCENARIOS, "methods: objectives, optimizer, rates": METHODS}
    width, lines = max(map(len, presets())), list[str]()
    for title, own in (kinds | {"of benchmarks": of_benchmarks()}).items():
        lines += [f"{title}:", *(f"  {name:{width}}  {preset.about}; {preset.source}" for name, preset in own.items())]
    return "\n".join(lines)


def preset(*names: str, **overrides: Any) -> UnlearnArgs:
    """Make `UnlearnArgs` with the published settings of `names`, later ones over earlier ones, changed by `overrides`.

    Raises:
        InputError: if there is no such preset.
    """
    return UnlearnArgs(**over(published(names), overrides))


def published(names: Sequence[str]) -> dict[str, Any]:
    """Join the settings of the presets called `names`, later ones over earlier ones; none for no name.

    Raises:
        InputError: if there is no such preset.
    """
    settings: dict[str, Any] = RELEASED | LORA if names else {}
    for name in names:
        if name not in presets():
            near = "".join(f" (did you mean {one}?)" for one in get_close_matches(name, presets(), n=1))
            raise InputError(f"--preset {name!r} is unknown{near}; --preset without a name lists them all")
        settings |= presets()[name].settings
    return settings


def over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Put what a user gives over the settings of a preset or a file.

    What these say of an adapter, an evaluation or a pair of objectives that the run does not have is left out, and
    `forget_strength` is a factor of the rate of forget steps that they say.
    """
    both = {**settings, **given}
    unused = (set() if both.get("use_lora") else set(LORA)) | (set() if both.get("eval", True) else {"eval_rows"})
    unused |= {"beta", "gamma", "layer"} if "forget_losses" in given else set()
    unused |= {"forget_lr", "forget_strength"} if given.get("forget_lrs") else set()
    unused |= {"forget_strength"} if both.get("forget_lr") or both.get("optim") == "adamw" else set()
    if given.get("forget_strength") and settings.get("forget_lr") and "forget_lr" not in given:
        both["forget_lr"] = settings["forget_lr"] * both.pop("forget_strength")
    return {name: value for name, value in both.items() if name in given or name not in unused}


def batch_note(names: Sequence[str], args: UnlearnArgs, processes: int) -> str:
    """Say how many rows a step of a published run took, if one of this run takes another number."""
    own_presets = [presets()[name] for name in names]
    if not all(one.processes for one in own_presets):
        return ""
    (*_, last) = [presets()["tofu-phi-1.5"], *(one for one in own_presets if "batch_size" in one.settings)]
    size, accumulation = last.settings["batch_size"], last.settings["gradient_accumulation_steps"]
    rows, own = size * accumulation * last.processes, args.batch_size * args.gradient_accumulation_steps * processes
    if rows == own:
        return ""
    remedy = f"give --batch-size {size} --gradient-accumulation-steps {rows // (size * processes)}"
    remedy = remedy if rows % (size * processes) == 0 else f"start {last.processes} processes"
    here = f"{args.batch_size} x {args.gradient_accumulation_steps} on {processes} process{'es' if processes > 1 else ''}"
    return (
        f"--preset {' '.join(names)}: a step takes {own} rows here ({here}), and {rows} in the published runs ({size} x "
        f"{accumulation} on {last.processes}); {remedy}"
    )
