"""Started by `accelerate launch` in tests: the main process works for eight seconds while the other waits.

{"what": "wait" | "shared" | "decided" | "hang" | "stop"}
"""

import json
import signal
import sys
import time
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from dualoptim import UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.models.launch import decided
from dualoptim.models.together import shared, stop_together, wait
from dualoptim.signals import held


def work(what: str) -> None:
    patience = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=3))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    wait(accelerator)
    own = 8 if accelerator.is_main_process else 0
    if what == "decided":
        decided(accelerator, lambda: time.sleep(own))
    elif what == "stop":
        with held():
            if not accelerator.is_main_process:
                signal.raise_signal(signal.SIGUSR1)
            stop_together(accelerator, "where it was")
    else:
        time.sleep(own)
        {"wait": wait, "shared": lambda one: shared(one, own), "hang": lambda one: one.reduce(torch.ones(1))}[what](accelerator)
    print("went on", flush=True)


if __name__ == "__main__":
    sys.argv, spec = sys.argv[:1], json.loads(sys.argv[1])
    main(UnlearnArgs, lambda _: work(spec["what"]))
