"""Started by `accelerate launch` in tests: several runs in one launch, described by one JSON argument.

{"runs": [UnlearnArgs fields, ...], "sub_group_size": N or null}
"""

import json
import sys

from dualoptim import UnlearnArgs, run
from dualoptim.args import main
from dualoptim.modeling import start_accelerator


def work(spec: dict) -> None:
    runs = [UnlearnArgs(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}) for fields in spec["runs"]]
    accelerator = start_accelerator(runs[0])
    if spec.get("sub_group_size"):
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["sub_group_size"] = spec["sub_group_size"]
    for args in runs:
        run(args)
    print(
        f"process {accelerator.process_index} of {accelerator.num_processes}: {accelerator.distributed_type} done", flush=True
    )


if __name__ == "__main__":
    sys.argv, spec = sys.argv[:1], json.loads(sys.argv[1])
    main(UnlearnArgs, lambda _: work(spec))
