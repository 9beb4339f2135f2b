#!/usr/bin/env bash
# Unlearn on all GPUs of one node:  sbatch accelerate_configs/slurm/one_node.sh --preset tofu-llama2-7b --output-dir runs/llama2
# Two minutes before its time is over SLURM sends USR1, for which the run writes a checkpoint; the same with --resume goes on.
#SBATCH --job-name=unlearn
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
set -euo pipefail
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1  # without it the launcher dies of USR1 instead of passing it on
CONFIG=${CONFIG:-accelerate_configs/zero3.yaml}  # which shape: see README.md beside it
srun accelerate launch --config_file "$CONFIG" --num_processes "$SLURM_GPUS_ON_NODE" ${LAUNCH:-} train_unlearn.py "$@"
