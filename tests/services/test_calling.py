"""Calls against servers that misbehave in every way that HTTP allows, and against records that lie."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.config.clients import ClientConfig
from hpc_rl.services import circuit, handoff
from hpc_rl.services.calling import CallFailed, ServiceClient, ServiceRefused, ServiceUnavailable
from hpc_rl.services.wire import LONGEST_RETRY_AFTER_S, Reply
from tests.waiting import PATIENCE_S, wait_for

from .unavailable import is_unavailable

Script = Callable[[BaseHTTPRequestHandler, int], None]
"""Answers the n-th call."""


@dataclass
class Scripted:
    """A server that says rightly who it is, and answers calls as told; what it was sent."""

    folder: Path
    replica: str
    script: Script
    port: int = 0
    health: Script | None = None
    weights_hash: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    connections: list[socket.socket] = field(default_factory=list)
    asked_who: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.connections.append(self.request)
                super().setup()

            def do_GET(self) -> None:
                outer.asked_who.append(self.headers["authorization"])
                if outer.health is not None:
                    outer.health(self, len(outer.asked_who))
                else:
                    details = {"weights_hash": outer.weights_hash} if self.headers["authorization"] else {}
                    answer(self, 200, {"status": "ok", "nonce": outer.nonce, **details})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                sent = {name.lower(): value for name, value in self.headers.items()}
                outer.calls.append({"path": self.path, "body": json.loads(body), **sent})
                outer.script(self, len(outer.calls))

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.nonce, self.port = handoff.new_nonce(), self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        handoff.run_token(self.folder)
        self.publication = handoff.publish(
            self.folder, "s", self.replica, "127.0.0.1", self.port, nonce=self.nonce, heartbeat_s=60,
            weights_hash=self.weights_hash,
        )  # fmt: skip

    def stop(self) -> None:
        """End as a process does: its connections end with it."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def answer(handler: BaseHTTPRequestHandler, status: int, content: Any, **headers: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"content_length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def fine(handler: BaseHTTPRequestHandler, number: int) -> None:
    answer(handler, 200, {"fine": True})


