"""How fast an endpoint is asked: calls at once, calls and tokens a minute, and what a 429 says about all three.

A 429 stops all calls of the client until Retry-After, and halves how many may be under way at once; each answer makes
that a little more again (additive increase, multiplicative decrease: Chiu and Jain 1989).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SHORTEST_PAUSE_S = 0.1


class Bucket:
    """A token bucket: `per_minute` at most in any minute that follows a quiet one, refilled steadily.

    Parameters
    ----------
    per_minute
        None = no limit.
    burst
        What may be taken at once after a pause; more than that is allowed only to a single taker.
    """

    def __init__(self, per_minute: float | None, burst: float, now: float) -> None:
        self._rate = (per_minute or 0.0) / 60
        self._burst, self._level, self._at = burst, burst, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; what exceeds the burst may be taken from a full bucket."""
        if not self._rate:
            return 0.0
        self._refill(now)
        return max(0.0, (min(amount, self._burst) - self._level) / self._rate)

    def take(self, amount: float, now: float) -> None:
        """Take it, below zero if need be; a negative amount gives something back."""
        if self._rate:
            self._refill(now)
            self._level = min(self._burst, self._level - amount)

    def _refill(self, now: float) -> None:
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class Pace:
    """The limits of one client, for all of its calls. For one event loop.

    Parameters
    ----------
    parallel
        Most calls at once.
    requests_per_min, tokens_per_min
        None = no limit. A tenth of it (six seconds' worth) may be used at once.
    """

    def __init__(self, parallel: int, requests_per_min: float | None, tokens_per_min: float | None) -> None:
        now = time.monotonic()
        self._parallel = parallel
        self.allowed = float(parallel)
        self._requests = Bucket(requests_per_min, max(1.0, (requests_per_min or 0.0) / 10), now)
        self._tokens = Bucket(tokens_per_min, max(1.0, (tokens_per_min or 0.0) / 10), now)
        self._resume_at = 0.0
        self._under_way = 0
        self._queue = asyncio.Lock()  # whoever came first goes first
        self._one_left = asyncio.Event()

    @asynccontextmanager
    async def turn(self, tokens: float) -> AsyncIterator[None]:
        """Wait until one more call of about `tokens` may begin; the call is under way until the block ends."""
        async with self._queue:
            while True:
                now = time.monotonic()
                wait_s = max(self._resume_at - now, self._requests.wait_s(1, now), self._tokens.wait_s(tokens, now))
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                elif self._under_way + 1 > max(1.0, self.allowed):
                    self._one_left.clear()
                    await self._one_left.wait()
                else:
                    break
            self._requests.take(1, now)
            self._tokens.take(tokens, now)
            self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._one_left.set()

    def answered(self, expected_tokens: float, used_tokens: float) -> None:
        """A call was answered; what it did not use is given back."""
        self.allowed = min(float(self._parallel), self.allowed + 1 / self.allowed)
        self._tokens.take(used_tokens - expected_tokens, time.monotonic())

    def slow_down(self, pause_s: float) -> None:
        """The endpoint has had too much: nobody calls for so long. Seconds."""
        now = time.monotonic()
        if now >= self._resume_at:  # calls that were under way together are told so together: that is one fault
            self.allowed = max(1.0, min(self.allowed, self._under_way) / 2)
        self._resume_at = max(self._resume_at, now + max(SHORTEST_PAUSE_S, pause_s))
