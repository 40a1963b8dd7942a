"""Micro-batching: items of many requests, from any number of clients, merged into batches for the model (L4).

Requests wait in one bounded queue. A worker takes what is there, waits a few milliseconds for more if that does not
fill a batch, and runs the model; a request is answered when its last item is done, its items in its own order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

OnBatch = Callable[[int, float, bool], None]
"""Items, seconds, failed."""


class Overloaded(RuntimeError):
    """The queue is full, or the request waited too long for its turn; the client may try again later.

    Attributes
    ----------
    retry_after_s
        When there may be room. Seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientOverloaded(Overloaded):
    """One client has as many items waiting as one client may have."""


class ModelFailed(RuntimeError):
    """The model raised an error for a batch; the message is for the log and the client."""


@dataclass
class _Request(Generic[Result]):
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Result]]
    results: list[Result | None]
    left: int
    started: bool = False

    def finish(self, error: Exception | None = None) -> None:
        """Answer, from any thread."""
        if not self.loop.is_closed():  # else the server was stopped and nobody waits
            self.loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result([result for result in self.results if result is not None])


@dataclass(frozen=True)
class _Entry(Generic[Item, Result]):
    request: _Request[Result]
    index: int
    item: Item


@dataclass
class Counters:
    """What a batcher has done so far; read for `/health`."""

    requests: int = 0
    items: int = 0
    batches: int = 0
    refused: int = 0
    failed_batches: int = 0
    failed_in_a_row: int = 0
    largest_batch: int = 0
    seconds_in_model: float = 0.0


class Batcher(Generic[Item, Result]):
    """Merges requests into batches and runs them in threads of its own.

    Parameters
    ----------
    run
        The model: one result per item, in order. Called from worker threads, never with more than `batch_size` items.
    batch_size
        Most items in one batch.
    batch_wait_s
        How long a batch that is not full waits for more. Seconds.
    max_waiting
        Most items that may wait; a request that does not fit is refused as a whole.
    max_client_waiting
        Most items of one client that may wait; None = as many as may wait in all.
    workers
        Batches that run at once (INFERENCE_CONCURRENCY).
    on_batch
        Told after each batch: its items, the seconds it took, and whether it failed. Called from worker threads.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        batch_size: int,
        batch_wait_s: float,
        max_waiting: int,
        max_client_waiting: int | None = None,
        workers: int = 1,
        on_batch: OnBatch = lambda items, seconds, failed: None,
    ) -> None:
        self.on_batch = on_batch
        self._run, self._batch_size, self._batch_wait_s, self._max_waiting = run, batch_size, batch_wait_s, max_waiting
        self._queue: deque[_Entry[Item, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._running = 0
        self.counters = Counters()
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """True when nothing waits and nothing runs."""
        with self._changed:
            return not self._queue and not self._running

    async def submit(self, items: Sequence[Item], acquire_timeout_s: float, client: str = "") -> list[Result]:
        """The results of `items`, in order. Clients take turns.

        Raises
        ------
        Overloaded
            When the queue has no room for them, or none of them had its turn within `acquire_timeout_s`.
        ModelFailed
            When the model raised an error for a batch with one of them.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        request: _Request[Result] = _Request(loop, loop.create_future(), [None] * len(items), len(items))
        with self._changed:
            if self._closed or len(self._queue) + len(items) > self._max_waiting:
                self.counters.refused += 1
                raise Overloaded("leaving" if self._closed else f"{len(self._queue)} items wait already")
            self.counters.requests += 1
            self._queue.extend(_Entry(request, index, item) for index, item in enumerate(items))
            self._changed.notify_all()
        timer = loop.call_later(acquire_timeout_s, self._give_up, request, acquire_timeout_s)
        try:
            return await request.future
        finally:
            timer.cancel()
            if request.future.cancelled():
                self._drop(request)

    def close(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests, finish what waits, and end the workers; False when they did not end in time. Seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _give_up(self, request: _Request[Result], waited_s: float) -> None:
        with self._changed:
            if request.started:
                return
            self.counters.refused += 1
            self._drop(request)
        request.finish(Overloaded(f"no turn within {waited_s:g} s"))

    def _drop(self, request: _Request[Result]) -> None:
        with self._changed:
            self._queue = deque(entry for entry in self._queue if entry.request is not request)

    def _work(self) -> None:
        while batch := self._take():
            started = time.monotonic()
            error: Exception | None = None
            results: Sequence[Result] = ()
            try:
                results = self._run([entry.item for entry in batch])
                if len(results) != len(batch):
                    error = ModelFailed(f"{len(results)} results for {len(batch)} items")
            except Exception as caught:  # whatever the model raises is the answer to these requests
                log.exception("a batch of %d items failed", len(batch))
                error = ModelFailed(f"{type(caught).__name__}: {caught}")
            took_s = time.monotonic() - started
            self._deliver(batch, results, error, took_s)
            self.on_batch(len(batch), took_s, error is not None)

    def _take(self) -> list[_Entry[Item, Result]]:
        """The next batch; empty when the batcher is closed and the queue is empty."""
        with self._changed:
            while True:
                while not self._queue:
                    if self._closed:
                        return []
                    self._changed.wait()
                deadline = time.monotonic() + self._batch_wait_s
                while len(self._queue) < self._batch_size and not self._closed:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0 or not self._changed.wait(left_s):
                        break
                batch = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
                if batch:  # else another worker, or a client that gave up, emptied the queue while this one waited
                    for entry in batch:
                        entry.request.started = True
                    self._running += 1
                    return batch

    def _deliver(
        self, batch: Sequence[_Entry[Item, Result]], results: Sequence[Result], error: Exception | None, took_s: float
    ) -> None:
        finished: list[_Request[Result]] = []
        with self._changed:
            self._running -= 1
            self.counters.batches += 1
            self.counters.items += len(batch)
            self.counters.largest_batch = max(self.counters.largest_batch, len(batch))
            self.counters.seconds_in_model += took_s
            self.counters.failed_batches += error is not None
            self.counters.failed_in_a_row = self.counters.failed_in_a_row + 1 if error is not None else 0
            for place, entry in enumerate(batch):
                if error is None:
                    entry.request.results[entry.index] = results[place]
                    entry.request.left -= 1
                    if entry.request.left == 0:
                        finished.append(entry.request)
        if error is not None:
            for request in {id(entry.request): entry.request for entry in batch}.values():
                self._drop(request)
                request.finish(error)
        for request in finished:
            request.finish()
