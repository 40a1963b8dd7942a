"""A request on its way through the batcher, from the event loop that waits for it to the thread that runs the model."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hpc_rl.services.queue import Piece, Waiting

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, kw_only=True)
class Request(Waiting[Item], Generic[Item, Result]):
    """`unanswered` items have no result yet; one that failed gets none."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Result]]
    results: list[Any]
    unanswered: int
    failed: bool = False

    def finish(self, error: Exception | None = None) -> None:
        """Answer, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was stopped and nobody waits
            self.loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(self.results)


Batch = list[Piece[Request[Item, Result]]]


@dataclass
class Counters:
    """What a batcher has done so far; read for `/health`.

    Attributes
    ----------
    failed_batches
        In which the model failed, for all requests or for some.
    failed_in_a_row
        The last ones, in which it did nothing but fail.
    """

    requests: int = 0
    items: int = 0
    batches: int = 0
    refused: int = 0
    abandoned: int = 0
    failed_batches: int = 0
    failed_in_a_row: int = 0
    largest_batch: int = 0
    seconds_in_model: float = 0.0
