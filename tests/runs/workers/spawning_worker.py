"""Started by tests: one run, from a plain Python process or from processes that Accelerate's notebook launchers start.

usage: spawning_worker.py plain|notebook|spawn PROCESSES {UnlearnArgs fields}
"""

import json
import sys

from accelerate import debug_launcher, notebook_launcher

from dualoptim import UnlearnArgs, run


def work(args: UnlearnArgs) -> None:
    run(args)


if __name__ == "__main__":
    way, processes, fields = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    args = UnlearnArgs(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    if way == "plain":
        work(args)
    elif way == "notebook":
        notebook_launcher(work, (args,), num_processes=processes)
    else:
        debug_launcher(work, (args,), num_processes=processes)