FINE = {"fine": True}
Start = Callable[..., Scripted]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a scripted server, published in `tmp_path`."""
    started: list[Scripted] = []

    def make(script: Script = fine, replica: str = "", **more: Any) -> Scripted:
        started.append(Scripted(tmp_path, replica or f"r{len(started)}", script, **more))
        return started[-1]

    yield make
    for server in started:
        server.stop()
        server.publication.unpublish()


def client(folder: Path, weights_hash: str = "", **options: Any) -> ServiceClient:
    fast = {"timeout_s": PATIENCE_S, "deadline_s": PATIENCE_S, "backoff_factor": 0.02, **options}
    return ServiceClient(folder, ClientConfig(**fast), weights_hash=weights_hash, rng=random.Random(0))


def cut_off(handler: BaseHTTPRequestHandler, said: bytes) -> None:
    handler.wfile.write(said)
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


BAD: dict[str, tuple[Script, str]] = {
    "JSON without end": (lambda handler, _: answer(handler, 200, b"[" * 100_000), "failed"),
    "no JSON": (lambda handler, _: answer(handler, 200, b"<html>"), "failed"),
    "half an answer": (
        lambda handler, _: cut_off(handler, b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"),
        "gone",
    ),
    "no HTTP": (lambda handler, _: cut_off(handler, b"SSH-2.0-OpenSSH_9\r\n"), "gone"),
    "a failure": (lambda handler, _: answer(handler, 500, {"detail": "no kernel"}), "failed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_answer_is_a_trouble_and_the_call_is_repeated(tmp_path: Path, start: Start, kind: str) -> None:
    bad, trouble = BAD[kind]
    server = start(lambda handler, number: bad(handler, number) if number < 3 else fine(handler, number))
    with client(tmp_path) as calling:
        assert calling.post("/x", 1) == FINE
    assert calling.troubles == {trouble: 2} and len(server.calls) == 3


def drip(handler: BaseHTTPRequestHandler, number: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"content-length: 100000\r\n\r\n" if number % 2 else b"x-drip: "))
    while True:
        handler.wfile.write(b"1")
        handler.wfile.flush()
        time.sleep(0.05)


def test_a_server_that_drips_its_answer_or_its_head_holds_a_client_no_longer_than_the_time_limit(
    tmp_path: Path, start: Start
) -> None:
    server = start(drip)
    with (
        client(tmp_path, timeout_s=1.0, max_retries=1) as calling,
        pytest.raises(CallFailed, match="longer than 1 s"),
    ):
        calling.post("/x", 1)
    wait_for(lambda: len(server.calls) == 2, "both calls at the server")
    assert calling.troubles == {"failed": 2}


@pytest.mark.parametrize("options", [{"backoff_factor": 600}, {"timeout_s": 600}, {}], ids=["back-off", "call", "rest"])
def test_the_deadline_bounds_everything(tmp_path: Path, start: Start, options: dict[str, Any]) -> None:
    kept = threading.Event()

    def bad(handler: BaseHTTPRequestHandler, number: int) -> None:
        if "timeout_s" in options:
            kept.wait(PATIENCE_S)
        if options:
            answer(handler, 500, {"detail": "no kernel"})
        else:
            answer(handler, 503, {"detail": "busy"}, retry_after="600")

    start(bad)
    with (
        client(tmp_path, deadline_s=0.7, max_retries=9, **options) as calling,
        pytest.raises(ServiceUnavailable, match=r"no answer to /x within 0\.7 s"),
    ):
        calling.post("/x", 1)
    kept.set()


def test_retry_after_is_waited_for_in_seconds_and_as_a_date_and_costs_no_retry(tmp_path: Path, start: Start) -> None:
    """The date is by the server's clock, which is an hour ahead."""
    at: list[float] = []

    def busy(handler: BaseHTTPRequestHandler, number: int) -> None:
        at.append(time.monotonic())
        ahead = time.time() + 3600
        handler.date_time_string = lambda timestamp=None: formatdate(ahead, usegmt=True)  # type: ignore[method-assign]
        if number == 1:
            answer(handler, 429, {"detail": "too many"}, retry_after="1")
        elif number == 2:
            answer(handler, 503, {"detail": "busy"}, retry_after=formatdate(ahead + 1, usegmt=True))
        else:
            fine(handler, number)

    start(busy)
    with client(tmp_path, max_retries=0) as calling:
        assert calling.post("/x", 1) == FINE
    assert calling.troubles == {"busy": 2}
    assert at[1] - at[0] >= 1 and at[2] - at[1] >= 1
    ahead = time.time() + 3600
    said = {"retry-after": formatdate(ahead + 7, usegmt=True), "date": formatdate(ahead, usegmt=True)}
    assert Reply(503, said, b"").retry_after_s == 7 < LONGEST_RETRY_AFTER_S, "by the server's clock"


