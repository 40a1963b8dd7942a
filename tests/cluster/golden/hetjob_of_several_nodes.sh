#!/bin/bash

# Parameters
#SBATCH --account=proj42
#SBATCH --comment='hpc_rl 2 train'
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=6
#SBATCH --exclude=node13
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=lewis-r02-train-a1-abc123
#SBATCH --mail-type=FAIL
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/train/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=60
#SBATCH hetjob
#SBATCH --comment='hpc_rl 2 grade.listener'
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=1
#SBATCH --job-name=lewis-r02-grade.listener-a1-abc123
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/grade.listener/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH --exclude=

# beside it
(
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/grade.listener/%j_%t_log.out --het-group=1 --cpus-per-task=1 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/grade.listener/attempts/lewis-r02-grade.listener-a1-abc123.json
) &

# setup
module load cuda/12
source /opt/env/bin/activate
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/train/%j_%t_log.out --het-group=0 --cpus-per-task=6 --kill-on-bad-exit=1 --wait=0 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/train/attempts/lewis-r02-train-a1-abc123.json
