"""Read the file beside saved weights that says how prompts were written for them, for the next command's `--template auto`."""

import json
from pathlib import Path
from typing import Any

from dualoptim.errors import blamed

PROMPT_FILE = "prompt.json"
"""Its name."""

_TAGS = {"question_start", "question_end", "answer"}


def saved_prompt(model: str) -> dict[str, Any] | None:
    """Read `template`, `tags` and what a chat template wrote, if `model` is a folder of ours.

    Raises:
        InputError: if the file is not what a run wrote.
    """
    path = Path(model).expanduser() / PROMPT_FILE
    if not path.exists():
        return None
    with blamed("--model", model, "write it anew, or remove it and give --template", f"{PROMPT_FILE} cannot be read"):
        prompt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tags = prompt["tags"]
        texts = [prompt.get("date_string"), prompt.get("system_prompt"), *({} if tags is None else tags).values()]
        complete = prompt["template"] == "chat" if tags is None else {*tags} <= _TAGS and prompt["template"] != "chat"
        if not (complete and isinstance(prompt["template"], str) and all(isinstance(text, str | None) for text in texts)):
            raise ValueError("a part of it is missing, or of another kind")
        return prompt
