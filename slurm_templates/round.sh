#!/bin/bash
# Submits one round of a run as plain sbatch jobs, chained by dependencies, and prints their ids. Which stages the round
# has, and what each needs, it asks the run's recipe.
set -euo pipefail

usage="usage: slurm_templates/round.sh [OPTIONS] WORKSPACE ROUND [-- SBATCH OPTIONS]

  WORKSPACE            made by: python -m hpc_rl.launch CONFIG --workspace WORKSPACE --init
  ROUND                0 is the preparation, training begins at 1
  --tasks N            elements of the sampling array (default: what its script says)
  --after JOBID        begin when this job has ended: how rounds are chained. Several: JOBID:JOBID
  --dry-run            print the sbatch commands and submit nothing
  SBATCH OPTIONS       for every job, e.g. -- --account=abc123 --partition=gpu

PYTHON=/path/to/python names an interpreter that has hpc_rl, here on the login node, where \`python\` has not.
A stage is submitted with slurm_templates/STAGE.sbatch where you have made one, else with the script of its kind.
The jobs start one after the other whether or not the one before succeeded (afterany), and each first checks that its
inputs are there: after a failure, mend its cause and run this again: what is done is not done twice."

fail() {
    echo "round.sh: $1" >&2
    exit 64
}

tasks='' after='' dry_run='' arguments=() options=()
while (($#)); do
    case $1 in
    -h | --help) echo "$usage" && exit 0 ;;
    --tasks | --after) (($# > 1)) || fail "$1 needs a value" ;;&
    --tasks) tasks=$2 && shift ;;
    --after) after=$2 && shift ;;
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
[[ $after =~ ^[0-9]+(:[0-9]+)*$|^$ ]] || fail "--after must be a job's id, or several with colons between, not '$after'"
[[ -f $workspace/training_config.json ]] || fail "$workspace holds no run. Make one first:
  python -m hpc_rl.launch CONFIG --workspace $workspace --init"
[[ -n $dry_run ]] || command -v sbatch >/dev/null || fail "sbatch is not on the PATH: run this on a login node"
workspace=$(realpath "$workspace") round=$((10#$round))
cd "$(dirname "${BASH_SOURCE[0]}")/.."
plan=$("${PYTHON:-python}" -m hpc_rl.orchestrate.round_plan "$workspace" "$round") ||
    fail "the run does not say what round $round has (see above; PYTHON=/path/to/python names another interpreter)"

# sbatch would hand the settings of a job that we may be in ourselves on to the new one
for name in "${!SLURM_@}"; do
    [[ $name == SLURM_CONF ]] || unset "$name"
done

declare -A ids # stage → job id

# submit NAME TEMPLATE DEPENDENCY [SBATCH OPTION …]: sets ids[NAME]
submit() {
    local name=$1 template=$2 dependency=$3 logs id
    shift 3
    logs=$workspace/logs/$(printf 'round_%02d/%s' "$round" "$name")
    local command=(sbatch --parsable "--job-name=$name" "--output=$logs/sbatch-%j.out" "$@" "${options[@]}")
    [[ -z $dependency ]] || command+=("--dependency=$dependency")
    command+=("slurm_templates/$template.sbatch" "$workspace" "$round" "$name")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${command[@]}" && echo
        ids[$name]="ID_OF_$name"
        return
    fi
    mkdir -p "$logs" # Slurm does not make it, and a job that cannot open its log dies without a word
    id=$("${command[@]}") || fail "sbatch refused $name. The jobs above are submitted; scancel takes them back."
    ids[$name]=${id%%;*} # "id;cluster" at sites with several
    printf '%-20s %s\n' "$name" "${ids[$name]}"
}

# of KIND STAGES: the dependency "KIND:ID:ID" on stages with commas between, "-" being none
of() {
    local kind=$1 names name dependency=
    IFS=, read -ra names <<<"${2#-}"
    for name in "${names[@]}"; do
        dependency+=:${ids[$name]}
    done
    echo "${dependency:+$kind$dependency}"
}

begin_next=
while read -r name kind template needs started next; do
    ended=$(of afterany "$needs")
    [[ -n $ended ]] || ended=${after:+afterany:$after} # the first ones of the round
    started=$(of after "$started")
    [[ ! -f slurm_templates/$name.sbatch ]] || template=$name
    elements=()
    [[ $kind != sample || -z $tasks ]] || elements=("--array=0-$((tasks - 1))")
    submit "$name" "$template" "$ended${started:+${ended:+,}$started}" "${elements[@]}"
    [[ $next != next ]] || begin_next+=:${ids[$name]}
done <<<"$plan"
[[ -n $dry_run ]] || echo "
watch it:    squeue --me      ${PYTHON:-python} -m hpc_rl.status $workspace${begin_next:+
next round:  slurm_templates/round.sh --after ${begin_next#:} $workspace $((round + 1))}"
