"""Add a low-rank adapter to a model, or put a saved one back onto its base."""

from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from dualoptim.config.args import TrainArgs
from dualoptim.config.flags import default_of, flag_name
from dualoptim.errors import InputError, blamed, reason
from dualoptim.models.weights import check_loaded

_REMEDY = "give the whole folder that a --use-lora run wrote"
_CANNOT = "its adapter cannot be loaded"


def hub_revision(model: str) -> tuple[str, str | None]:
    """Split `org/name@revision`, as `--model` takes it; None for no @, and for what lies on this machine."""
    hub, at, revision = model.partition("@")
    return (hub, revision) if at and not Path(model).expanduser().exists() else (model, None)


def base_of(name: str) -> str:
    """Name the model that the adapter in folder `name` belongs to, or `name` itself where there is no adapter.

    Raises:
        InputError: if the adapter's configuration cannot be read, is of a kind that changes no weights, or if its base is gone.
    """
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return name
    from peft import PeftConfig

    with blamed("--model", name, _REMEDY, _CANNOT):
        config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        raise InputError(
            f"--model {name}: a {kind} adapter is no change of weights, and nothing is unlearned in it; give one of LoRA"
        )
    base = config.base_model_name_or_path
    place = f"base_model_name_or_path of {folder / 'adapter_config.json'}"
    if not (base and isinstance(base, str)):
        raise InputError(
            f"--model {name}: the adapter does not say which model it is of; write that model's folder or hub id into {place}"
        )
    if base.startswith(("/", ".", "~")) and not Path(base).expanduser().exists():
        raise InputError(
            f"--model {name}: the adapter's base {base} is not there; put it back, or write its new place into {place}"
        )
    revision = getattr(config, "revision", None)
    return f"{base}@{revision}" if revision and not Path(base).expanduser().exists() else str(base)


def without_adapter(model: Any) -> Any:
    """Give the model that an adapter is on, or a model itself that has none."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def has_tokenizer(name: str) -> bool:
    """Tell whether folder `name` holds a tokenizer; PEFT saves an adapter without one."""
    return any((Path(name).expanduser() / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def load_adapter(model: Any, name: str, learner: TrainArgs | None) -> Any:
    """Put the adapter of folder `name` onto its base `model`, for `learner` to train on; or merge it into the weights.

    Merged weights train. Where an adapter is on a tied output head or its embeddings, these are two tensors from then on, as
    they were two functions before.

    Raises:
        InputError: if its weights are missing, or are not of this model, or if it is not what flags of `learner` say.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    # a folder without weights is looked up on the hub, where its path is no valid name
    with blamed("--model", name, _REMEDY, _CANNOT):
        adapted = PeftModel.from_pretrained(model, str(Path(name).expanduser()), is_trainable=learner is not None)
        result: Any = set_peft_model_state_dict(adapted, load_peft_weights(str(Path(name).expanduser()), device="cpu"))
    # every weight of the base is missing in the adapter's file; those of the adapter have its name in theirs, but not there
    missing = {key.replace(".default", "") for key in result.missing_keys if "default" in key.split(".")}
    unexpected = {key.replace(".default", "") for key in result.unexpected_keys}
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": ()}
    check_loaded(f"--model {name}", adapted, info)
    if learner:
        _check_flags(learner, name, adapted)
        return adapted
    with blamed("--model", name, "give one of LoRA", "its adapter cannot be merged into the weights"):
        return _merged(adapted).requires_grad_(True)  # loading the adapter froze what is all there is now


