"""The frame of every service over real HTTP: who may ask, what is cut off, who is turned away, how a server leaves."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse

from hpc_rl.config.clients import ClientConfig
from hpc_rl.config.services import ServiceConfig
from hpc_rl.services import handoff
from hpc_rl.services.address import Address, names_of, plain_name
from hpc_rl.services.calling import ServiceClient
from hpc_rl.services.frame import Desk, Service
from hpc_rl.services.guard import Guard, Limits
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.services.openapi import REFUSALS, new_app
from tests.waiting import PATIENCE_S, wait_for


class Doubler:
    """A model that doubles numbers, once it may; it cannot take negative ones."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.seen: list[int] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.seen += numbers
        assert self.may.wait(PATIENCE_S)
        if min(numbers) < 0:
            raise ValueError("a kernel did not launch")
        return [2 * number for number in numbers]


def service_of(model: Doubler, options: ServiceConfig) -> Service:
    desk: Desk[int, int] = Desk(model, options)
    app = new_app("doubler")

    @app.post("/double", responses=REFUSALS)
    async def double(request: Request, numbers: list[int]) -> list[int]:
        return await desk.ask(request, numbers)

    @app.post("/stream")
    async def stream(request: Request, numbers: list[int]) -> StreamingResponse:
        async def answers() -> AsyncIterator[str]:
            for number in numbers:
                yield json.dumps(await desk.ask(request, [number])) + "\n"

        return StreamingResponse(answers())

    @app.post("/much")
    async def much() -> StreamingResponse:
        async def answers() -> AsyncIterator[bytes]:
            for _ in range(1000):
                yield b"x" * 100_000

        return StreamingResponse(answers())

    return Service("doubler", app, desk.batcher, "abc")


