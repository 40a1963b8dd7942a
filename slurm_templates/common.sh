# shellcheck shell=bash
# Sourced by every template: arguments, log file, and what to do when Slurm asks the job to leave. Nothing to edit here.
# No `set -eu`: what people source in a template (module, conda) often does not survive it.

# begin TEMPLATE DEFAULT WORKSPACE ROUND [STAGE]: checks the arguments of a template, sets WORKSPACE, ROUND and STAGE
# (DEFAULT if none is given), and sends all further output to WORKSPACE/logs/round_RR/STAGE/JOBID-RESTART.out, beside the
# logs of jobs that hpc_rl.launch submits.
begin() {
    STAGE=${5:-$2}
    WORKSPACE=${3:-${WORKSPACE:-}}
    ROUND=${4:-${ROUND:-}}
    [[ -n $WORKSPACE && $ROUND =~ ^[0-9]+$ && -n $STAGE ]] || fail "usage: sbatch slurm_templates/$1.sbatch WORKSPACE ROUND ${2:+[}STAGE${2:+]}
  WORKSPACE  the run's folder, on storage that all nodes share   (got: '$WORKSPACE')
  ROUND      a number: 0 is the preparation, training begins at 1 (got: '$ROUND')
  STAGE      of the run's recipe, with what this script asks for  (got: '$STAGE')
The first two may also be environment variables of these names."
    [[ -f $WORKSPACE/training_config.json ]] || fail "$WORKSPACE holds no run. Make one first:
  python -m hpc_rl.launch CONFIG --workspace $WORKSPACE --init"
    WORKSPACE=$(realpath "$WORKSPACE") # a container may start in another folder
    ROUND=$((10#$ROUND))
    local folder
    umask "$(printf '%04o' $(($(umask) | 022)))" # others do not write to what hpc_rl.launch may run one day
    folder=$WORKSPACE/logs/$(printf 'round_%02d/%s' "$ROUND" "$STAGE")
    LOG=$folder/$(own_id)-${SLURM_RESTART_COUNT:-0}.out
    mkdir -p "$folder" || fail "$WORKSPACE is not writable on $(hostname)"
    echo "$STAGE of round $ROUND runs on $(hostname); its log: $LOG"
    exec >>"$LOG" 2>&1
    export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    # one node's threads are shared by its ranks; libraries would take all of them for each
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
    echo "$(date '+%F %T') $STAGE, round $ROUND, on ${SLURM_JOB_NODELIST:-$(hostname)}"
}

# ended STATUS: the last word of a job whose step did not succeed.
# A step that leaves at the SIGTERM of a preemption ends its job as FAILED, before Slurm gets to requeue it (it would at
# the end of the partition's GraceTime): so the job asks for it. scancel and the time limit end this shell too: they
# never get here. A step that ends with 124 left by itself, because what is left does not fit before the time limit.
# Where one of several tasks fails srun ends the others with SIGTERM, and its own status is the highest of all: what the
# first task ended with counts.
ended() {
    local status
    status=$(sed -nE 's/^srun: error: .*: Exited with exit code ([0-9]+)$/\1/p' "$LOG" | head -n 1)
    status=${status:-$1}
    echo "$(date '+%F %T') the step ended with status $status"
    if (((status == 143 || status == 124) && ${SLURM_RESTART_COUNT:-0} < 20)); then
        # of an array only this element: its bare job id can mean the whole array
        scontrol requeue "$(own_id)" && sleep 60 # until Slurm ends this attempt
    fi
    ((status == 75)) && echo "blocked: what it needs is not there (yet). See the line above, then submit it again."
    exit "$status"
}

# end_time: when the job's time limit strikes, in seconds since the epoch; nothing where there is none, or none is known.
# Older Slurms do not tell the job: they are asked, once.
end_time() {
    local ends=${SLURM_JOB_END_TIME:-}
    if [[ -z $ends ]]; then
        # of an array only this element: the bare job id of one of them is that of the whole array
        ends=$(squeue --noheader --job="$(own_id)" --format=%e | head -n 1)
        if [[ $ends == [0-9]* ]]; then
            ends=$(date --date="$ends" +%s)
        else
            echo "no time limit is known (squeue says '$ends'): what is under way if one strikes is done again" >&2
            ends=
        fi
    fi
    echo "$ends"
}

own_id() {
    echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
}

fail() {
    echo "$1" >&2
    exit 64
}
