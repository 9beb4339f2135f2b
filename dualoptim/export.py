"""Write a model in the form that others serve.

dualoptim export runs/mine --to merged --output-dir runs/served
dualoptim export runs/mine --to gguf --output-dir runs/served
dualoptim export org/model --negate runs/tuned --alpha 0.5 --output-dir runs/negated
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from dualoptim.__main__ import COMMANDS, start

    start(COMMANDS["export"])

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from dualoptim.config.args import ExportArgs
from dualoptim.config.values import expect
from dualoptim.errors import InputError
from dualoptim.models.export import export_model
from dualoptim.models.gguf_file import write_gguf
from dualoptim.models.launch import start_accelerator
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.lock import kept_for_one_run
from dualoptim.reporting.left import left_by, load_left, named


def export(args: ExportArgs) -> Path:
    """Write `<output_dir>/model/` or `<output_dir>/model.gguf`, and return which.

    Raises:
        InputError: if the model cannot be loaded or written in that form, or if there is something in its place.
    """
    expect(args, ExportArgs)
    one = replace(left_by(args.run).after, max_length=32)  # nothing is asked, so a model of few positions will do
    accelerator = start_accelerator(one)
    if accelerator.num_processes > 1:
        raise InputError(f"export is for one process, and this launch has {accelerator.num_processes}; give --num_processes 1")
    folder = Path(str(args.output_dir)).expanduser()
    target = folder / ("model.gguf" if args.to == "gguf" else "model")
    with kept_for_one_run(folder, accelerator, "give the same command again"):
        if target.exists():
            raise InputError(f"--output-dir: {target} is there already; give another folder, or move it away")
        with named("RUN"):
            loaded = load_left(one, accelerator)
        card = card_of(Path(one.model).expanduser())
        if args.negate is not None:
            card = f"{card.rstrip()}\n\n{take_away(loaded, args)}\n"
        dtype = loaded.stored if args.save_dtype == "auto" else args.save_dtype
        if args.to == "gguf":
            write_gguf(loaded, target, dtype)
        else:
            export_model(loaded, target, card, dtype)
    prompt = loaded.formatter.prompt("QUESTION").rstrip(" ")  # a blank at its end is the beginning of the answer
    print(f"{args.to}, {dtype}: {target}\na question is put as {prompt!r}")
    return target


@torch.no_grad()
def take_away(loaded: LoadedModel, args: ExportArgs) -> str:
    """Change a model's weights w, which are w' where it was fine-tuned, to w - alpha (w' - w); what its card says of that.

    The negation of a task vector: Ilharco et al., "Editing Models with Task Arithmetic" (arXiv 2212.04089).

    Raises:
        InputError: if the other model cannot be loaded, is of another kind, or does not differ.
    """
    with named("--negate"):
        tuned = load_left(replace(left_by(str(args.negate)).after, max_length=32), loaded.accelerator).model.state_dict()
    weights = dict(loaded.model.named_parameters())
    shapes, others = ({name: (one.shape, one.dtype) for name, one in each.items()} for each in (weights, tuned))
    if any(others.get(name, None) != shapes[name] for name in weights):
        raise InputError(f"--negate {args.negate}: it has other weights than RUN {args.run}; give a model fine-tuned from that")
    if all(torch.equal(weight, tuned[name]) for name, weight in weights.items()):
        raise InputError(f"--negate {args.negate}: its weights are those of RUN {args.run}; give a model fine-tuned from that")
    for name, weight in weights.items():
        weight.copy_(weight.float().lerp(tuned[name].float(), -args.alpha))
    what = f"{args.alpha:g} times what fine-tuning has added in {Path(str(args.negate)).name}"
    return f"From the weights {what} has been taken away (a task vector, arXiv 2212.04089)."


def card_of(folder: Path) -> str:
    """Write the card of what is written: that of the model, which calls itself a whole model if it was an adapter."""
    path = folder / "README.md"
    if not path.is_file():
        return f"# {folder.name}\n\nWritten by dualoptim.\n"
    text = path.read_text(encoding="utf-8")
    if not (folder / "adapter_config.json").is_file():
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.library_name = "transformers"
    data.tags = [tag for tag in data.get("tags") or () if tag != "lora"]
    if data.get("base_model_relation") == "adapter":
        data.base_model_relation = "finetune"
    card.text = f"{card.text.rstrip()}\n\nThe adapter has been merged into the weights that lie here.\n"
    return str(card)
