"""Save a model as `from_pretrained` loads it."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from dualoptim.atomic import write_json
from dualoptim.data.prompt_file import PROMPT_FILE
from dualoptim.models.launch import prepared
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.weights import check_saved


def export_model(loaded: LoadedModel, folder: Path, card: str) -> None:
    """Write what `from_pretrained` loads: safetensors weights, configuration, tokenizer and a model card.

    Raises:
        RuntimeError: if what was written is not that; nothing is replaced then.
    """
    accelerator, model = loaded.accelerator, loaded.model
    state = accelerator.get_state_dict(prepared(loaded))
    if accelerator.is_main_process:
        beside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        # gathered weights are copies, in which tied ones no longer show; save_pretrained pops entries from what it is given
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = {name: value for name, value in state.items() if name not in tied}
        # an adapter would ask the hub whether the base's vocabulary has been changed
        adapter = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(beside, state_dict=state, safe_serialization=True, **adapter)
        check_saved(model, beside)
        loaded.tokenizer.save_pretrained(beside)
        formatter, tags = loaded.formatter, loaded.formatter.tags
        prompt = {"template": loaded.template, "tags": asdict(tags) if tags else None}
        if tags is None:
            prompt |= {"date_string": formatter.date_string, "system_prompt": formatter.system_prompt}
        write_json(beside / PROMPT_FILE, prompt)
        (beside / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    accelerator.wait_for_everyone()
