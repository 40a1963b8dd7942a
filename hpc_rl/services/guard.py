"""Who may ask a service, and how much: host, token, body, and whether the client is still there.

    connections → guard → FastAPI routes of the service → Desk → batcher → model

`/health`, `/ready` and `/metrics` are answered here, so they stay quick whatever the service is busy with.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from hpc_rl.services.address import host_of, plain_name
from hpc_rl.services.frame import Service

RETRY_AFTER_S = 1.0
OWN_ROUTES = ("/health", "/ready", "/metrics")
METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
HUNG_UP = 499
"""What nobody reads; for the figures only."""

OnAnswer = Callable[[str, int, float], None]
"""Route, status, seconds."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes
    ----------
    max_body_bytes
        Larger bodies are refused with 413, before they are read where their length is announced.
    body_timeout_s
        A body that takes longer to arrive is refused with 408.
    max_bytes
        Bodies of all requests that are under way together; one more is refused with 503.
    """

    max_body_bytes: int
    body_timeout_s: float
    max_bytes: int


class _Refused(Exception):
    """An answer of the guard's own; the connection is closed after it, with what was not read of the request."""

    def __init__(self, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers

    @classmethod
    def for_now(cls, detail: str, retry_after_s: float = RETRY_AFTER_S) -> _Refused:
        """503, with the time after which to ask again."""
        return cls(503, detail, (b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))))


