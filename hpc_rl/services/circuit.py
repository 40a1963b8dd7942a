"""Whether a server is to be called: a circuit breaker per replica.

    half-open ──who are you?── answered ──→ closed ──calls fail── 3 in a row ──→ open
        ↑  └────── not answered ──────────────────────────────────────────────────↑ │
        └────────────────────────── the rest is over ───────────────────────────────┘

A replica that was just found is half-open: it takes no call before it has said who it is. So is one whose connection
broke, since its port may belong to somebody else by now, and one that did not answer in time: it may be frozen. Each
rest is twice as long as the one before, until a call succeeds, and a little longer by chance, so that many clients do
not come back at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

FAILURES_TO_OPEN = 3
FIRST_REST_S = 0.5
LONGEST_REST_S = 10.0
JITTER = 0.25

State = Literal["closed", "open", "half-open"]


class Circuit:
    """What a client has learned of one server.

    Parameters
    ----------
    rng
        Spreads the rests.
    clock
        Seconds, monotonic.
    """

    def __init__(self, rng: random.Random, clock: Callable[[], float] = time.monotonic) -> None:
        self._rng, self._clock = rng, clock
        self._proven = False
        self._rests_until = float("-inf")
        self.failures = 0

    def state(self) -> State:
        """closed: it takes calls. open: it is left alone. half-open: it is to be asked who it is."""
        if self._clock() < self._rests_until:
            return "open"
        return "closed" if self._proven else "half-open"

    def proved(self) -> None:
        """It said that it is the server that was published."""
        self._proven = True

    def answered(self) -> None:
        """A call succeeded."""
        self.failures = 0

    def failed(self) -> None:
        """A call was answered with a failure."""
        self.failures += 1
        if self.failures >= FAILURES_TO_OPEN:
            self._open()

    def lost(self) -> None:
        """A call was not answered: its connection broke, or its time was over."""
        self._proven = False
        self.failed()

    def silent(self) -> None:
        """It did not say who it is, or it is somebody else."""
        self.failures = max(self.failures, FAILURES_TO_OPEN - 1)
        self.failed()

    def rest(self, seconds: float) -> None:
        """It asked to be left alone for so long (Retry-After)."""
        self._rests_until = max(self._rests_until, self._clock() + self._spread(seconds))

    def _open(self) -> None:
        self._proven = False
        self.rest(min(LONGEST_REST_S, FIRST_REST_S * 2.0 ** (self.failures - FAILURES_TO_OPEN)))

    def _spread(self, seconds: float) -> float:
        return seconds * (1 + JITTER * self._rng.random())
