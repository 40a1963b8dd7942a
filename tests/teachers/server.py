"""A real HTTP server that answers like an OpenAI endpoint, and misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Misbehave:
    """In place of an answer: a status with headers and a body, or a connection that is closed."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    hang_up: bool = False
    delay_s: float = 0.0


Behaviour = Callable[[int, dict[str, Any]], "Misbehave | str | None"]
"""The number of the call and its body → a misbehaviour, a text to answer, or None for the right answer."""


def number_in(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].split()[-1])


def of(body: dict[str, Any]) -> Any:
    """What was asked: a number, or another chat."""
    last = body["messages"][0]["content"].split()[-1]
    return int(last) if last.isdecimal() else json.dumps(body["messages"])


class Teacher:
    """The server. Its right answer to `… 7` is `7 times two is 14`, or the same as JSON where a schema is sent."""

    def __init__(self, port: int = 0) -> None:
        self.behave: Behaviour = lambda call, body: None
        self.right: Callable[[dict[str, Any]], str] = right
        self.calls = 0
        self.paid: Counter[Any] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.times: list[float] = []
        self._lock = threading.Lock()
        self._start(port)

    def _start(self, port: int) -> None:
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                teacher.answer(self)

            def do_GET(self) -> None:
                teacher.send(self, Misbehave(body=json.dumps({"data": [{"id": "judge"}]}).encode()))

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                teacher.connections.append(connection)
                return connection, address

            def handle_error(self, *_: object) -> None:
                pass

        self.connections: list[socket.socket] = []
        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def die(self) -> None:
        """Stop listening and cut all connections."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Listen again on the same port."""
        self._start(self.port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            self.calls += 1
            call = self.calls
            self.bodies.append(body)
            self.keys.add(handler.headers.get("authorization"))
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            wish = self.behave(call, body)
            if isinstance(wish, Misbehave):
                time.sleep(wish.delay_s)
                if wish.hang_up:
                    handler.close_connection = True
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                if wish.status != 200 or wish.body != b"{}":
                    self.send(handler, wish)
                    return
                wish = None
            with self._lock:
                self.paid[of(body)] += 1
            self.send(handler, Misbehave(body=completion(wish if wish is not None else self.right(body))))
        finally:
            with self._lock:
                self.at_once -= 1

    def send(self, handler: BaseHTTPRequestHandler, what: Misbehave) -> None:
        begin = handler.send_response_only if "Date" in what.headers else handler.send_response  # that sends a date too
        begin(what.status)
        for name, value in {"content-type": "application/json", **what.headers}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(what.body)))
        handler.end_headers()
        handler.wfile.write(what.body)


def right(body: dict[str, Any]) -> str:
    number = number_in(body)
    text = f"{number} times two is {2 * number}"
    return json.dumps({"answer": 2 * number}) if "response_format" in body else text


def completion(text: str | None, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
