#!/bin/bash

# Parameters
#SBATCH --array=0-1%2
#SBATCH --comment='hpc_rl 2 grade'
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterany:51,after:52
#SBATCH --job-name=lewis-r02-grade-a1-abc123
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/grade/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/grade/%A_%a_%t_log.out --cpus-per-task=1 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/grade/attempts/lewis-r02-grade-a1-abc123.json
