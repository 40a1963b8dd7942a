"""An event loop in a thread of its own, for code that is not asynchronous and calls from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


class Closed(RuntimeError):
    """Work for a loop that is closed; or that was closed while the work was under way."""


class LoopThread:
    """Runs coroutines for others until `close`.

    Parameters
    ----------
    name
        The thread's.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock, self._closing = threading.Lock(), False
        self._name = name
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; what it raises is raised here. When the caller is interrupted, `work` is cancelled.

        Raises
        ------
        Closed
            When `close` was called, before or meanwhile.
        """
        with self._lock:  # what is scheduled now comes before the end, which cancels it
            if self._closing:
                work.close()
                raise Closed(f"{self._name} is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise Closed(f"{self._name} was closed before this was done") from error
        finally:
            future.cancel()

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancel what still runs, do the `last` thing, and end the thread. Closing twice does no harm."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        asyncio.run_coroutine_threadsafe(_end(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end(last: Callable[[], Awaitable[None]]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await last()


async def each(items: Sequence[T], work: Callable[[T], Awaitable[Result]], at_once: int) -> list[Result]:
    """`work` on each item, the results in order, `at_once` at the same time; the first error ends them all."""
    left = iter(enumerate(items))
    results: dict[int, Result] = {}

    async def take_turns() -> None:
        for place, item in left:
            results[place] = await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(items))):
                group.create_task(take_turns())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[place] for place in range(len(items))]
