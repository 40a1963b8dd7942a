"""Who may ask: those with the run's token, and by the server's own name. Every route of every service, every method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hpc_rl.engines.yes_no import YesNoModel

from .every_service import SERVICES, Served, serve
from .raw import head, statuses, talk

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND")
# as they are written: a proxy, or a careless router, may read some of them as `/health`
PAGES = ["/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/", "/nowhere", "/health/", "/health/x"]
PAGES += [
    "//health",
    "/HEALTH",
    "/x/../health",
    "/%2e%2e/health",
    "/health%00",
    "/score/",
    "//score",
    "/static/../score",
]


@pytest.fixture(scope="module", params=SERVICES)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[Served]:
    with serve(request.param, model, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(autouse=True)
def as_well_as_before(served: Served) -> Iterator[None]:
    yield
    assert served.is_well()


def routes(served: Served) -> list[tuple[str, str]]:
    """Every method with every documented route and every page; not `/health`, which answers anybody."""
    paths = [*served.ask("GET", "/openapi.json").json()["paths"], *PAGES]
    every = [(method, path) for path in paths for method in METHODS]
    return [(method, path) for method, path in every if (method, path) not in (("GET", "/health"), ("HEAD", "/health"))]


def refused(answer: httpx.Response, served: Served) -> None:
    assert answer.status_code == 401, (answer.request.method, answer.url, answer.text)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.request.method == "HEAD" or list(answer.json()) == ["detail"]
    assert served.token not in str(answer.headers) + answer.text and "server" not in answer.headers


def test_without_a_token_every_route_is_refused_and_none_is_told_from_another(served: Served) -> None:
    answers = set()
    for method, path in routes(served):
        said = talk(served.port, head(method, path, served.port, "Content-Length: 0"))
        assert statuses(said) == [401], (method, path, said)
        top, _, body = said.partition(b"\r\n\r\n")
        answers.add((tuple(line for line in top.split(b"\r\n") if not line.lower().startswith(b"date:")), body))
    assert len({top for top, _ in answers}) == 1
    assert len({body for _, body in answers if body}) == 1


def test_whatever_is_not_the_token_is_refused(served: Served, tmp_path: Path, model: YesNoModel) -> None:
    with serve("reward_model", model, tmp_path) as another:
        assert another.token != served.token
        wrong = [f"Bearer {another.token}", "", "Bearer", "Bearer x", f"bearer {served.token}", served.token]
    wrong += [f"Bearer {served.token}x", f"Bearer {served.token[:-1]}", f"Bearer  {served.token}"]
    wrong += [f"Basic {served.token}", f"Bearer {served.token},Bearer {served.token}", f"Bearer {served.token.lower()}"]
    wrong += [f"Bearer x, Bearer {served.token}", f"Bearer {served.token} x", "Bearer \xff\xfe", "Bearer " + "x" * 8000]
    for method, path in (("POST", served.good[0]), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/ready")):
        for value in wrong:
            headers = {"Authorization": value.encode("latin-1")}
            refused(served.ask(method, path, headers=headers, json=served.good[1]), served)


def test_a_token_anywhere_else_than_in_its_header_is_refused(served: Served) -> None:
    bearer = f"Bearer {served.token}"
    path, body = served.good
    places: list[dict[str, Any]] = [{"params": {name: served.token}} for name in ("token", "access_token", "key")]
    places += [{"headers": {name: bearer}} for name in ("Proxy-Authorization", "X-Authorization", "X-Api-Key")]
    places += [{"headers": {"Cookie": f"token={served.token}; Authorization={bearer}"}}]
    places += [{"headers": [("Authorization", bearer), ("Authorization", bearer)]}]
    places += [{"headers": [("Authorization", bearer), ("Authorization", "Bearer x")]}]
    places += [{"headers": [("Authorization", "Bearer x"), ("Authorization", bearer)]}]
    for place in places:
        refused(served.ask("POST", path, **{"json": body, "headers": {}, **place}), served)
    folded = head("GET", "/metrics", served.port, "Authorization: Bearer", f" {served.token}x")
    assert statuses(talk(served.port, folded)) == [401]


def test_with_the_token_a_route_answers_or_is_not_there(served: Served) -> None:
    bearer = f"Authorization: Bearer {served.token}"
    for method, path in routes(served):
        (status,) = statuses(talk(served.port, head(method, path, served.port, bearer, "Content-Length: 0")))
        assert status in (200, 307, 404, 405, 422), (method, path)
        assert status != 200 or path in (
            "/v1/models",
            "/docs",
            "/docs/oauth2-redirect",
            "/redoc",
            "/openapi.json",
            "/ready",
            "/metrics",
        )


def test_health_tells_strangers_that_it_lives_and_who_it_is_and_no_more(served: Served) -> None:
    nonce = served.hosted.publication.endpoint.nonce
    for headers in ({}, {"Authorization": "Bearer x"}):
        assert served.ask("GET", "/health", headers=headers).json() == {"status": "ok", "nonce": nonce}
    assert served.ask("HEAD", "/health", headers={}).status_code == 200
    assert {"service", "waiting_items", "counters", "weights_hash"} <= set(served.ask("GET", "/health").json())


def test_a_request_by_another_name_is_refused_even_with_the_token(served: Served) -> None:
    """So that a page in somebody's browser, whose name leads here for a moment, is told nothing (DNS rebinding)."""
    port = served.port
    foreign = ["evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.2"]
    foreign += ["10.0.0.1", "[2001:db8::1]", f"[2001:db8::1]:{port}", "0.0.0.0", "127.1", "2130706433", "0x7f000001"]
    malformed = ["", f"127.0.0.1:{port}@evil.example", "user@127.0.0.1", "127.0.0.1 evil", "127.0.0.1/x", "[::1", ":80"]
    malformed += ["127.0.0.1:port", "127.0.0.1:80:80", "evil.example, 127.0.0.1"]
    for path in ("/health", "/metrics", "/docs", "/nowhere", served.good[0]):
        for name in foreign:
            assert served.ask("GET", path, headers={**served.known, "Host": name}).status_code == 421, name
        for name in malformed:
            said = talk(port, f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
            assert statuses(said) in ([400], [421]), (name, said)


def test_a_request_with_no_name_or_several_is_refused(served: Served) -> None:
    bearer, here = f"Authorization: Bearer {served.token}", f"Host: 127.0.0.1:{served.port}"
    for lines in ([], [here, here], [here, "Host: evil.example"], ["Host: evil.example", here]):
        asked = "\r\n".join(["GET /health HTTP/1.1", bearer, *lines, "", ""])
        assert statuses(talk(served.port, asked.encode())) == [400], lines
    assert statuses(talk(served.port, f"GET /health HTTP/1.0\r\n{bearer}\r\n\r\n".encode())) == [400]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST.", "[::1]", "[::ffff:127.0.0.1]:80"])
def test_its_own_names_are_taken_with_any_port(served: Served, name: str) -> None:
    assert served.ask("GET", "/health", headers={"Host": name}).status_code == 200


def test_a_whole_address_as_the_target_is_no_way_round_the_name_or_the_token(served: Served) -> None:
    bearer = f"Authorization: Bearer {served.token}"
    for target in (
        "http://evil.example/health",
        "http://evil.example/metrics",
        "//evil.example/health",
        "*",
        "evil:80",
    ):
        strange = statuses(talk(served.port, head("GET", target, served.port)))
        assert strange in ([400], [401], [421]), target
        known = statuses(talk(served.port, head("GET", target, served.port, bearer)))
        assert known in ([400], [404], [421]), target
    whole = head("GET", f"http://127.0.0.1:{served.port}/metrics", served.port, host="evil.example")
    assert statuses(talk(served.port, whole)) in ([400], [401], [421])
    assert statuses(talk(served.port, head("CONNECT", "evil.example:80", served.port))) in ([400], [401], [421])
    forwarded = (
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Host: localhost",
        "X-Original-URL: /health",
        "X-Real-IP: ::1",
    )
    assert statuses(talk(served.port, head("GET", "/metrics", served.port, *forwarded))) == [401]
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    assert statuses(talk(served.port, head("GET", "/metrics", served.port, *upgrade))) in ([400], [401])
