"""When a job must have left: its time limit, less the warning before it. Standard library only."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

LEAVE_AT = "HPC_RL_LEAVE_AT"
"""Variable in which the entry process hands it to the body: seconds since the epoch."""

END_TIME = "SLURM_JOB_END_TIME"
"""When the limit strikes, seconds since the epoch, where Slurm says so (22.05 does not: searched in its binaries)."""


@dataclass(frozen=True)
class Deadline:
    """The moment from which a job may be told to leave; None where there is no limit (outside of Slurm)."""

    leave_at: float | None = None

    def left_s(self) -> float:
        """Seconds until then; infinite without a limit."""
        return math.inf if self.leave_at is None else self.leave_at - time.time()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Deadline:
        """Of a job body: what its entry process says, else Slurm itself (jobs from the sbatch templates)."""
        value = environment.get(LEAVE_AT) or environment.get(END_TIME)
        return cls(float(value) if value else None)


def leave_at(environment: Mapping[str, str], started: float, limit_s: float, warning_s: float) -> float:
    """When a job is told to leave, in seconds since the epoch.

    Parameters
    ----------
    environment
        The job's.
    started
        When its first process began: later than the job by prologs and set-up, so without `SLURM_JOB_END_TIME` the
        answer is late by as much. The warning is longer than that.
    limit_s
        Its time limit.
    warning_s
        How long before the limit the signal may come.
    """
    ends = environment.get(END_TIME)
    return (float(ends) if ends else started + limit_s) - warning_s