class Place:
    """Servers of one model, and ways to talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.hosted = folder, Doubler(), list[Hosted]()

    def serve(self, address: str = "127.0.0.1", **options: Any) -> Hosted:
        settings = ServiceConfig(**{"batch_wait_ms": 0, "body_timeout_s": PATIENCE_S, **options})
        where = Address(address, "127.0.0.1")
        self.hosted.append(
            host(service_of(self.model, settings), folder=self.folder, address=where, options=settings, environ={})
        )
        return self.hosted[-1]

    @property
    def token(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {handoff.read_token(self.folder)}"}

    @property
    def url(self) -> str:
        return self.hosted[-1].publication.endpoint.url

    def ask(self, numbers: Any, route: str = "/double", **headers: str) -> httpx.Response:
        more = {**self.token, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return httpx.post(f"{self.url}{route}", json=numbers, headers=more, trust_env=False, timeout=PATIENCE_S)

    def get(self, route: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.url}{route}", headers=headers, trust_env=False, timeout=PATIENCE_S)

    def connect(self, buffer_bytes: int | None = None) -> socket.socket:
        sock = socket.socket()
        sock.settimeout(PATIENCE_S)
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.connect(("127.0.0.1", self.hosted[-1].server.port))
        return sock

    def head(self, request: str, *lines: str, token: bool = True) -> bytes:
        known = ["Content-Type: application/json"]
        known += [f"Authorization: {self.token['Authorization']}"] if token else []
        return "\r\n".join([f"{request} HTTP/1.1", *lines, *known, "", ""]).encode()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "services" / "doubler")
    yield made
    made.model.may.set()
    for hosted in made.hosted:
        hosted.leave(0.0)


def everything(sock: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    said = b""
    try:
        while part := sock.recv(65536):
            said += part
    except ConnectionResetError:
        pass
    return said


def test_a_service_without_a_token_is_not_made() -> None:
    service = service_of(Doubler(), ServiceConfig())
    with pytest.raises(ValueError, match="would answer to anyone"):
        Guard(service, token="", nonce="n", names=frozenset(), limits=Limits(1, 1, 1))


def test_a_server_has_the_names_of_its_host_and_those_that_are_allowed_besides(place: Place) -> None:
    port = place.serve(address="0.0.0.0", allowed_hosts=["Tunnel.example.org"]).server.port
    for name, status in (
        (socket.gethostname(), 200),
        ("tunnel.example.org", 200),
        ("tunnel.example.org.:1", 200),
        ("example.org", 421),
        ("0.0.0.0", 421),
    ):
        answer = httpx.get(
            f"http://127.0.0.1:{port}/health", headers={"Host": name}, trust_env=False, timeout=PATIENCE_S
        )
        assert answer.status_code == status, name


def test_the_address_that_a_request_came_in_at_is_a_name_of_the_server(place: Place) -> None:
    place.serve(address="0.0.0.0")
    port = place.hosted[-1].server.port
    for address in ("127.0.0.2", "127.1.2.3"):
        with httpx.Client(base_url=f"http://{address}:{port}", trust_env=False, timeout=PATIENCE_S) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/health", headers={"Host": "127.0.0.9"}).status_code == 421


def test_names_are_compared_in_one_form() -> None:
    assert plain_name("Node-01.Cluster.") == "node-01.cluster"
    assert plain_name("0:0::1") == plain_name("::1%lo") == "::1"
    assert plain_name("::ffff:10.0.0.1") == "10.0.0.1"
    assert {"localhost", "127.0.0.1", socket.gethostname().lower(), "ib0-name"} <= names_of("IB0-name")


def test_ready_is_not_the_same_as_alive(place: Place) -> None:
    hosted = place.serve(batch_size=1, max_queue_items=2, max_client_items=2, drain_s=0)
    assert place.get("/ready", **place.token).json() == {"status": "ready"}
    place.model.may.clear()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(place.ask, [1])
        wait_for(lambda: place.model.seen, "the model")
        second = clients.submit(place.ask, [2, 3])
        wait_for(lambda: hosted.service.batcher.waiting == 2, "the queue")
        full = place.get("/ready", **place.token)
        assert full.status_code == 503 and full.json()["detail"] == "the queue is full"
        assert int(full.headers["retry-after"]) >= 1
        assert place.get("/health").json()["status"] == "ok"
        place.model.may.set()
        assert first.result().status_code == second.result().status_code == 200
    assert place.get("/ready", **place.token).status_code == 200
    for _ in range(2):
        assert place.ask([-1]).status_code == 500
    assert "2 times in a row" in place.get("/ready", **place.token).json()["detail"]
    assert place.ask([1]).status_code == 200
    assert place.get("/ready", **place.token).status_code == 200
    hosted.server.guard.draining = True
    leaving = place.get("/ready", **place.token)
    assert leaving.status_code == 503 and int(leaving.headers["retry-after"]) >= 1
    assert place.get("/health").json()["status"] == "draining"


@pytest.mark.parametrize("route", ["/double", "/stream"])
def test_a_client_that_hangs_up_frees_its_place(place: Place, route: str) -> None:
    hosted = place.serve(batch_size=2)
    batcher = hosted.service.batcher
    place.model.may.clear()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(place.ask, [1, 2])
        wait_for(lambda: place.model.seen, "the model")
        with place.connect() as sock:
            body = b"[3, 4, 5]"
            sock.sendall(place.head(f"POST {route}", "Host: localhost", f"Content-Length: {len(body)}") + body)
            wait_for(lambda: batcher.waiting == (3 if route == "/double" else 1), "the queue")
        wait_for(lambda: batcher.waiting == 0 and hosted.server.guard.in_flight == 1, "the queue")
        assert batcher.counters.abandoned == 1
        place.model.may.set()
        assert first.result().json() == [2, 4]
    assert place.ask([6]).json() == [12] and place.model.seen == [1, 2, 6]


def test_a_stream_reaches_the_client_that_stays(place: Place) -> None:
    place.serve()
    assert place.ask([1, 2, 3], "/stream").text.split() == ["[2]", "[4]", "[6]"]


def test_a_full_queue_refuses_with_retry_after_and_health_answers(place: Place) -> None:
    hosted = place.serve(batch_size=2, max_queue_items=6, max_client_items=4)
    place.model.may.clear()
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(place.ask, [1, 2], X_Client_Id="a")]
        wait_for(lambda: place.model.seen, "the model")
        waiting.append(clients.submit(place.ask, [3, 4, 5], X_Client_Id="a"))
        wait_for(lambda: hosted.service.batcher.waiting == 3, "the queue")
        greedy = place.ask([6, 7], X_Client_Id="a")
        assert greedy.status_code == 429 and int(greedy.headers["retry-after"]) >= 1
        waiting.append(clients.submit(place.ask, [6, 7, 8], X_Client_Id="b"))
        wait_for(lambda: hosted.service.batcher.waiting == 6, "the queue")
        refused = place.ask([9])
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert place.get("/health", **place.token).json()["waiting_items"] == 6
        place.model.may.set()
        assert [answer.result().json() for answer in waiting] == [[2, 4], [6, 8, 10], [12, 14, 16]]
    assert place.ask([9]).json() == [18]


def test_clients_that_say_nothing_of_themselves_are_told_apart_by_their_address(place: Place) -> None:
    hosted = place.serve(address="0.0.0.0", batch_size=1, max_queue_items=6, max_client_items=2)
    place.model.may.clear()
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(place.ask, [1])]
        wait_for(lambda: place.model.seen, "the model")
        waiting.append(clients.submit(place.ask, [2, 3]))
        wait_for(lambda: hosted.service.batcher.waiting == 2, "the queue")
        assert place.ask([4]).status_code == 429
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.3"), headers=place.token) as other:
            url = f"http://127.0.0.1:{hosted.server.port}/double"
            waiting.append(clients.submit(lambda: other.post(url, json=[4, 5], timeout=PATIENCE_S)))
            wait_for(lambda: hosted.service.batcher.waiting == 4, "the queue")
            place.model.may.set()
            assert [answer.result().status_code for answer in waiting] == [200, 200, 200]


def test_a_request_that_gets_no_turn_in_time_is_refused(place: Place) -> None:
    hosted = place.serve(batch_size=2, acquire_timeout_s=0.2)
    place.model.may.clear()
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(place.ask, [1, 2])
        wait_for(lambda: place.model.seen, "the model")
        second = place.ask([3])
        assert second.status_code == 503 and "no turn within 0.2 s" in second.json()["detail"]
        assert hosted.service.batcher.waiting == 0
        place.model.may.set()
        assert first.result().status_code == 200


def test_a_model_that_fails_is_a_server_error_and_counted(place: Place) -> None:
    hosted = place.serve()
    for _ in range(2):
        answer = place.ask([-1])
        assert answer.status_code == 500 and "a kernel did not launch" in answer.json()["detail"]
    assert hosted.service.batcher.counters.failed_in_a_row == 2


def test_too_much_is_refused_before_it_is_read_and_the_connection_closed(place: Place) -> None:
    place.serve(max_body_bytes=10_000, max_client_items=20)
    assert place.ask([1] * 21).status_code == 413
    assert place.ask([1] * 9000).status_code == 413
    assert place.ask([1]).json() == [2]
    for length in ("100000000", "9" * 19):
        with place.connect() as sock:
            sock.sendall(place.head("POST /double", "Host: localhost", f"Content-Length: {length}"))
            assert everything(sock).startswith(b"HTTP/1.1 413 ")
    for length in ("-1", "1e3", "0x10", "1, 2"):
        with place.connect() as sock:
            sock.sendall(place.head("POST /double", "Host: localhost", f"Content-Length: {length}"))
            assert everything(sock).startswith(b"HTTP/1.1 400 ")
    with place.connect() as sock:
        sock.sendall(place.head("POST /double", "Host: localhost", "Transfer-Encoding: chunked"))
        with pytest.raises(OSError):  # a reset, or a broken pipe
            for _ in range(10_000):
                sock.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
    assert place.model.seen == [1]


def test_what_all_requests_together_may_hold_is_bounded(place: Place) -> None:
    hosted = place.serve(max_body_bytes=100, max_requests_bytes=250)
    place.model.may.clear()
    holding = []
    for kind in ("Content-Length: 100", "Transfer-Encoding: chunked"):
        holding.append(place.connect())
        holding[-1].sendall(place.head("POST /double", "Host: localhost", kind))
        wait_for(lambda: hosted.server.guard.in_flight == len(holding), "the requests")
    full = place.ask([1] * 30)
    assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
    assert place.get("/metrics", **place.token).status_code == 200
    holding[0].close()
    wait_for(lambda: hosted.server.guard.in_flight == 1, "the requests")
    place.model.may.set()
    assert place.ask([1] * 30).status_code == 200
    holding[1].close()


@pytest.mark.parametrize("kind", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_who_sends_a_body_byte_by_byte_is_cut_off(place: Place, kind: str) -> None:
    place.serve(body_timeout_s=0.3)
    with place.connect() as sock:
        sock.sendall(place.head("POST /double", "Host: localhost", kind))
        said = dribble(sock, b"1\r\n \r\n" if "chunked" in kind else b" ")
    assert said.startswith(b"HTTP/1.1 408 ") or not said  # not: where a reset overtook the answer


def dribble(sock: socket.socket, piece: bytes) -> bytes:
    """Send a little every now and then until the server closes the connection; what it said."""
    said = b""
    sock.settimeout(0.02)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            sock.sendall(piece)
            part = sock.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return said
        if not part:
            return said
        said += part
    raise AssertionError("the connection was not closed")


def test_who_sends_no_head_or_one_byte_by_byte_is_cut_off(place: Place) -> None:
    hosted = place.serve(body_timeout_s=1.0)
    with place.connect() as silent:
        assert everything(silent) == b""
    with place.connect() as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        assert dribble(slow, b"x") == b""
    with place.connect() as later:  # an answer does not make it a friend
        later.sendall(place.head("GET /health", "Host: localhost", token=False))
        assert later.recv(65536).startswith(b"HTTP/1.1 200 ")
        later.sendall(b"GET /hea")
        assert b"HTTP/1.1" not in dribble(later, b"x")
    with place.connect() as unread:  # nor does a body that nobody asked for
        unread.sendall(place.head("GET /health", "Host: localhost", "Content-Length: 1000000", token=False))
        assert dribble(unread, b"x").startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: len(hosted.server.connections) == 0, "the connections")


def test_who_does_not_take_the_answer_is_cut_off(place: Place) -> None:
    hosted = place.serve(body_timeout_s=0.3)
    with place.connect(buffer_bytes=4096) as sock:
        sock.sendall(place.head("POST /much", "Host: localhost"))
        assert sock.recv(1)  # 100 MB have no room in the kernel
        wait_for(lambda: hosted.server.guard.in_flight == 0, "the end of the request")
        wait_for(lambda: len(hosted.server.connections) == 0, "the end of the connection")


def test_a_head_has_a_most_of_bytes(place: Place) -> None:
    place.serve()
    with place.connect() as sock:
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100_000)
        except OSError:
            return
        assert everything(sock)[:13] in (b"", b"HTTP/1.1 400 ")


def test_strangers_do_not_use_up_the_connections(place: Place) -> None:
    hosted = place.serve(max_connections=8)
    with httpx.Client(trust_env=False, headers=place.token, timeout=PATIENCE_S) as friend:
        assert friend.post(f"{place.url}/double", json=[1]).json() == [2]
        port = friend.get(f"{place.url}/health").extensions["network_stream"].get_extra_info("client_addr")
        strangers = [place.connect() for _ in range(50)]
        wait_for(lambda: len(hosted.server.connections) == 8, "the connections")
        again = friend.post(f"{place.url}/double", json=[2])
        assert again.json() == [4]
        assert again.extensions["network_stream"].get_extra_info("client_addr") == port  # the same connection
        assert place.ask([3]).json() == [6]  # a new one finds its place, too
        assert [everything(sock) for sock in strangers[:40]] == [b""] * 40
        assert len(hosted.server.connections) <= 8
        for sock in strangers:
            sock.close()


@pytest.mark.parametrize(("soft", "hard", "limit"), [(600, 600, 88), (600, 5000, 1024), (100, 100, 1)])
def test_a_server_holds_as_many_connections_as_it_may_open_files(soft: int, hard: int, limit: int) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "from hpc_rl.services.connections import Connections;"
        f"assert Connections(1024, 1.0).limit == {limit}"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    warned = f"max_connections: {limit} of 1024" in done.stderr and "services.NAME.max_connections" in done.stderr
    assert warned == (limit < 1024), done.stderr


def test_only_requests_for_the_service_keep_it_from_being_idle(place: Place) -> None:
    hosted = place.serve()
    server = hosted.server
    wait_for(lambda: server.idle_s > 0.05, "a moment")
    for route in ("/health", "/ready", "/metrics"):
        before = server.guard.last_request
        assert place.get(route, **place.token).status_code == 200
        assert server.guard.last_request == before
    place.model.may.clear()
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(place.ask, [1])
        wait_for(lambda: place.model.seen, "the model")
        assert server.idle_s == 0
        place.model.may.set()
        assert waiting.result().status_code == 200
    wait_for(lambda: server.idle_s > 0, "a moment")


def test_draining_turns_new_requests_away_and_answers_those_in_flight(place: Place) -> None:
    hosted = place.serve()
    place.model.may.clear()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(place.ask, [1])
        wait_for(lambda: place.model.seen, "the model")
        leaving = clients.submit(hosted.leave, PATIENCE_S)
        wait_for(lambda: hosted.server.guard.draining, "that it drains")
        refused = place.ask([2])
        assert refused.status_code == 503 and "leaving" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        wait_for(lambda: json.loads(hosted.publication.path.read_text())["state"] == "draining", "its record")
        place.model.may.set()
        assert first.result().json() == [2]
        leaving.result()
    assert not hosted.server.alive and not hosted.publication.path.exists() and place.model.seen == [1]


def test_a_model_that_hangs_does_not_keep_the_server(place: Place) -> None:
    hosted = place.serve()
    place.model.may.clear()
    with ThreadPoolExecutor(1) as clients:
        stuck = clients.submit(place.ask, [1])
        wait_for(lambda: place.model.seen, "the model")
        hosted.leave(0.1)
        assert stuck.result().status_code == 503 and "has left" in stuck.result().json()["detail"]
    assert not hosted.server.alive and not hosted.publication.path.exists()


def test_a_model_that_hangs_on_what_nobody_waits_for_does_not_keep_the_server(place: Place) -> None:
    hosted = place.serve()
    place.model.may.clear()
    with place.connect() as sock:
        sock.sendall(place.head("POST /double", "Host: localhost", "Content-Length: 3") + b"[2]")
        wait_for(lambda: place.model.seen, "the model")
    wait_for(lambda: hosted.server.guard.in_flight == 0, "the requests")
    hosted.leave(0.1)
    assert not hosted.server.alive


def test_an_overloaded_server_refuses_before_its_clients_lose_patience_and_nothing_is_lost(place: Place) -> None:
    """Its model does nothing until it has to refuse: without refusals, sixteen clients would hang up after 8 s."""
    hosted = place.serve(batch_size=1)
    place.model.may.clear()
    options = ClientConfig(url=place.url, timeout_s=8, max_retries=0, deadline_s=PATIENCE_S)
    clients = [ServiceClient(place.folder, options) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda number: clients[number].post("/double", [number]), range(16))
        wait_for(lambda: hosted.service.batcher.counters.refused > 0, "a refusal")
        place.model.may.set()
        assert list(answers) == [[2 * number] for number in range(16)]
    for client in clients:
        client.close()
    assert hosted.service.batcher.counters.refused > 0
    assert sum((client.troubles for client in clients), Counter()).keys() == {"busy"}


@pytest.mark.parametrize("limit", ["nan", "-1", "0", "soon", "", "inf"])
def test_a_time_limit_that_is_none_is_ignored(place: Place, limit: str) -> None:
    place.serve()
    assert place.ask([1], x_timeout_s=limit).json() == [2]


def test_a_request_has_its_turn_within_half_of_what_its_client_waits_or_is_told_so(place: Place) -> None:
    place.serve(batch_size=1, acquire_timeout_s=300)
    place.model.may.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(place.ask, [1])
        wait_for(lambda: place.model.seen, "the model")
        refused = place.ask([2], x_timeout_s="0.4")
        place.model.may.set()
        assert first.result(PATIENCE_S).json() == [2]
    assert refused.status_code == 503 and refused.json() == {"detail": "busy: no turn within 0.2 s"}
    assert int(refused.headers["Retry-After"]) >= 1
