"""The requests of all shards at work, on the engine that samples them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from hpc_rl.engines.base import Completion, Engine, EngineFailed, Request, Sampling
from hpc_rl.engines.feed import Feed, Waiting
from hpc_rl.sampling.at_work import AtWork, Origin
from hpc_rl.sampling.tasks import Attempt


class Batch:
    """What is asked of the engine, by shard and attempt. It begins without an engine.

    Parameters
    ----------
    origin, sampling
        What seeds are derived from, and how all are sampled.
    """

    def __init__(self, origin: Origin, sampling: Sampling) -> None:
        self._origin, self._sampling = origin, sampling
        self._feed: Feed | None = None
        self._asked: dict[str, tuple[AtWork, Attempt]] = {}
        self._early: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def is_open(self) -> bool:
        """True once there is an engine."""
        return self._feed is not None

    @property
    def capacity(self) -> int:
        """Requests that the engine samples at once; 0 before there is one."""
        return 0 if self._feed is None else self._feed.capacity

    @property
    def submitted(self) -> int:
        """Requests that the engine has."""
        return 0 if self._feed is None else self._feed.submitted

    @property
    def fill_until(self) -> float:
        """See `Feed.fill_until`; at once before there is an engine."""
        return time.monotonic() if self._feed is None else self._feed.fill_until

    def open(self, engine: Engine) -> None:
        """Sample with this engine from now on."""
        assert self._feed is None
        self._feed = Feed(engine)
        self._feed.append(self._early)

    def append(self, work: AtWork, attempts: Iterable[Attempt]) -> None:
        """The first attempts of a shard, to be drawn after those of the others."""
        requests = [self._ask(work, attempt) for attempt in attempts]
        if self._feed is None:
            self._early += requests
        else:
            self._feed.append(requests)

    def push(self, work: AtWork, attempts: Iterable[Attempt]) -> None:
        """Attempts that others have called for, to be drawn next: their shard is under way."""
        assert self._feed is not None
        self._feed.push([self._ask(work, attempt) for attempt in attempts])

    def hand_over(self, until: float) -> None:
        """See `Feed.hand_over`.

        Raises
        ------
        ValueError
            When the engine refuses a prompt; names its row.
        """
        assert self._feed is not None
        for refused in self._feed.hand_over(until):
            for key, error in refused:
                raise ValueError(self._of_row(key, error)) from error

    def step(self) -> list[tuple[AtWork, Attempt, Completion]]:
        """One step of the engine; what has finished.

        Raises
        ------
        ValueError, EngineFailed
            When the engine refuses a prompt only now, or dies of it; names its row.
        """
        assert self._feed is not None and self._feed.submitted, "the engine has lost requests"
        try:
            finished = self._feed.step()
        except (ValueError, EngineFailed) as error:  # of a pool, which hears of it only now
            key = getattr(error, "key", None)
            if key not in self._asked:
                raise
            kind = ValueError if isinstance(error, ValueError) else EngineFailed
            raise kind(self._of_row(key, error)) from error
        found = []
        for key, completion in finished:
            work, attempt = self._asked.pop(key)
            work.in_hand.remove(key)
            found.append((work, attempt, completion))
        return found

    def drop(self, work: AtWork) -> None:
        """A shard that is not to be sampled any more."""
        if self._feed is None:
            self._early = [request for request in self._early if request[0] not in work.in_hand]
        else:
            self._feed.abort(work.in_hand)
        for key in work.in_hand:
            del self._asked[key]
        work.in_hand.clear()

    def _ask(self, work: AtWork, attempt: Attempt) -> Waiting:
        key = work.key(attempt)
        work.in_hand.add(key)
        self._asked[key] = work, attempt
        seed = attempt.seed(self._origin.run_seed, self._origin.round)
        return key, Request(attempt.task.prompt, seed), self._sampling

    def _of_row(self, key: str, error: Exception) -> str:
        _, attempt = self._asked[key]
        return f"row {attempt.task.row_id}, role {attempt.task.role}: {error}"
