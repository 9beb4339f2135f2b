"""Teach the demo's tiny model its facts, or take the one that an earlier demo has taught in just the same way.

What is taught is kept in `~/.cache/dualoptim` (`XDG_CACHE_HOME` moves all caches, `DUALOPTIM_CACHE` this one; empty, nothing is
kept). It is taken where everything agrees that decides its weights, and they are the same to the bit on a CPU.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from dualoptim.atomic import beside, remove
from dualoptim.config.args import CommonArgs, FinetuneArgs, TrainArgs
from dualoptim.data.demo import KNOWS
from dualoptim.data.identity import prompts_hash
from dualoptim.data.tofu import tofu_source
from dualoptim.finetune import learn, plan_of, rows_to_learn
from dualoptim.models.export import export_model
from dualoptim.models.launch import decided, release, say
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.sharding import zero_of
from dualoptim.models.together import stop_together
from dualoptim.reporting.card import model_card
from dualoptim.reporting.log import StepLog
from dualoptim.signals import held

DEMO_RECIPE: dict[str, Any] = {
    "splits": ("full", "real_authors_perturbed", "world_facts_perturbed"),
    "learning_rate": 3e-3,
    "num_epochs": 60,
    "batch_size": 40,
    "target_loss": 0.01,
}
"""How the demo's tiny model is taught its rows: until the mean loss of an epoch says that it knows the answers."""

_KEPT = 8
"""Models that the cache holds at most; each takes 5 MB."""


def teach_demo(loaded: LoadedModel, args: TrainArgs, folder: Path) -> None:
    """Save to `folder` the demo's tiny model as it knows its rows; `args` say how texts are read.

    `loaded` is the untrained one, which is trained unless an earlier demo's can be taken.
    """
    accelerator = loaded.accelerator
    say(accelerator, "The demo: a tiny model first learns 400 invented facts about twenty authors and some real ones,")
    say(accelerator, "then it is made to forget one author.")
    shared = {field.name: getattr(args, field.name) for field in fields(CommonArgs)}
    recipe = FinetuneArgs(**shared, seed=args.seed, **DEMO_RECIPE)
    rows = rows_to_learn(recipe, tofu_source(recipe.data_source))
    card = model_card(recipe, KNOWS)
    decides = [card, prompts_hash(rows, loaded.formatter), loaded.weights_hash(), *_circumstances(accelerator)]
    name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    if decided(accelerator, lambda: _take(name, folder)):
        say(accelerator, f"It has learned them before, and is taken from {_cache()}.")
        return
    if decided(accelerator, lambda: (cache := _cache()) is not None and any(cache.glob("*-*"))):
        say(
            accelerator,
            f"Earlier demos had another seed than {args.seed}, other settings or versions, so that it is taught anew:",
        )
        say(accelerator, "that takes about a minute on two cores, and once.")
    with held():
        with StepLog(None, plan_of(recipe, len(rows), accelerator.num_processes).last_step, "learn", accelerator) as log:
            for _ in learn(loaded, rows, recipe, log):
                pass
        say(accelerator, f"It has learned them in {len(log.records)} steps.")
        export_model(loaded, folder, card)
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # a home that is full or read only costs the next demo time, and nothing else
                _keep(name, folder)
        stop_together(accelerator, f"with {folder} taught")
    release(loaded)


def _circumstances(accelerator: Accelerator) -> list[Any]:
    """List what decides trained weights beside settings, rows and the untrained model: code, launch and machine."""
    package, processors = Path(__file__).parent, Path("/proc/cpuinfo")
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py"))))
    models = [line for line in processors.read_text().splitlines() if "model name" in line] if processors.exists() else []
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine()
    launch = [str(accelerator.distributed_type), accelerator.num_processes, accelerator.mixed_precision, zero_of(accelerator)]
    versions = [torch.__version__, transformers.__version__, platform.python_version()]
    return [code.hexdigest(), *launch, device, models[:1], torch.get_num_threads(), *versions]


def _cache() -> Path | None:
    """Name the folder of models that were taught, None if there shall be none."""
    place = os.environ.get("DUALOPTIM_CACHE", f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dualoptim")
    try:
        return Path(place).expanduser() if place else None
    except RuntimeError:  # a user without a home
        return None


def _take(name: str, folder: Path) -> bool:
    """Copy a model of that name to `folder`, if there is one that is whole."""
    cache = _cache()
    for kept in sorted(cache.glob(f"{name}-*")) if cache else ():
        with contextlib.suppress(OSError), beside(folder) as place:
            shutil.copytree(kept, place)
            if kept.name == _name(name, place):
                return True
            remove(kept)
            raise OSError(f"{kept} is not what was kept any more")
    return False


def _keep(name: str, folder: Path) -> None:
    """Copy a taught model to the cache: whole or not at all, though another demo may do so at the same time."""
    if (cache := _cache()) is None:
        return
    cache.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=cache))
    try:
        shutil.copytree(folder, place / "model")
        os.rename(place / "model", cache / _name(name, folder))  # fails where the same has been kept meanwhile
    finally:
        remove(place)
    for old in sorted(cache.glob("*-*"), key=os.path.getmtime)[:-_KEPT]:
        remove(old)


def _name(name: str, folder: Path) -> str:
    """Name what is kept also by what its files hold, which tells whether they still do."""
    files = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir())))
    return f"{name}-{files.hexdigest()[:32]}"
