"""What a job asks of Slurm as it ends: to run it again, or not to start more like it. Standard library only."""

from __future__ import annotations

import subprocess
import time


def requeue(job_id: str) -> None:
    """Put this very job, or array element (never the bare array's id), back into the queue (scontrol(1), requeue)."""
    print(f"asking Slurm to run {job_id} again", flush=True)
    _tell("scontrol", "requeue", job_id)


def cancel_waiting(name: str) -> None:
    """Cancel elements of the array of this name that never started: the work has run out."""
    _tell("scancel", "--state=PENDING", f"--name={name}")


def _tell(*command: str) -> None:
    """A Slurm command, tried again while the controller does not answer.

    It never changes how the job ends: what it does not achieve, the next reconcile does.
    """
    for pause_s in (1, 5, 15, 0):
        try:
            done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
            if done.returncode == 0:
                return
            problem = done.stderr.strip()
        except (subprocess.TimeoutExpired, OSError) as error:
            problem = str(error)
        print(f"{' '.join(command)}: {problem}", flush=True)
        time.sleep(pause_s)
