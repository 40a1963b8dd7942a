"""Who am I among the ranks of this job: Slurm's environment variables turned into torch's. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping


def hosts(node_list: str) -> Iterator[str]:
    """The hosts of a Slurm node list (srun(1), SLURM_STEP_NODELIST): `gpu[03-04,9],cpu1` → gpu03, gpu04, gpu9, cpu1.

    A name may hold several ranges: `rack[1-2]node[3-4]`.
    """
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):  # at commas outside of brackets
        yield from _expanded(name)


def _expanded(name: str) -> Iterator[str]:
    head, _, rest = name.partition("[")
    ranges, bracket, tail = rest.partition("]")
    if not bracket:
        yield name
        return
    for numbers in ranges.split(","):
        first, _, last = numbers.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for end in _expanded(tail):
                yield f"{head}{number:0{len(first)}d}{end}"


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list; "" of an empty one."""
    return next(hosts(node_list), "")


def tasks_by_host(environ: Mapping[str, str]) -> dict[str, int]:
    """How many tasks of this job step each of its nodes has (SLURM_STEP_TASKS_PER_NODE, `2(x3),1`); {} outside of one.

    It says nothing of which: that is a matter of srun's --distribution.
    """
    names = hosts(environ.get("SLURM_STEP_NODELIST", ""))
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    return dict(zip(names, counts, strict=False))


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, HPC_RL_JOB_ID, HPC_RL_RESTART and HPC_RL_NODELIST_HEAD of us.

    Values that are set already win (torchrun, the local executor); outside of any job the process is rank 0 of 1.
    Ranks come from the *step* (srun), so a batch script's own shell, which is no rank, is rank 0 of 1 too.
    """
    get = environ.get
    in_step = get("SLURM_STEP_ID") not in (None, "", "4294967291") and "SLURM_PROCID" in environ
    array_job = get("SLURM_ARRAY_JOB_ID")
    job = f"{array_job}_{get('SLURM_ARRAY_TASK_ID')}" if array_job else get("SLURM_JOB_ID", "")
    found = {
        "RANK": get("SLURM_PROCID", "0") if in_step else "0",
        "WORLD_SIZE": get("SLURM_STEP_NUM_TASKS", get("SLURM_NTASKS", "1")) if in_step else "1",
        "LOCAL_RANK": get("SLURM_LOCALID", "0") if in_step else "0",
        "LOCAL_WORLD_SIZE": re.split(r"[,(]", get("SLURM_STEP_TASKS_PER_NODE", "1"))[0] if in_step else "1",
        "HPC_RL_JOB_ID": job,
        "HPC_RL_RESTART": get("SLURM_RESTART_COUNT", "0"),
        "HPC_RL_NODELIST_HEAD": first_host(get("SLURM_STEP_NODELIST", get("SLURM_JOB_NODELIST", ""))),
    }
    return {name: get(name) or value for name, value in found.items()}
