#!/bin/bash

# Parameters
#SBATCH --begin=now+91
#SBATCH --comment='hpc_rl 2 evaluate'
#SBATCH --cpus-per-task=1
#SBATCH --job-name=lewis-r02-evaluate-a1-abc123
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/evaluate/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/evaluate/%j_%t_log.out --cpus-per-task=1 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/evaluate/attempts/lewis-r02-evaluate-a1-abc123.json
