"""Save a model as `from_pretrained` loads it."""

import copy
from dataclasses import asdict
from pathlib import Path

import torch

from dualoptim.atomic import beside, write_json
from dualoptim.data.prompt_file import PROMPT_FILE
from dualoptim.models.launch import prepared
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.masters import gathered
from dualoptim.models.together import wait
from dualoptim.models.weights import check_saved
from dualoptim.signals import held


@held()
def export_model(loaded: LoadedModel, folder: Path, card: str, dtype: str = "float32") -> None:
    """Write what `from_pretrained` loads: safetensors weights, configuration, tokenizer and a model card.

    The weights are those that were trained, in float32, rounded to `dtype`, whatever the launch computes in. A signal that
    asks the command to end waits for it.

    Raises:
        RuntimeError: if what was written is not that; nothing is replaced then.
    """
    accelerator, model = loaded.accelerator, loaded.model
    state = gathered(loaded, prepared(loaded))
    if accelerator.is_main_process:
        # gathered weights are copies, in which tied ones no longer show; save_pretrained pops entries from what it is given
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        kind = getattr(torch, dtype)
        state = {name: value for name, value in state.items() if name not in tied}
        state = {name: value.to(kind) if value.is_floating_point() else value for name, value in state.items()}
        # an adapter would ask the hub whether the base's vocabulary has been changed
        adapter = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        formatter, tags = loaded.formatter, loaded.formatter.tags
        prompt = {"template": loaded.template, "tags": asdict(tags) if tags else None}
        if tags is None:
            prompt |= {"date_string": formatter.date_string, "system_prompt": formatter.system_prompt}
        with beside(folder) as place:
            model.save_pretrained(place, state_dict=state, safe_serialization=True, **adapter)
            if not adapter:  # it was written with the type of the model in memory
                config = copy.deepcopy(model.config)
                config.dtype = kind
                config.save_pretrained(place)
            check_saved(model, place)
            loaded.tokenizer.save_pretrained(place)
            write_json(place / PROMPT_FILE, prompt)
            (place / "README.md").write_text(card, encoding="utf-8")
    wait(accelerator)
