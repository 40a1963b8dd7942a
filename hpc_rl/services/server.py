"""The frame of every service: who may ask, how much, and how a server starts, drains and ends.

    guard (token, body size, slow bodies) → FastAPI routes of the service → batcher → model

The server runs in a thread, so that the process's main thread stays free for signals and for deciding when to leave.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
OWN_ROUTES = ("/health", "/ready", "/metrics")
METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

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
    """

    max_body_bytes: int
    body_timeout_s: float


class _Refused(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Guard:
    """Outermost layer: answers `/health`, checks the token of everything else, and reads the body within its limits.

    Parameters
    ----------
    app
        The service.
    token
        What `Authorization: Bearer …` must hold. Never empty.
    nonce
        Repeated by `/health`, so that a client knows that it talks to the server that published the handoff record.
    details
        What `/health` tells those who have the token.
    metrics
        What `/metrics` answers: Prometheus text.
    on_answer
        Told after each answer: the route ("other" where there is none), the status, the seconds it took.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        token: str,
        nonce: str,
        limits: Limits,
        details: Callable[[], Mapping[str, Any]],
        metrics: Callable[[], bytes] = lambda: b"",
        on_answer: OnAnswer = lambda route, status, seconds: None,
    ) -> None:
        if not token:
            raise ValueError("a service without a token would answer to anyone")
        self._app, self._nonce, self._limits, self._details = app, nonce, limits, details
        self._expected = f"Bearer {token}".encode()
        self._metrics, self._on_answer = metrics, on_answer
        self._routes = {*OWN_ROUTES, *(route.path for route in app.routes if isinstance(route, Route))}
        self.draining = False
        self.last_request = time.monotonic()
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            started, answering = time.monotonic(), _Answering(send)
            try:
                await self._http(scope, receive, answering)
            finally:
                self._on_answer(self._route(scope), answering.status or 499, time.monotonic() - started)
        else:
            raise RuntimeError(f"this service does not speak {scope['type']}")

    def _route(self, scope: Scope) -> str:
        """What was asked for, with few different values whatever strangers ask for."""
        matched = scope.get("route")
        path = matched.path if isinstance(matched, Route) else scope["path"]
        return path if path in self._routes else "other"

    async def _http(self, scope: Scope, receive: Receive, send: _Answering) -> None:
        authorized = self._is_authorized(scope)
        try:
            if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
                await self._health(scope, authorized, send)
                return
            if not authorized:
                raise _Refused(401, "this service wants the run's token: Authorization: Bearer <services/NAME/token>")
            if scope["path"] == "/metrics" and scope["method"] == "GET":
                await _send(send, 200, self._metrics(), METRICS_TYPE)
                return
            if self.draining:
                raise _Refused(503, "this server is leaving; ask another replica")
            body = await self._read_body(scope, receive)
        except _Refused as refused:
            await _answer(send, refused.status, {"detail": refused.detail})
            return
        self.last_request = time.monotonic()
        self.in_flight += 1
        try:
            await self._app(scope, _replay(body, receive), send)
        except asyncio.CancelledError:  # stopped before this was done: it is not the request's fault
            if send.status is None:
                await _answer(send, 503, {"detail": "this server has left; ask another replica"})
        finally:
            self.in_flight -= 1
            self.last_request = time.monotonic()

    def _is_authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)

    async def _health(self, scope: Scope, authorized: bool, send: Send) -> None:
        alive = {"status": "draining" if self.draining else "ok", "nonce": self._nonce}
        await _answer(send, 200, {**alive, **self._details()} if authorized else alive, empty=scope["method"] == "HEAD")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.max_body_bytes
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > limit:
            raise _Refused(413, f"the body is larger than {limit} bytes; send fewer items at once")
        try:
            return await asyncio.wait_for(_collect(receive, limit), self._limits.body_timeout_s)
        except TimeoutError:
            raise _Refused(408, f"the body took longer than {self._limits.body_timeout_s:g} s") from None


class _Answering:
    """A `send` that knows the status that was sent; None before the answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


async def _collect(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise _Refused(400, "the client hung up")
        body += message.get("body", b"")
        if len(body) > limit:
            raise _Refused(413, f"the body is larger than {limit} bytes; send fewer items at once")
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A `receive` that gives the body that was read already, and afterwards what the real one gives."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


async def _answer(send: Send, status: int, content: Mapping[str, Any], *, empty: bool = False) -> None:
    await _send(send, status, json.dumps(content).encode(), b"application/json", empty=empty)


async def _send(send: Send, status: int, body: bytes, kind: bytes, *, empty: bool = False) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if empty else body})


class ServerThread:
    """A running server. `start` returns once it answers; `drain` turns new requests away; `stop` ends it.

    Parameters
    ----------
    app
        The service's routes.
    sock
        A listening socket (`address.bind`).
    token, nonce, limits, details, metrics, on_answer
        See `Guard`.
    """

    def __init__(
        self,
        app: FastAPI,
        sock: socket.socket,
        *,
        token: str,
        nonce: str,
        limits: Limits,
        details: Callable[[], Mapping[str, Any]],
        metrics: Callable[[], bytes] = lambda: b"",
        on_answer: OnAnswer = lambda route, status, seconds: None,
    ) -> None:
        self.guard = Guard(
            app, token=token, nonce=nonce, limits=limits, details=details, metrics=metrics, on_answer=on_answer
        )
        self._sock = sock
        options = uvicorn.Config(
            self.guard,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,  # `drain` has waited already; what is left is cancelled and told so
            server_header=False,
            proxy_headers=False,
        )
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(target=self._serve, name="http-server", daemon=True)

    def _serve(self) -> None:
        self._server.run(sockets=[self._sock])

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return int(self._sock.getsockname()[1])

    @property
    def idle_s(self) -> float:
        """Seconds since the last request began or ended; 0 while one is being answered."""
        return 0.0 if self.guard.in_flight else time.monotonic() - self.guard.last_request

    @property
    def alive(self) -> bool:
        """False once the server has ended, by itself or by `stop`."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start serving; returns when the first request would be answered."""
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the HTTP server did not start; its reason is in the log above")
            time.sleep(0.01)

    def drain(self, timeout_s: float) -> bool:
        """Turn new requests away (503) and wait for those in flight; True when none is left."""
        self.guard.draining = True
        deadline = time.monotonic() + timeout_s
        while self.guard.in_flight and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.guard.in_flight

    def stop(self) -> None:
        """Close all connections and end the thread."""
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join()
        self._sock.close()
