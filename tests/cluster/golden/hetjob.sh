#!/bin/bash

# Parameters
#SBATCH --comment='hpc_rl 2 grade'
#SBATCH --cpus-per-task=4
#SBATCH --dependency=afterany:51
#SBATCH --job-name=lewis-r02-grade-a1-abc123
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/grade/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH hetjob
#SBATCH --comment='hpc_rl 2 grade.listener'
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=1
#SBATCH --job-name=lewis-r02-grade.listener-a1-abc123
#SBATCH --mem=65536MB
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/runs/lewis/logs/round_02/grade.listener/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# beside it
(
module load cuda/12
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/grade.listener/%j_%t_log.out --het-group=1 --cpus-per-task=1 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/grade.listener/attempts/lewis-r02-grade.listener-a1-abc123.json
) &

# setup
umask go-w
export PYTHONPATH=/data/runs/lewis/code/c0de${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/runs/lewis/logs/round_02/grade/%j_%t_log.out --het-group=0 --cpus-per-task=4 /PYTHON -P -m hpc_rl.cluster.entry /data/runs/lewis/rounds/round_02/grade/attempts/lewis-r02-grade-a1-abc123.json
