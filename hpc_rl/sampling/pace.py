"""How long shards take here, and whether another one fits before the job must leave."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque

from hpc_rl.cluster.walltime import Deadline

log = logging.getLogger("hpc_rl")

SHARDS = 16
"""The last so many say how long the next one takes."""


class NeverFits(RuntimeError):
    """A job's whole time was too short for one shard; the message says what to change."""


class Pace:
    """The times of a task's shards, from claim to last sample, in seconds."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline, self._began = deadline, time.monotonic()
        self._took_s: deque[float] = deque(maxlen=SHARDS)
        self.time_is_up = False

    def finished(self, since: float) -> None:
        """A shard that was claimed at `since` (time.monotonic) has its last sample."""
        self._took_s.append(time.monotonic() - since)

    def usual_s(self) -> float:
        """How long a shard usually takes; infinite before the first one is finished."""
        return statistics.median(self._took_s) if self._took_s else math.inf

    def has_time(self) -> bool:
        """Whether another shard fits, as slow as the slowest of the last. Before the first one is finished: always."""
        if not self.time_is_up and self._took_s and self._deadline.left_s() < max(self._took_s):
            self.time_is_up = True
            log.info(
                "no further shard is claimed: one takes up to %.0f s here, and this job must leave in %.0f s",
                max(self._took_s),
                self._deadline.left_s(),
            )
        return not self.time_is_up

    def check_that_one_fits(self, oldest: float) -> None:
        """To be asked when told to leave, with the time (time.monotonic) of the oldest claim in hand.

        Raises
        ------
        NeverFits
            When the time is up, and half of it was not enough for a single shard: queued again, the job would not get
            further either.
        """
        if self._took_s or self._deadline.left_s() > 0:
            return
        now = time.monotonic()
        if now - oldest > (now - self._began) / 2:
            raise NeverFits(
                f"no shard was finished in the {now - oldest:.0f} s for which this job had one: lower "
                "sample.shard_size (raise sample.shards, in a recipe that has it), or raise the stage's time_min"
            )
