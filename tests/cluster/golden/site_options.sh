#!/bin/bash

# Parameters
#SBATCH --array=0-1%2
#SBATCH --comment='hpc_rl 2 sample'
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=1
#SBATCH --exclude=node14
#SBATCH --exclusive
#SBATCH --job-name=lewis-r02-sample-a1-abc123
#SBATCH --mail-type=FAIL
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/sample/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=60

# setup
module load cuda/12
source /opt/env/bin/activate
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/sample/%A_%a_%t_log.out --cpus-per-task=1 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/sample/attempts/lewis-r02-sample-a1-abc123.json
