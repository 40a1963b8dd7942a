"""Requests on their way into an engine: handed over as their prompts are read, so that its batch stays full."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby, islice

from hpc_rl.engines.base import Completion, Engine, Request, Sampling

READ_AHEAD = 8
"""Prompts that are read beside the engine's loop at a time."""
FILL_S = 1.0
"""How long an engine without work may wait until its first batch is full."""
FILL_SHARE = 0.1
"""How long one that is not full may wait for more, as a share of its last step."""
POLL_S = 0.001

Waiting = tuple[str, Request, Sampling]
"""A request, by its key."""


class Feed:
    """An engine, and the requests that wait for it. One thread's.

    Parameters
    ----------
    engine
        Whose `submit`, `step` and `abort` are called here alone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Waiting] = deque()
        self._step_s = 0.0

    @property
    def capacity(self) -> int:
        """Requests that the engine samples at once."""
        return self._engine.capacity

    def __len__(self) -> int:
        return len(self._waiting) + self.submitted

    @property
    def submitted(self) -> int:
        """Requests that the engine has."""
        return self._engine.unfinished

    @property
    def fill_until(self) -> float:
        """Till when (time.monotonic) a batch that is not full may wait for more."""
        if not self.submitted:
            return time.monotonic() + FILL_S
        return time.monotonic() + (self._step_s * FILL_SHARE if self.submitted < self.capacity else 0.0)

    def append(self, requests: Iterable[Waiting]) -> None:
        """Requests that come after all others."""
        self._waiting.extend(requests)

    def push(self, requests: Iterable[Waiting]) -> None:
        """Requests that come before all others."""
        self._waiting.extendleft(reversed(list(requests)))

    def hand_over(self, until: float) -> Iterator[list[tuple[str, ValueError]]]:
        """Fill the engine's batch, and beyond it give it one prompt; only with prompts that are read.

        Others are waited for till `until` (time.monotonic), and for ever where the engine has nothing else to do.

        Yields
        ------
        list of (str, ValueError)
            After each prompt: those of its requests that the engine refuses.
        """
        while self._waiting:
            prompts = (next(alike) for _, alike in groupby((request.prompt for _, request, _ in self._waiting), id))
            read = self._engine.expect(list(islice(prompts, READ_AHEAD)))
            if not read and self._engine.unfinished:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return
                time.sleep(min(POLL_S, left_s))  # `submit` would wait for however long it takes
            for _ in range(read or not self._engine.unfinished):
                yield self._submit_next_prompt()
                if self._engine.unfinished >= self._engine.capacity:
                    return

    def step(self) -> list[tuple[str, Completion]]:
        """See `Engine.step`."""
        began = time.monotonic()
        finished = self._engine.step()
        self._step_s = time.monotonic() - began
        return finished

    def abort(self, keys: Collection[str]) -> None:
        """See `Engine.abort`; also what still waits."""
        self._waiting = deque(request for request in self._waiting if request[0] not in keys)
        self._engine.abort(keys)

    def _submit_next_prompt(self) -> list[tuple[str, ValueError]]:
        prompt, refused = self._waiting[0][1].prompt, []
        while self._waiting and self._waiting[0][1].prompt is prompt:
            key, request, sampling = self._waiting.popleft()
            try:
                self._engine.submit(key, request, sampling)
            except ValueError as error:
                refused.append((key, error))
        return refused