def test_one_that_keeps_failing_gets_no_more_calls_while_another_serves(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rest in ("FIRST_REST_S", "LONGEST_REST_S"):
        monkeypatch.setattr(circuit, rest, 3600.0)
    bad = start(BAD["a failure"][0])
    good = start()
    with client(tmp_path, max_retries=1) as calling:
        assert [calling.post("/x", number) for number in range(40)] == [FINE] * 40
        assert calling.troubles["failed"] == len(bad.calls) <= circuit.FAILURES_TO_OPEN
    assert len(good.calls) == 40, "each repeat went to the one that had not failed"


def test_replicas_join_while_others_serve_and_leave_when_they_drain(tmp_path: Path, start: Start) -> None:
    first = start()
    with client(tmp_path) as calling:
        calling.post("/x", 0)
        calling._replicas._read_at -= 8  # time passes
        joined = start()
        wait_for(lambda: calling.post("/x", 1) == FINE and joined.calls, "a call of the one that has joined")
        first.publication.drain()
        calling._replicas._read_at -= 8
        calling.post("/x", 2)

        def is_forgotten() -> bool:
            calling.post("/x", 3)
            return all(replica.nonce != first.nonce for replica in calling._replicas._known.values())

        wait_for(is_forgotten, "the end of the one that drains")
        before = len(first.calls)
        for number in range(20):
            calling.post("/x", number)
        assert len(first.calls) == before


def test_the_token_goes_only_to_the_process_that_said_who_it_is(tmp_path: Path, start: Start) -> None:
    """A server that was asked before dies, and at once another program answers on its port."""
    first = start()
    with client(tmp_path) as calling:
        assert calling.post("/x", 1) == FINE
        assert first.calls[0]["authorization"] == f"Bearer {handoff.read_token(tmp_path)}"
        first.stop()
        usurper = start(port=first.port)
        usurper.publication.unpublish()
        is_unavailable(calling, "is not the server that was published there", lambda: calling.post("/x", 2))
    assert not usurper.calls and set(usurper.asked_who) == {None}


def strange(sock: socket.socket, what: str, elsewhere: str) -> None:
    """Something else on a reused port."""
    with suppress(OSError):
        while True:
            connection, _ = sock.accept()
            with suppress(OSError), connection:
                connection.recv(65536)
                if what == "ssh":
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                elif what == "redirect":
                    connection.sendall(
                        f"HTTP/1.1 307 x\r\nlocation: {elsewhere}/health\r\ncontent-length: 0\r\n\r\n".encode()
                    )
                elif what == "endless":
                    connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                    while True:
                        connection.sendall(b"10000\r\n" + b'"' * 0x10000 + b"\r\n")
                elif what == "nested":
                    body = b"[" * 500_000
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("what", ["ssh", "redirect", "endless", "nested", "hangs up"])
def test_a_reused_port_that_answers_as_something_else_is_recognised(tmp_path: Path, start: Start, what: str) -> None:
    real = start()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=strange, args=(sock, what, real.url), daemon=True).start()
        stale = handoff.publish(tmp_path, "s", "stale", "127.0.0.1", sock.getsockname()[1], heartbeat_s=60)
        real.publication.drain()
        asked = len(real.asked_who)
        with client(tmp_path) as calling:
            is_unavailable(calling, "does not answer", lambda: calling.post("/x", 1))
        assert len(real.asked_who) == asked and not real.calls, "redirects are not followed"
        other = start(replica="other")
        with client(tmp_path) as calling:
            assert calling.post("/x", 1) == FINE
        assert len(other.calls) == 1
        stale.unpublish()


