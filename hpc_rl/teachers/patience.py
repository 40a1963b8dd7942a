"""How long a call is repeated: until there is an answer, until its tries are used up, or until the deadline."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.services.calling import ServiceUnavailable
from hpc_rl.services.circuit import JITTER
from hpc_rl.teachers.calls import Problem
from hpc_rl.teachers.pace import Pace

log = logging.getLogger(__name__)

T = TypeVar("T")
LONGEST_BACKOFF_S = 30.0


class Patience:
    """Repeats calls to one endpoint. For one event loop.

    Parameters
    ----------
    options
        Tries, back-off, deadline.
    pace
        Whose turn it is.
    rng
        Jitter.

    Attributes
    ----------
    calls, repeats
        How many were made, and how many of these again.
    """

    def __init__(self, options: TeacherClientConfig, pace: Pace, rng: random.Random) -> None:
        self._options, self._pace, self._rng = options, pace, rng
        self._last_answer = float("-inf")
        self._logged = ""
        self.calls = self.repeats = 0

    async def repeat(self, call: Callable[[], Awaitable[T | Problem]], tokens: float) -> T | Problem:
        """What a call gives in the end; the problem with it when that is final.

        A failure costs the call one of its tries. That nobody answers does so only where others were answered since
        its last try: otherwise it is the endpoint's fault, and not the question's, and is waited for.

        Parameters
        ----------
        call
            Makes the call once.
        tokens
            What it may cost.

        Raises
        ------
        ServiceUnavailable
            When the endpoint has answered nobody for `deadline_s`.
        """
        failures = problems = 0
        first = tried = float("inf")
        while True:
            async with self._pace.turn(tokens):
                others_were_answered, tried = self._last_answer > tried, time.monotonic()
                first = min(first, tried)
                self.calls += 1
                outcome = await call()
                if not isinstance(outcome, Problem):
                    self._last_answer, self._logged = time.monotonic(), ""
                    return outcome
                if outcome.kind == "refused":
                    return outcome
                failures += outcome.kind == "failed" or (outcome.kind == "gone" and others_were_answered)
                if failures > self._options.max_retries:
                    return Problem("failed", f"{outcome.text}; tried {failures} times")
                pause_s = self._pause_s(outcome, problems)
                problems += 1
                self._check_deadline(outcome, first, pause_s)
                if outcome.kind == "busy":
                    self._pace.slow_down(pause_s)
            if outcome.text != self._logged:
                log.warning("%s; asking again", outcome.text)
                self._logged = outcome.text
            if outcome.kind != "busy":
                await asyncio.sleep(pause_s)
            self.repeats += 1

    def _pause_s(self, outcome: Problem, before: int) -> float:
        """Wait before the next try: what the endpoint asked for, else longer each time; up to a quarter more."""
        backoff_s = min(LONGEST_BACKOFF_S, self._options.backoff_factor * 2.0 ** min(before, 30))
        wait_s = backoff_s if outcome.retry_after_s is None else outcome.retry_after_s
        return wait_s * (1 + JITTER * self._rng.random())

    def _check_deadline(self, outcome: Problem, first: float, pause_s: float) -> None:
        silent_s = time.monotonic() + pause_s - max(first, self._last_answer)
        if silent_s > self._options.deadline_s:
            raise ServiceUnavailable(
                f"no answer from the teacher within {self._options.deadline_s:g} s; last problem: {outcome.text}"
            )
