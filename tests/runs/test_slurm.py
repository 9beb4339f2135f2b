"""The scripts for SLURM, with a stand-in for it that tells two processes to be two machines."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT

from dualoptim.signals import ASKING

SRUN = """#!/bin/sh
export SLURM_NNODES=$NODES SLURM_GPUS_ON_NODE=1 SLURM_PROCID=0
node=0
while [ $node -lt $NODES ]; do
  SLURM_NODEID=$node "$@" &
  workers="$workers $!"
  node=$((node + 1))
done
for worker in $workers; do wait $worker || code=$?; done
exit ${code:-0}
"""


@pytest.mark.parametrize("script", ["one_node", "several_nodes"])
def test_the_launcher_of_a_script_passes_every_signal_on_that_a_run_stops_at(script, tmp_path):
    for name, text in (("srun", "#!/bin/sh\necho $PET_SIGNALS_TO_HANDLE\n"), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    changes = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node1", "SLURM_GPUS_ON_NODE": "1"}
    line = ["bash", f"accelerate_configs/slurm/{script}.sh"]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, **changes}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().split(",") == [signum.name for signum in ASKING]


@pytest.mark.launch
@pytest.mark.parametrize(("script", "nodes"), [("one_node", 1), ("several_nodes", 2)])
def test_a_script_for_slurm_unlearns_on_every_node_that_it_is_given(script, nodes, taught, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\necho elsewhere\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {"PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    changes |= {"NODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1", "PORT": str(port)}
    changes |= {"CONFIG": "accelerate_configs/zero2.yaml", "LAUNCH": "--mixed_precision no", "OMP_NUM_THREADS": "1"}
    flags = ["--model", str(taught), "--data", "demo", "--no-eval", "--max-steps", "3", "--output-dir", str(tmp_path / "out")]
    line = ["bash", f"accelerate_configs/slurm/{script}.sh", *flags]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, **changes}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "out" / "ME+GD_lr1e-05" / "task1"
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((folder / "config.yaml").read_text())["processes"] == nodes
    assert done.stdout.count("model: ") == 1  # one machine speaks
