#!/bin/bash

# Parameters
#SBATCH --comment='hpc_rl 2 train'
#SBATCH --cpus-per-task=2
#SBATCH --job-name=lewis-r02-train-a1-abc123
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/train/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/train/%j_%t_log.out --cpus-per-task=2 --kill-on-bad-exit=1 --wait=0 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/train/attempts/lewis-r02-train-a1-abc123.json