def test_a_server_whose_clock_is_minutes_off_is_found_all_the_same(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    for skew_s in (-600.0, 600.0):
        monkeypatch.setattr(time, "time", lambda skew_s=skew_s: real() + skew_s)
        server = start(replica=f"skewed{skew_s:.0f}")
        monkeypatch.undo()
        with client(tmp_path) as calling:
            assert abs(server.publication.endpoint.heartbeat - real()) > 500
            assert [calling.post("/x", number) for number in range(4)] == [FINE] * 4
        assert len(server.calls) == 4
        server.publication.drain()


def test_only_servers_of_the_demanded_weights_are_asked(tmp_path: Path, start: Start) -> None:
    old, new = start(weights_hash="old"), start(weights_hash="new")
    with client(tmp_path, weights_hash="new") as calling:
        assert [calling.post("/x", number) for number in range(10)] == [FINE] * 10
    assert len(new.calls) == 10 and not old.calls
    with client(tmp_path, weights_hash="newer") as calling:
        none = r"no server in .* serves the weights newer; published are new, old"
        is_unavailable(calling, none, lambda: calling.post("/x", 1))
    with client(tmp_path, weights_hash="new", url=old.url) as calling:
        is_unavailable(calling, "serves the weights old, not new", lambda: calling.post("/x", 1))
    with client(tmp_path, weights_hash="new", url=new.url) as calling:
        assert calling.post("/x", 1) == FINE
    assert not old.calls


def test_each_client_has_a_name_of_its_own_and_keeps_its_connections(tmp_path: Path, start: Start) -> None:
    server = start()
    for _ in range(2):
        with client(tmp_path) as calling:
            for number in range(10):
                calling.post("/x", number)
    names = [call["x-client-id"] for call in server.calls]
    assert len(set(names[:10])) == len(set(names[10:])) == 1 and len(set(names)) == 2
    assert len(server.connections) == 2


def test_as_many_calls_are_under_way_as_the_config_says_and_answers_keep_their_order(
    tmp_path: Path, start: Start
) -> None:
    gate, most, under_way, lock = threading.Barrier(5), 0, 0, threading.Lock()

    def echo(handler: BaseHTTPRequestHandler, number: int) -> None:
        nonlocal most, under_way
        with lock:
            under_way += 1
            most = max(most, under_way)
        gate.wait(PATIENCE_S)  # five are here at the same time, or nobody goes on
        with lock:
            under_way -= 1
        answer(handler, 200, [])

    start(echo)

    def read(chunk: Any, said: Any) -> list[int]:
        return [10 * item for item in chunk]

    with client(tmp_path, parallel_calls=5, chunk_size=2) as calling:
        assert calling.ask("/x", list(range(40)), list, read, len) == [10 * item for item in range(40)]
    assert most == 5


def test_the_first_call_without_a_server_ends_the_others(tmp_path: Path, start: Start) -> None:
    release = threading.Event()

    def script(handler: BaseHTTPRequestHandler, number: int) -> None:
        release.wait(PATIENCE_S)
        answer(handler, 401, {"detail": "who are you"})

    server = start(script)
    with client(tmp_path, chunk_size=1, parallel_calls=2) as calling, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(calling.ask, "/x", list(range(1000)), list, lambda chunk, said: chunk, len)
        release.set()
        with pytest.raises(RuntimeError, match=r"401: who are you.*token is"):
            asked.result(PATIENCE_S)
    assert len(server.calls) <= 4


def test_a_signal_ends_a_wait_at_once(tmp_path: Path, start: Start) -> None:
    class Told(Exception):
        pass

    def leave(*_: object) -> None:
        raise Told

    old = signal.signal(signal.SIGALRM, leave)
    try:
        with client(tmp_path, deadline_s=600) as calling, pytest.raises(Told):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            calling.post("/x", 1)
    finally:
        signal.signal(signal.SIGALRM, old)


def test_a_server_that_closes_every_connection_is_no_endless_loop(tmp_path: Path, start: Start) -> None:
    def closes(handler: BaseHTTPRequestHandler, number: int) -> None:
        answer(handler, 200, {"nonce": server.nonce}, connection="close")

    server = start(health=closes)
    with client(tmp_path) as calling:
        is_unavailable(calling, "closes every connection", lambda: calling.post("/x", 1))
    assert not server.calls


@pytest.mark.parametrize("status", [301, 307, 404, 405])
def test_what_is_another_service_is_refused_and_no_item_is_left_out(tmp_path: Path, start: Start, status: int) -> None:
    server = start(lambda handler, number: answer(handler, status, {"detail": "Not Found"}, location="/health"))
    with (
        client(tmp_path, url=server.url) as calling,
        pytest.raises(ServiceRefused, match=rf"answered {status}.*check services\..*\.client\.url"),
    ):
        calling.ask("/x", [1, 2], list, lambda chunk, said: chunk, len)
    assert len(server.calls) == 1


def test_a_wrong_token_is_said_to_come_from_where_it_came(tmp_path: Path, start: Start) -> None:
    start(lambda handler, number: answer(handler, 401, {"detail": "who are you"}))
    with (
        ServiceClient(tmp_path, ClientConfig(), token="wrong", token_from="in SOME_TOKEN") as calling,
        pytest.raises(ServiceRefused, match=r"The token was given in SOME_TOKEN, and may differ from that in .*/token"),
    ):
        calling.post("/x", 1)
