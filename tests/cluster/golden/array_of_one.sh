#!/bin/bash

# Parameters
#SBATCH --comment='hpc_rl 2 sample'
#SBATCH --cpus-per-task=1
#SBATCH --job-name=lewis-r02-sample-a1-abc123
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/sample/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/sample/%j_%t_log.out --cpus-per-task=1 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/sample/attempts/lewis-r02-sample-a1-abc123.json