def _check_flags(args: TrainArgs, name: str, adapted: Any) -> None:
    """Refuse flags that say otherwise than the adapter that is trained on.

    Raises:
        InputError: naming the first.
    """
    config = adapted.peft_config["default"]
    own = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    for flag, key in own.items():
        given, value = getattr(args, flag), getattr(config, key, None)
        if given not in (default_of(type(args), flag), value):
            raise InputError(f"{flag_name(flag)} {given:g} has no effect on the adapter in {name}, which has {value}; drop it")
    targets = list(args.lora_target_modules)
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [module for module, layer in adapted.named_modules() if isinstance(layer, BaseTunerLayer)]
    found = [[_is_called(module, target) for target in targets] for module in modules]
    fits = all(map(any, found)) and all(map(any, zip(*found, strict=True)))
    if targets != ["all-linear"] and not fits:
        leaves = sorted({module.rpartition(".")[2] for module in modules})
        given = f"--lora-target-modules {' '.join(targets)}"
        raise InputError(f"{given} has no effect on the adapter in {name}, which is on {' '.join(leaves)}; drop it")


def adapter_settings(model: Any) -> dict[str, Any]:
    """Read from the adapter of `model`, which may have been made elsewhere, what its flags are; nothing without LoRA."""
    config: Any = getattr(model, "peft_config", {}).get("default")
    if not hasattr(config, "lora_alpha"):
        return {}
    return {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}


def _merged(adapted: Any) -> Any:
    """Add an adapter to the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in (adapted.get_input_embeddings(), adapted.get_output_embeddings()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = BaseTunerLayer.get_base_layer(module)
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    model = adapted.merge_and_unload()
    vars(model).pop("peft_config", None)  # which PEFT 0.18 leaves on what is no adapter any more
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    still = {one: other for one, other in tied.items() if model.get_parameter(one) is model.get_parameter(other)}
    if still != tied:  # else saving would leave one of the two out, and loading would tie them again
        model.all_tied_weights_keys = still
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


def add_adapter(args: TrainArgs, model: Any) -> Any:
    """Add a fresh low-rank adapter to `model` (LoRA, arXiv 2106.09685), which alone trains. At first it changes nothing.

    Raises:
        InputError: if `--lora-target-modules` names no module of the model, or one that takes no adapter.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds and loads bitsandbytes, so only those wait who use it

    targets = list(args.lora_target_modules)
    names = {name: module for name, module in model.named_modules() if name}
    linear = {name: module for name, module in names.items() if isinstance(module, (torch.nn.Linear, Conv1D))}
    odd = [name for name, module in linear.items() if not _is_linear(module)]

    def refused(which: list[str], why: str) -> InputError:
        leaves = sorted({name.rpartition(".")[2] for name in linear.keys() - set(odd)})
        fitting = [*(leaf for leaf in leaves if f"'{leaf}'" not in why), *(["all-linear"] if targets != ["all-linear"] else [])]
        choice = " or ".join([", ".join(fitting[:-1]), fitting[-1]] if fitting[1:] else fitting)
        return InputError(f"--lora-target-modules {' '.join(which)}: {why}; choose from {choice}")

    for target in targets if targets != ["all-linear"] else []:
        found = [name for name in names if _is_called(name, target)]
        if not found:
            raise refused([target], "not in this model")
        if set(found) <= set(odd):
            raise refused([target], f"{type(names[found[0]]).__name__} takes no adapter")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        exclude_modules=odd or None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)  # every process draws the same adapter
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise refused(targets, f"PEFT says: {reason(error)}") from None
    # what loads the adapter has to find its base again, from any folder
    path = Path(args.model).expanduser()
    hub, config.revision = hub_revision(args.model)
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else hub
    return adapted


def _is_called(module: str, target: str) -> bool:
    """Tell whether `--lora-target-modules` means this module by a name."""
    return f".{module}".endswith(f".{target}")


@torch.no_grad()
def _is_linear(module: Any) -> bool:
    """Tell whether a module gives what a linear layer does; routers and grouped layers that are built on one do not."""
    kind = type(module)
    if kind.forward is torch.nn.Linear.forward or kind is Conv1D or kind.__module__.startswith("bitsandbytes."):
        return True
    weight = module.weight
    try:
        output = module(torch.zeros(1, 1, module.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # of any kind: it takes no such input
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 1, module.out_features)
