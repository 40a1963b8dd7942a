#!/bin/bash
# Submits one round of the Lewis game as plain sbatch jobs, chained by dependencies, and prints their ids.
set -euo pipefail

usage="usage: slurm_templates/round.sh [OPTIONS] WORKSPACE ROUND [-- SBATCH OPTIONS]

  WORKSPACE            made by: python -m hpc_rl.launch CONFIG --workspace WORKSPACE --init
  ROUND                0: prepare, evaluate    1, 2, …: sample, grade, train, evaluate
  --tasks N            elements of the sampling array (default: what sample.sbatch says)
  --live               train.rollouts is live: the trainer samples by itself; no sample and grade
  --after JOBID        begin when this job has ended: how rounds are chained
  --dry-run            print the sbatch commands and submit nothing
  SBATCH OPTIONS       for every job, e.g. -- --account=abc123 --partition=gpu

The jobs start one after the other whether or not the one before succeeded (afterany), and each first checks that its
inputs are there: after a failure, mend its cause and run this again: what is done is not done twice."

fail() {
    echo "round.sh: $1" >&2
    exit 64
}

tasks='' live='' after='' dry_run='' arguments=() options=()
while (($#)); do
    case $1 in
    -h | --help) echo "$usage" && exit 0 ;;
    --tasks | --after) (($# > 1)) || fail "$1 needs a value" ;;&
    --tasks) tasks=$2 && shift ;;
    --after) after=$2 && shift ;;
    --live) live=yes ;;
    --dry-run) dry_run=yes ;;
    --) shift && options=("$@") && break ;;
    -*) fail "unknown option $1; sbatch's own options come after --" ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
((${#arguments[@]} == 2)) || fail "$usage"
workspace=${arguments[0]} round=${arguments[1]}
[[ $round =~ ^[0-9]+$ ]] || fail "ROUND must be a number, not '$round'"
[[ $tasks =~ ^[1-9][0-9]*$|^$ ]] || fail "--tasks must be a number from 1 on, not '$tasks'"
[[ -f $workspace/training_config.json ]] || fail "$workspace holds no run. Make one first:
  python -m hpc_rl.launch CONFIG --workspace $workspace --init"
[[ -n $dry_run ]] || command -v sbatch >/dev/null || fail "sbatch is not on the PATH: run this on a login node"
workspace=$(realpath "$workspace") round=$((10#$round))
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# sbatch would hand the settings of a job that we may be in ourselves on to the new one
for name in "${!SLURM_@}"; do
    [[ $name == SLURM_CONF ]] || unset "$name"
done

# submit NAME TEMPLATE DEPENDENCY [SBATCH OPTION …]: sets $id
submit() {
    local name=$1 template=$2 dependency=$3 logs
    shift 3
    logs=$workspace/logs/$(printf 'round_%02d/%s' "$round" "$name")
    local command=(sbatch --parsable "--job-name=$name" "--output=$logs/sbatch-%j.out" "$@" "${options[@]}")
    [[ -z $dependency ]] || command+=("--dependency=$dependency")
    command+=("slurm_templates/$template.sbatch" "$workspace" "$round")
    [[ $name != *.listener ]] || command+=("$name")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${command[@]}" && echo
        id="ID_OF_$name"
        return
    fi
    mkdir -p "$logs" # Slurm does not make it, and a job that cannot open its log dies without a word
    id=$("${command[@]}") || fail "sbatch refused $name. The jobs above are submitted; scancel takes them back."
    id=${id%%;*} # "id;cluster" at sites with several
    printf '%-20s %s\n' "$name" "$id"
}

begin=${after:+afterany:$after}
if ((round == 0)); then
    submit prepare prepare "$begin"
    begin=afterany:$id
else
    if [[ -z $live ]]; then
        submit sample sample "$begin" ${tasks:+"--array=0-$((tasks - 1))"}
        sample=$id
        submit grade.listener listener "afterany:$sample"
        submit grade grade "afterany:$sample,after:$id"
        submit train train "afterany:$id"
    else
        submit train.listener listener "$begin"
        submit train train "${begin:+$begin,}after:$id"
    fi
    begin=afterany:$id
fi
submit evaluate.listener listener "$begin"
submit evaluate evaluate "$begin,after:$id"
[[ -n $dry_run ]] || echo "
watch it:    squeue --me      python -m hpc_rl.status $workspace
next round:  slurm_templates/round.sh --after ${begin##*:} $workspace $((round + 1))"
