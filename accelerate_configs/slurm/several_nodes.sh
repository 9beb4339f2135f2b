#!/usr/bin/env bash
# Unlearn on all GPUs of several nodes:  sbatch accelerate_configs/slurm/several_nodes.sh --preset tofu-llama2-7b --output-dir runs/llama2
# The output folder must be one that all nodes see. One launcher a node starts a process for each of its GPUs.
#SBATCH --job-name=unlearn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
set -euo pipefail
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1  # without it the launcher dies of USR1 instead of passing it on
CONFIG=${CONFIG:-accelerate_configs/zero3.yaml}  # which shape: see README.md beside it
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # which reads all, so that nothing is cut off
export CONFIG MAIN
# srun gives each node its number, which is why the line is evaluated there
srun bash -c 'exec accelerate launch --config_file "$CONFIG" ${LAUNCH:-} \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
  --main_process_ip "$MAIN" --main_process_port "${PORT:-29500}" train_unlearn.py "$@"' launcher "$@"
