"""What waits for the engine and what it has: prompts are handed over as they are read, completions come back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby, islice

from hpc_rl.engines.base import Completion, Engine, EngineFailed, Prompt, Request, Sampling
from hpc_rl.sampling.at_work import AtWork, Origin
from hpc_rl.sampling.tasks import Attempt

READ_AHEAD = 8
"""Prompts that are read before there is room for them."""


class Batch:
    """The requests of all shards at work. Where they are more than the engine samples at once, it is busy.

    Parameters
    ----------
    open_engine
        Starts what samples.
    origin, sampling
        What their seeds are derived from, and how all are sampled.
    """

    def __init__(self, open_engine: Callable[[], Engine], origin: Origin, sampling: Sampling) -> None:
        self._open, self._origin, self._sampling = open_engine, origin, sampling
        self._engine: Engine | None = None
        self._waiting: deque[tuple[AtWork, Attempt]] = deque()
        self._flying: dict[str, tuple[AtWork, Attempt]] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._flying)

    @property
    def flying(self) -> int:
        """Requests that the engine has."""
        return len(self._flying)

    @property
    def is_open(self) -> bool:
        """True once the engine is there."""
        return self._engine is not None

    @property
    def capacity(self) -> int:
        """Requests that the engine samples at once; 0 before it is there."""
        return 0 if self._engine is None else self._engine.capacity

    def open(self) -> None:
        """Start the engine."""
        assert self._engine is None
        self._engine = self._open()

    def add(self, work: AtWork, attempts: Iterable[Attempt]) -> None:
        """The first attempts of a shard, to be drawn after those of the others."""
        self._waiting.extend((work, attempt) for attempt in attempts)

    def add_retries(self, work: AtWork, attempts: Iterable[Attempt]) -> None:
        """Attempts that others have called for, to be drawn next: their shard is under way."""
        self._waiting.extendleft(reversed([(work, attempt) for attempt in attempts]))

    def hand_over(self, until: float) -> None:
        """Fill the engine's batch with prompts that are read; beyond it, one prompt.

        A prompt that is not yet read is waited for where the engine has nothing else to do, and before `until`
        (time.monotonic).

        Raises
        ------
        ValueError
            When the engine refuses a prompt; names its row.
        """
        while self._waiting:
            assert self._engine is not None
            read = self._engine.expect(self._next_prompts())
            for place in range(max(1, read)):
                if place >= read and self._flying and time.monotonic() >= until:
                    return
                self._submit_next_prompt()
                if len(self._flying) >= self._engine.capacity:
                    return

    def step(self) -> list[tuple[AtWork, Attempt, Completion]]:
        """One step of the engine; what has finished.

        Raises
        ------
        ValueError, EngineFailed
            When the engine refuses a prompt only now, or dies of it; names its row.
        """
        assert self._engine is not None and self._engine.unfinished, "the engine has lost requests"
        try:
            finished = self._engine.step()
        except (ValueError, EngineFailed) as error:  # of a pool, which hears of it only now
            if getattr(error, "key", None) not in self._flying:
                raise
            kind = ValueError if isinstance(error, ValueError) else EngineFailed
            raise kind(_of_row(self._flying[error.key][1], error)) from error  # type: ignore[union-attr]
        return [(*self._flying.pop(key), completion) for key, completion in finished]

    def drop(self, work: AtWork) -> None:
        """A shard that is not to be sampled any more."""
        if self._engine is not None:
            self._engine.abort(list(work.in_flight))
        for key in work.in_flight:
            del self._flying[key]
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not work)

    def _next_prompts(self) -> list[Prompt]:
        prompts = (next(of_one)[1].task.prompt for _, of_one in groupby(self._waiting, lambda entry: entry[1].task.id))
        return list(islice(prompts, READ_AHEAD))

    def _submit_next_prompt(self) -> None:
        """All attempts at the first task that waits."""
        assert self._engine is not None
        task = self._waiting[0][1].task
        while self._waiting and self._waiting[0][1].task.id == task.id:
            work, attempt = self._waiting.popleft()
            key, seed = work.key(attempt), attempt.seed(self._origin.run_seed, self._origin.round)
            try:
                self._engine.submit(key, Request(task.prompt, seed), self._sampling)
            except ValueError as error:
                raise ValueError(_of_row(attempt, error)) from error
            work.in_flight[key] = attempt
            self._flying[key] = work, attempt


def _of_row(attempt: Attempt, error: Exception) -> str:
    return f"row {attempt.task.row_id}, role {attempt.task.role}: {error}"
