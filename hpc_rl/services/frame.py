"""What a service brings to the frame, and what the frame gives to its routes.

    server (who may ask, how much) → routes of the service → Desk (items, fairness, refusals) → batcher → model

A service is a page: its routes, its model, and `open_service`, which loads it. The rest is the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, HTTPException, Request

from hpc_rl.config.services import ServiceConfig
from hpc_rl.services.batching import Batcher, ClientOverloaded, ModelFailed, Overloaded
from hpc_rl.services.queue import MOST_RETRY_S
from hpc_rl.services.wire import CLIENT_HEADER, TIMEOUT_HEADER

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_CLIENT_CHARACTERS = 64
UNREADY_FAILURES = 2
SHARE_TO_WAIT = 0.5
"""Of a client's time limit: how much of it may pass before the model begins; the rest is for the answer."""


class CannotServe(ValueError):
    """A service that cannot be opened as it was asked for; the message says what to change."""


@dataclass
class TokenCounts:
    """Tokens that a service's model has read and written, padding aside. Added up by the thread that runs the model."""

    prompt: int = 0
    completion: int = 0


@dataclass(frozen=True)
class Service:
    """What is served.

    Attributes
    ----------
    name
        `listener`: also its folder in the workspace.
    app, batcher
        Its routes, and what runs its model.
    weights_hash
        Which weights it serves.
    about
        Facts for `/health`: the model's folder, the engine.
    tokens
        What its model has read and written so far; whoever runs the model adds to it.
    details
        Figures of its own, for those who have the token. `{"hits": …, "misses": …}` is a cache to `/metrics`.
    close
        Ends its model's threads and processes; called when nobody asks any more.
    """

    name: str
    app: FastAPI
    batcher: Batcher[Any, Any]
    weights_hash: str
    about: Mapping[str, Any] = field(default_factory=dict)
    tokens: TokenCounts = field(default_factory=TokenCounts)
    details: Callable[[], Mapping[str, Any]] = dict
    close: Callable[[], None] = lambda: None

    def problem(self) -> tuple[str, float] | None:
        """Why it is of no use to ask now, and after how many seconds to ask again; None when it is ready."""
        failures = self.batcher.counters.failed_in_a_row
        if failures >= UNREADY_FAILURES:
            return f"the model failed {failures} times in a row", MOST_RETRY_S
        return ("the queue is full", self.batcher.seconds_for(1)) if self.batcher.full else None

    def describe(self) -> dict[str, Any]:
        """What `/health` tells those who have the token."""
        counters = {name: round(value, 3) for name, value in asdict(self.batcher.counters).items()}
        return {
            "service": self.name,
            **self.about,
            "weights_hash": self.weights_hash,
            "waiting_items": self.batcher.waiting,
            "counters": counters,
            **self.details(),
        }


class Desk(Generic[Item, Result]):
    """Where routes hand in items and get results, or the HTTP error that says why not.

    Parameters
    ----------
    run
        The model: one result per item, in order, never for more than `options.batch_size` items.
    options
        Batches, limits, waiting.
    workers
        Batches at once; None = `options.inference_concurrency`. Engines that run one batch at a time say 1.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Sequence[Result]], options: ServiceConfig, workers: int | None = None
    ) -> None:
        self._options = options
        self.batcher: Batcher[Item, Result] = Batcher(
            run,
            batch_size=options.batch_size,
            batch_wait_s=options.batch_wait_ms / 1000,
            max_waiting=options.max_queue_items,
            max_client_waiting=options.client_items,
            workers=workers or options.inference_concurrency,
        )

    async def ask(self, request: Request, items: Sequence[Item]) -> list[Result]:
        """The results of `items`, in order.

        Raises
        ------
        HTTPException
            413 for more items than one request may have, 429 when too many of this client wait already, 503 when they
            have no room or no turn in time, 500 when the model failed. In time is before the client would hang up:
            a refusal costs it no repeat, and tells it when to come back.
        """
        limit = self._options.request_items
        if len(items) > limit:
            raise HTTPException(413, f"{len(items)} items in one request; at most {limit}")
        turn_s = min(self._options.acquire_timeout_s, SHARE_TO_WAIT * patience_of(request))
        try:
            return await self.batcher.submit(items, turn_s, client_of(request))
        except Overloaded as error:
            status = 429 if isinstance(error, ClientOverloaded) else 503
            retry = {"Retry-After": str(math.ceil(error.retry_after_s))}
            raise HTTPException(status, f"busy: {error}", headers=retry) from error
        except ModelFailed as error:
            raise HTTPException(500, f"the model failed: {error}") from error


def client_of(request: Request) -> str:
    """Who asks, for fairness: what the client calls itself, else the address that it asks from."""
    named = request.headers.get(CLIENT_HEADER, "")[:MAX_CLIENT_CHARACTERS]
    return named or (request.client.host if request.client else "")


def patience_of(request: Request) -> float:
    """How long the client waits before it hangs up, as far as it says so. Seconds; infinite where it does not."""
    try:
        said = float(request.headers.get(TIMEOUT_HEADER, ""))
    except ValueError:
        return math.inf
    return said if said > 0 else math.inf