class Guard:
    """Outermost layer of a service.

    Parameters
    ----------
    service
        What is guarded.
    token
        What `Authorization: Bearer …` must hold. Never empty.
    nonce
        Repeated by `/health`, so that a client knows that it talks to the server that published the handoff record.
    names
        What a request may call this server in `Host` (`names_of`); the address that it came in at is allowed too.
        A page in somebody's browser can have any name lead here, but it cannot choose the header.
    limits
        What one request may cost.
    metrics
        What `/metrics` answers: Prometheus text.
    on_answer
        Told after each answer: the route ("other" where there is none), the status, the seconds it took.
    """

    def __init__(
        self,
        service: Service,
        *,
        token: str,
        nonce: str,
        names: frozenset[str],
        limits: Limits,
        metrics: Callable[[], bytes] = lambda: b"",
        on_answer: OnAnswer = lambda route, status, seconds: None,
    ) -> None:
        if not token:
            raise ValueError("a service without a token would answer to anyone")
        self._service, self._nonce, self._names, self._limits = service, nonce, names, limits
        self._expected = f"Bearer {token}".encode()
        self._metrics, self._on_answer = metrics, on_answer
        self._routes = {*OWN_ROUTES, *(route.path for route in service.app.routes if isinstance(route, Route))}
        self.draining = False
        self.last_request = time.monotonic()
        self.in_flight = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http":
            raise RuntimeError(f"this service does not speak {scope['type']}")
        started, answering = time.monotonic(), _Answering(send)
        try:
            await self._http(scope, receive, answering)
        except _Refused as refused:
            await answering.refuse(refused)
        except asyncio.CancelledError:  # the server is stopped before this is done: it is not the request's fault
            await answering.refuse(_Refused.for_now("this server has left; ask another replica"))
        finally:
            self._on_answer(self._route(scope), answering.status or HUNG_UP, time.monotonic() - started)

    def _route(self, scope: Scope) -> str:
        """What was asked for, with few different values whatever strangers ask for."""
        matched = scope.get("route")
        path = matched.path if isinstance(matched, Route) else scope["path"]
        return path if path in self._routes else "other"

    async def _http(self, scope: Scope, receive: Receive, send: _Answering) -> None:
        self._check_head(scope)
        authorized = self._is_authorized(scope)
        if authorized:
            scope["state"]["connection"].trust()
        asked = scope["path"] if scope["method"] in ("GET", "HEAD") else ""
        if asked == "/health":
            await send.json(200, self._health(authorized))
            return
        if not authorized:
            wanted = "this service wants the run's token: Authorization: Bearer <services/NAME/token>"
            raise _Refused(401, wanted, (b"www-authenticate", b"Bearer"))
        if asked == "/metrics":
            await send.all(200, self._metrics(), METRICS_TYPE)
            return
        if self.draining:
            raise _Refused.for_now("this server is leaving; ask another replica")
        if asked == "/ready":
            if (problem := self._service.problem()) is not None:
                raise _Refused.for_now(*problem)
            await send.json(200, {"status": "ready"})
            return
        size = self._size(scope)
        if self._bytes + size > self._limits.max_bytes:
            raise _Refused.for_now("busy: what others have sent fills the memory for requests")
        self._bytes += size
        self.in_flight += 1
        self.last_request = time.monotonic()
        try:
            await self._run(scope, await self._read_body(receive), receive, send)
        finally:
            self._bytes -= size
            self.in_flight -= 1
            self.last_request = time.monotonic()

    def _check_head(self, scope: Scope) -> None:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        name = host_of(given[0]) if len(given) == 1 else None
        if name is None:
            raise _Refused(400, "a request needs one Host header that names this server")
        if name not in self._names and not (scope["server"] and name == plain_name(scope["server"][0])):
            raise _Refused(421, "the Host header names another server; services.*.allowed_hosts may allow it")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            raise _Refused(400, "Content-Length and Transfer-Encoding exclude each other")  # RFC 9112, 6.3

    def _is_authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)

    def _health(self, authorized: bool) -> dict[str, Any]:
        alive = {"status": "draining" if self.draining else "ok", "nonce": self._nonce}
        return {**alive, **self._service.describe()} if authorized else alive

    def _size(self, scope: Scope) -> int:
        """How many bytes of body may come: as many as are announced, or the most where none are (chunks)."""
        headers, limit = dict(scope["headers"]), self._limits.max_body_bytes
        if b"transfer-encoding" in headers:
            return limit
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > limit:
            raise _too_large(limit)
        return int(announced)

    async def _read_body(self, receive: Receive) -> bytes:
        limit = self._limits.max_body_bytes
        try:
            return await asyncio.wait_for(_collect(receive, limit), self._limits.body_timeout_s)
        except TimeoutError:
            raise _Refused(408, f"the body took longer than {self._limits.body_timeout_s:g} s") from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: _Answering) -> None:
        """Have the service answer, for as long as the client is there to read it."""
        hung_up = asyncio.create_task(_hang_up(receive))
        answer = asyncio.create_task(_call(self._service.app, scope, _replay(body, hung_up), send))
        try:
            await asyncio.wait({answer, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not send.complete:
                raise _Refused(HUNG_UP, "the client hung up")
            await answer
        finally:
            hung_up.cancel()
            answer.cancel()
            await asyncio.wait({answer})  # what it had waiting is given up before anything else happens


class _Answering:
    """A `send` that knows what was sent: the status, None before the answer has begun; and whether that was all."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        await self._send(message)

    async def all(self, status: int, body: bytes, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
        """A whole answer."""
        length = (b"content-length", b"%d" % len(body))
        await self(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), length, *headers]}
        )
        await self({"type": "http.response.body", "body": body})

    async def json(self, status: int, content: Mapping[str, Any], *headers: tuple[bytes, bytes]) -> None:
        """A whole answer."""
        await self.all(status, json.dumps(content).encode(), b"application/json", *headers)

    async def refuse(self, refused: _Refused) -> None:
        """An answer instead of the service's, unless that has begun."""
        if self.status is None:
            await self.json(refused.status, {"detail": refused.detail}, (b"connection", b"close"), *refused.headers)


async def _call(app: Any, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def _too_large(limit: int) -> _Refused:
    return _Refused(413, f"the body is larger than {limit} bytes; send fewer items at once")


async def _collect(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Refused(HUNG_UP, "the client hung up")
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return bytes(body)


async def _hang_up(receive: Receive) -> None:
    """Returns when the client is gone, or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, hung_up: asyncio.Task[None]) -> Callable[[], Awaitable[Message]]:
    """A `receive` that gives the body that was read already, and then that the client has hung up, when it has."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await asyncio.shield(hung_up)
        return {"type": "http.disconnect"}

    return again
