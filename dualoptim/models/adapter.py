"""Add a low-rank adapter to a model, or put a saved one back onto its base."""

from pathlib import Path
from typing import Any

import torch

from dualoptim.config.args import TrainArgs
from dualoptim.errors import InputError, blamed


def base_of(name: str) -> str:
    """Name the model that the adapter in folder `name` belongs to, or `name` itself where there is no adapter.

    Raises:
        InputError: if the adapter's configuration cannot be read.
    """
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return name
    from peft import PeftConfig

    with blamed("--model", name, "give the whole folder that a --use-lora run wrote", "its adapter cannot be loaded"):
        return str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)


def load_adapter(model: Any, name: str, is_trainable: bool) -> Any:
    """Put the adapter of folder `name` onto its base `model`, to be trained on; or merge it into the weights, which then train.

    Raises:
        InputError: if its weights are missing, or are not of this model.
    """
    from peft import PeftModel

    # a folder without weights is looked up on the hub, where its path is no valid name
    with blamed("--model", name, "give the whole folder that a --use-lora run wrote", "its adapter cannot be loaded"):
        adapted = PeftModel.from_pretrained(model, str(Path(name).expanduser()), is_trainable=is_trainable)
    # loading the adapter froze what is all there is once it is merged
    return adapted if is_trainable else adapted.merge_and_unload().requires_grad_(True)


def add_adapter(args: TrainArgs, model: Any) -> Any:
    """Add a fresh low-rank adapter to `model` (LoRA, arXiv 2106.09685), which alone trains. At first it changes nothing.

    Raises:
        InputError: if `--lora-target-modules` names no module of the model.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds and loads bitsandbytes, so only those wait who use it

    targets = list(args.lora_target_modules)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)  # every process draws the same adapter
    try:
        adapted = get_peft_model(model, config)
    except ValueError:
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        raise InputError(
            f"--lora-target-modules {' '.join(targets)}: not in this model; "
            f"choose from {', '.join(sorted(leaves))} or all-linear"
        ) from None
    # what loads the adapter has to find its base again, from any folder
    path = Path(args.model).expanduser()
    config.base_model_name_or_path = str(path.resolve()) if path.exists() else args.model
    return adapted
