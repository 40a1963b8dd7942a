"""Questions to Slurm, each one command for all jobs, with patience for a controller that is busy."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence

from hpc_rl.cluster.base import ExecutorError, Queued

_TRANSIENT = re.compile(
    r"Socket timed out|temporarily un(?:able|available)|Unable to contact slurm controller|Connection refused|"
    r"Resource temporarily unavailable|Transport endpoint|slurm_receive_msg|Zero Bytes were transmitted",
    re.IGNORECASE,
)


def clean_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for Slurm's commands: a job submitted from inside a job must not inherit that job's options.

    Slurm's commands read SLURM_*, SBATCH_*, SRUN_*, SCANCEL_* and SQUEUE_* as defaults (sbatch(1), INPUT ENVIRONMENT
    VARIABLES). SLURM_CONF stays: it says where the cluster is.
    """
    source = os.environ if environ is None else environ
    drop = re.compile(
        r"^(SLURM|SBATCH|SRUN|SALLOC|SCANCEL|SQUEUE|SUBMITIT)_|^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|HPC_RL_(JOB_ID|RESTART|ATTEMPT|NODELIST_HEAD|LEAVE_AT|STARTED))$"
    )
    return {name: value for name, value in source.items() if name == "SLURM_CONF" or not drop.match(name)}


def is_transient(message: str) -> bool:
    """True for errors of a controller that is overloaded or restarting: asking again later may help."""
    return bool(_TRANSIENT.search(message))


def ask(command: Sequence[str], patience_s: float = 60.0) -> str:
    """Standard output of a Slurm command, tried again with growing pauses while the controller does not answer.

    Raises
    ------
    ExecutorError
        When the command is not there, fails for good, or does not succeed within `patience_s`.
    """
    pause_s, deadline = 0.5, time.monotonic() + patience_s
    while True:
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env={**clean_environment(), "SLURM_BITSTR_LEN": "0"},  # array expressions in full (squeue(1))
                timeout=max(10.0, patience_s),
                check=False,
            )
        except FileNotFoundError as error:
            raise ExecutorError(f"{command[0]} is not on the PATH: this is no machine of a Slurm cluster") from error
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(command, 1, "", "Socket timed out (no answer at all)")
        if done.returncode == 0:
            return done.stdout
        message = (done.stderr or done.stdout).strip()
        if not is_transient(message) or time.monotonic() + pause_s > deadline:
            raise ExecutorError(f"`{' '.join(command[:6])}` failed: {message}")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 10.0)


def queued_jobs(names: Sequence[str], owner: int | None = None) -> list[Queued]:
    """What is in the queue under these job names: one squeue, one line per array element that has its own state.

    Waiting elements of an array come as one line; completed jobs are left out. The components of a heterogeneous job,
    `12+0` and `12+1`, have names of their own and the id of their job, `12`.

    Parameters
    ----------
    owner
        User id of whose jobs they are; None = ours.
    """
    if not names:
        return []
    wanted = set(names)
    user = os.getuid() if owner is None else owner
    # %i job id (`18_[0-3]` array elements, `12+1` component), %T state, %r reason, %N nodes, %j name: squeue(1)
    output = ask(["squeue", "--noheader", f"--user={user}", "--format=%i|%T|%r|%N|%j"])
    found = []
    for line in output.splitlines():
        parts = line.strip().split("|", 4)
        if len(parts) == 5 and parts[4] in wanted:
            shown, state, reason, node, name = parts
            job_id = re.sub(r"\+.*|[\[\]]", "", shown)
            found.append(Queued(name, job_id, state, reason, node, count_elements(job_id.partition("_")[2])))
    return found


def count_elements(indices: str) -> int:
    """Number of elements in an array expression as squeue writes it: `7`, `0-3`, `1,3,5-9:2%4` (sbatch(1), --array)."""
    count = 0
    for part in indices.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match:
            first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            count += (last - first) // step + 1
    return max(1, count)


def max_array_size() -> int:
    """The cluster's MaxArraySize; the largest index of an array is one less (slurm.conf(5))."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    return int(match[1]) if match else 1001


def partitions() -> set[str]:
    """Names of the partitions that this user may see."""
    return {
        line.strip().rstrip("*") for line in ask(["sinfo", "--noheader", "--format=%R"]).splitlines() if line.strip()
    }


def accounts() -> set[str] | None:
    """Accounts this user may charge; None where the cluster keeps no account associations to check against."""
    try:
        output = ask(
            [
                "sacctmgr",
                "--noheader",
                "--parsable2",
                "show",
                "associations",
                f"user={getpass.getuser()}",
                "format=account",
            ],
            patience_s=5.0,
        )
    except ExecutorError:
        return None
    return {line.strip() for line in output.splitlines() if line.strip()} or None
