"""Micro-batching: items of many requests, from any number of clients, merged into batches for the model (L4).

Requests wait in one bounded queue, in which clients take turns (`hpc_rl.services.queue`). A worker takes what is there,
waits a few milliseconds for more if that does not fill a batch, and runs the model; a request is answered when its last
item is done, its items in its own order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hpc_rl.services.queue import LEAST_RETRY_S, FairQueue, Pace
from hpc_rl.services.request import Batch, Counters, Request

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

    def __init__(self, message: str, retry_after_s: float = LEAST_RETRY_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClientOverloaded(Overloaded):
    """One client has as many items waiting as one client may have."""


class ModelFailed(RuntimeError):
    """The model raised an error for a request; the message is for the log and the client."""


Outcome = tuple[Batch[Item, Result], Sequence[Result] | ModelFailed]
"""A part of a batch, and what the model made of it."""


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
        Told after each batch: its items, the seconds it took, and whether the model failed. Called from worker threads.
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
        self._run, self._batch_size, self._batch_wait_s = run, batch_size, batch_wait_s
        self.on_batch = on_batch
        self._queue: FairQueue[Request[Item, Result]] = FairQueue(max_waiting, max_client_waiting or max_waiting)
        self._pace = Pace()
        self._changed = threading.Condition()
        self._closed = False
        self.counters = Counters()
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return self._queue.items

    @property
    def waiting_clients(self) -> int:
        """Clients that have items in the queue."""
        return self._queue.clients

    @property
    def full(self) -> bool:
        """True when not one item more has room."""
        return self._queue.excess(1) > 0

    def seconds_for(self, items: int) -> float:
        """How long the model needs for so many items, as fast as it was lately; between 1 and 60 seconds."""
        return self._pace.seconds_for(items / len(self._threads))

    async def submit(self, items: Sequence[Item], acquire_timeout_s: float, client: str = "") -> list[Result]:
        """The results of `items`, in order. Cancelling it frees the place of those that the model has not begun.

        Parameters
        ----------
        items
            What to run the model on.
        acquire_timeout_s
            Longest wait until the model begins the first of them.
        client
            Who asks: clients take turns.

        Raises
        ------
        Overloaded
            When the queue has no room for them, or none of them had its turn within `acquire_timeout_s`.
        ClientOverloaded
            When the client has too many waiting.
        ModelFailed
            When the model raised an error for some of them.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        request: Request[Item, Result] = Request(
            client=client,
            items=items,
            loop=loop,
            future=loop.create_future(),
            results=[None] * len(items),
            unanswered=len(items),
        )
        self._enqueue(request)
        timer = loop.call_later(acquire_timeout_s, self._give_up, request, acquire_timeout_s)
        try:
            return await request.future
        except asyncio.CancelledError:
            with self._changed:
                self.counters.abandoned += 1
                self._queue.drop(request)
            raise
        finally:
            timer.cancel()

    def close(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests, finish what waits, and end the workers; False when they did not end in time. Seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _enqueue(self, request: Request[Item, Result]) -> None:
        with self._changed:
            if (refusal := self._refusal(request.client, request.left)) is not None:
                self.counters.refused += 1
                raise refusal
            self.counters.requests += 1
            self._queue.add(request)
            self._changed.notify_all()

    def _refusal(self, client: str, items: int) -> Overloaded | None:
        queue = self._queue
        if self._closed:
            return Overloaded("leaving")
        if (excess := queue.excess(items)) > 0:
            return Overloaded(f"{queue.items} items wait already", self.seconds_for(excess))
        if (excess := queue.client_excess(client, items)) > 0:
            turns = excess * queue.clients  # the others have theirs in between
            return ClientOverloaded(f"{queue.of(client)} items of this client wait already", self.seconds_for(turns))
        return None

    def _give_up(self, request: Request[Item, Result], waited_s: float) -> None:
        with self._changed:
            if request.taken:
                return
            self.counters.refused += 1
            retry_s = self.seconds_for(self._queue.items)
            self._queue.drop(request)
        request.finish(Overloaded(f"no turn within {waited_s:g} s", retry_s))

    def _work(self) -> None:
        while batch := self._take():
            items = sum(piece.stop - piece.start for piece in batch)
            started = time.monotonic()
            failures, found = self._run_in_parts(batch)
            took_s = time.monotonic() - started
            in_vain = failures > 0 and all(isinstance(results, ModelFailed) for _, results in found)
            self._count(items, took_s, failures > 0, in_vain)
            for part, results in found:
                self._fail(part, results) if isinstance(results, ModelFailed) else self._deliver(part, results)
            self.on_batch(items, took_s, failures > 0)

    def _run_in_parts(self, batch: Batch[Item, Result]) -> tuple[int, list[Outcome[Item, Result]]]:
        """Run the model: how often it failed, and its results, or its failure, for each part of the batch.

        A batch that fails is run again in halves: one bad request fails alone, and two do. More are not looked for, so
        that a model that always fails does so some 3 log₂ n times, not 2 n times.
        """
        failures, parts = 0, [batch]
        found: list[Outcome[Item, Result]] = []
        while parts:
            part = [piece for piece in parts.pop() if not piece.request.failed]
            if not part:
                continue
            items = [item for piece in part for item in piece.request.items[piece.start : piece.stop]]
            try:
                results = self._run(items)
                if len(results) != len(items):
                    raise ModelFailed(f"{len(results)} results for {len(items)} items")
            except Exception as caught:  # whatever the model raises is the answer to these requests
                failures += 1
                log.warning("the model failed at %d items: %s", len(items), caught, exc_info=failures == 1)
                if len(part) > 1 and failures < 2 * len(batch).bit_length():
                    parts += [part[len(part) // 2 :], part[: len(part) // 2]]
                else:
                    found.append((part, ModelFailed(f"{type(caught).__name__}: {caught}")))
                    for piece in part:
                        piece.request.failed = True
            else:
                found.append((part, results))
        return failures, found

    def _take(self) -> Batch[Item, Result]:
        """The next batch; empty when the batcher is closed and the queue is empty."""
        with self._changed:
            while True:
                while not self._queue.items:
                    if self._closed:
                        return []
                    self._changed.wait()
                deadline = time.monotonic() + self._batch_wait_s
                while self._queue.items < self._batch_size and not self._closed:
                    left_s = deadline - time.monotonic()
                    if left_s <= 0 or not self._changed.wait(left_s):
                        break
                batch = self._queue.take(self._batch_size)
                if batch:  # else another worker, or a client that gave up, emptied the queue
                    return batch

    def _count(self, items: int, took_s: float, failed: bool, in_vain: bool) -> None:
        with self._changed:
            self._pace.took(items, took_s)
            self.counters.batches += 1
            self.counters.items += items
            self.counters.largest_batch = max(self.counters.largest_batch, items)
            self.counters.seconds_in_model += took_s
            self.counters.failed_batches += failed
            self.counters.failed_in_a_row = self.counters.failed_in_a_row + 1 if in_vain else 0

    def _deliver(self, batch: Batch[Item, Result], results: Sequence[Result]) -> None:
        begin = 0
        for piece in batch:
            count = piece.stop - piece.start
            with self._changed:  # another worker may hold other items of the same request
                piece.request.results[piece.start : piece.stop] = results[begin : begin + count]
                piece.request.unanswered -= count
            begin += count
            if not piece.request.unanswered:
                piece.request.finish()

    def _fail(self, batch: Batch[Item, Result], error: Exception) -> None:
        for request in {id(piece.request): piece.request for piece in batch}.values():
            with self._changed:
                self._queue.drop(request)
            request.finish(error)
