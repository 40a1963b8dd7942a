"""Requests that are too large, too slow, too many, no HTTP or no JSON: each is refused, and the server stays well.

With the token, where there is a difference: what a stranger sends is not even read.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from hpc_rl.engines.yes_no import YesNoModel
from tests.waiting import PATIENCE_S, wait_for

from .every_service import SERVICES, Served, serve
from .raw import head, statuses, talk

MIB = 1 << 20
LIMITS: dict[str, Any] = {"max_body_bytes": MIB, "body_timeout_s": 60, "max_request_items": 100, "batch_wait_ms": 0}
MANY = {"listener": "/batch_score", "speaker": "/batch_describe", "reward_model": "/batch_score"}
"""Routes that take many items; the teacher has none."""
SMALL: dict[str, Any] = {
    "listener": {"candidate_paths": ["x"], "question": "?"},
    "speaker": {"image_path": "x"},
    "reward_model": {"question": "?", "solutions": ["x"]},
}
"""An item of theirs that is quickly read."""


@pytest.fixture(scope="module", params=SERVICES)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[Served]:
    with serve(request.param, model, tmp_path_factory.mktemp(request.param), **LIMITS) as made:
        yield made


@pytest.fixture(scope="module", params=SERVICES)
def hasty(request: Any, tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[Served]:
    """One that waits a second for what it is sent, for those who never send it."""
    with serve(
        request.param, model, tmp_path_factory.mktemp(request.param), **{**LIMITS, "body_timeout_s": 1.0}
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def as_well_as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("served", "hasty"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).is_well()


def post(served: Served, *lines: str, known: bool = True, path: str | None = None) -> bytes:
    """The head of a request to the service, without what says how long its body is."""
    bearer = [f"Authorization: Bearer {served.token}"] if known else []
    return head("POST", path or served.good[0], served.port, *bearer, "Content-Type: application/json", *lines)


def filled(field: str, item: Any) -> bytes:
    """A body, as large as may be, with a list of such items."""
    text = json.dumps(item).encode()
    return b'{"%s": [%s]}' % (field.encode(), b",".join([text] * ((MIB - 100) // (len(text) + 1))))


def test_a_body_that_is_announced_as_too_large_is_refused_unread(served: Served) -> None:
    for length in (100 * MIB, MIB + 1, 10**18):
        assert statuses(talk(served.port, post(served, f"Content-Length: {length}"))) == [413]
    assert statuses(talk(served.port, post(served, f"Content-Length: {10**30}"))) == [400]
    assert statuses(talk(served.port, post(served, f"Content-Length: {100 * MIB}", known=False))) == [401]


def test_a_hundred_megabytes_that_come_all_the_same_are_cut_off(served: Served) -> None:
    sent = 0

    def blocks(top: bytes, block: bytes) -> Iterator[bytes]:
        nonlocal sent
        sent = 0
        yield top
        for _ in range(100):
            yield block
            sent += 1

    announced = talk(served.port, blocks(post(served, f"Content-Length: {100 * MIB}"), bytes(MIB)))
    assert statuses(announced) in ([413], [])  # nobody may be there to read the answer, for the rest was not read
    assert sent < 100
    chunk = b"%x\r\n" % MIB + bytes(MIB) + b"\r\n"
    assert statuses(talk(served.port, blocks(post(served, "Transfer-Encoding: chunked"), chunk))) in ([413], [])
    assert sent < 100
    assert statuses(talk(served.port, blocks(post(served, "Transfer-Encoding: chunked", known=False), chunk))) in (
        [401],
        [],
    )
    assert sent < 100


def drops(top: bytes, body: bytes) -> Iterator[bytes]:
    yield top
    for byte in body:
        yield bytes([byte])


def test_a_body_that_comes_byte_by_byte_is_cut_off(hasty: Served) -> None:
    body = json.dumps(hasty.good[1]).encode() + b" " * 1000
    for lines in (["Transfer-Encoding: chunked"], [f"Content-Length: {len(body)}"]):
        parts = body if "Content" in lines[0] else b"1\r\n \r\n" * 1000
        assert statuses(talk(hasty.port, drops(post(hasty, *lines), parts), pause_s=0.05)) in ([408], [])


def test_a_body_that_never_comes_is_not_waited_for(hasty: Served) -> None:
    assert statuses(talk(hasty.port, post(hasty, "Content-Length: 10"))) == [408]
    assert statuses(talk(hasty.port, post(hasty, "Content-Length: 10", "Expect: 100-continue")))[-1] == 408
    assert statuses(talk(hasty.port, post(hasty, "Transfer-Encoding: chunked") + b"5\r\n")) == [408]


def test_a_head_that_comes_byte_by_byte_or_not_at_all_is_cut_off(hasty: Served) -> None:
    slow = post(hasty, *(f"X-{number}: {number}" for number in range(200)))
    assert talk(hasty.port, drops(b"", slow), pause_s=0.05) == b""
    assert talk(hasty.port, b"") == b""
    assert talk(hasty.port, b"POST") == b""
    assert talk(hasty.port, post(hasty)[:-2]) == b""


def test_an_answer_that_nobody_takes_is_not_waited_for(hasty: Served) -> None:
    ask = head("GET", "/openapi.json", hasty.port, f"Authorization: Bearer {hasty.token}").replace(
        b"Connection: close\r\n", b""
    )
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.settimeout(PATIENCE_S)
        sock.connect(("127.0.0.1", hasty.port))
        with pytest.raises(ConnectionError):
            while True:
                sock.sendall(ask)


def test_health_is_answered_while_many_are_slow(served: Served) -> None:
    with ExitStack() as stack:
        for number in range(100):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE_S))
            sock.sendall(post(served, "Content-Length: 1000", known=bool(number % 2))[: 10 + number * 3])
        big = json.dumps({"x": "y" * (MIB - 100)}).encode()
        whole = post(served, f"Content-Length: {len(big)}") + big
        field = "batch" if served.name in MANY else "messages"
        many = [filled(field, item) for item in ({}, SMALL.get(served.name, {"role": "user", "content": ""}))]
        path = MANY.get(served.name)
        listed = [post(served, f"Content-Length: {len(body)}", path=path) + body for body in many]
        loud = threading.Thread(target=lambda: [talk(served.port, said) for said in [whole, *listed] * 7])
        loud.start()
        for _ in range(20):
            assert served.ask("GET", "/health", headers={}).json()["status"] == "ok"
            time.sleep(0.01)
        loud.join()


@pytest.mark.parametrize("served", MANY, indirect=True)
def test_ten_thousand_items_are_refused_and_a_hundred_are_not(served: Served) -> None:
    path, (_, item), per_item = MANY[served.name], served.good, {"listener": 2}.get(served.name, 1)
    answer = served.ask("POST", path, json={"batch": [item] * (100 // per_item)})
    assert (answer.status_code, len(answer.json()["results"])) == (200, 100 // per_item)
    for count in (101, 10_000):
        answer = served.ask("POST", path, json={"batch": [SMALL[served.name]] * count})
        assert answer.status_code == 413 and len(answer.text) < 1000
    assert served.ask("POST", path, json={"batch": []}).json()["results"] == []


@pytest.mark.parametrize("kind", ["faulty", "good", "keys"])
def test_a_list_as_long_as_may_be_is_read_to_its_first_fault_and_no_further(served: Served, kind: str) -> None:
    """A fault for each item, or each field, would hold up everybody for seconds."""
    field = "batch" if served.name in MANY else "messages"
    item = {"batch": SMALL.get(served.name), "messages": {"role": "user", "content": ""}}[field]
    content = {
        "faulty": filled(field, {}),
        "good": filled(field, item),
        "keys": json.dumps({field: [{str(number): number for number in range(50_000)}]}).encode(),
    }[kind]
    path, headers = MANY.get(served.name, served.good[0]), {**served.known, "Content-Type": "application/json"}
    answer = served.ask("POST", path, content=content, headers=headers)
    assert answer.status_code == 422
    faults = [fault for fault in answer.json()["detail"] if field in fault["loc"]]
    missing = {"listener": 1, "reward_model": 2, "teacher": 2}.get(served.name, 1) if kind == "faulty" else 1
    assert len(faults) == missing and all(fault["loc"][2:3] in ([0], []) for fault in faults), faults


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-0", "1e-400", "9" * 400, "9" * 5000, "0x10", "1" + "0" * 20]
BODIES: dict[str, bytes] = {
    **{f"number {number[:9]}": b'{"topk": %s, "solutions": %s}' % ((number.encode(),) * 2) for number in NUMBERS},
    "nothing": b"",
    "no end": b"{",
    "null": b"null",
    "a number": b"1",
    "a text": b'"x"',
    "an array": b"[]",
    "deep arrays": b"[" * 100_000,
    "deep arrays that end": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"batch":' * 50_000,
    "deep in a field": b'{"batch": [%s]}' % (b"[" * 5_000 + b"]" * 5_000),
    "no UTF-8": b'{"question": "\xff\xfe"}',
    "cut UTF-8": b'{"question": "\xe2\x82',
    "UTF-16": '{"question": "x"}'.encode("utf-16"),
    "UTF-32": '{"question": "x"}'.encode("utf-32"),
    "BOM": b"\xef\xbb\xbf{}",
    "NUL": b"\0" * 100,
    "lone surrogates": b'{"question": "\\ud800", "image_path": "\\udfff", "\\ud801": "\\ud802"}',
    "a key as long as may be": b'{"%s": 1}' % (b"k" * (MIB - 100)),
    "many keys": json.dumps({str(number): number for number in range(50_000)}).encode(),
    "the same key again": b'{"question": 1, "question": 2}',
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "a form": b"question=x&candidate_paths=y",
    "secret": b'{"candidate_paths": ["/home/secret/x.png"], "image_path": "/home/secret/x.png", "topk": "secret"}',
}


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_is_no_such_json_is_refused_and_not_repeated(served: Served, body: str) -> None:
    for path in {served.good[0], MANY.get(served.name, served.good[0])}:
        headers = {**served.known, "Content-Type": "application/json"}
        answer = served.ask("POST", path, content=BODIES[body], headers=headers)
        assert answer.status_code in (400, 413, 422), (path, answer.text)
        assert answer.headers["content-type"] == "application/json" and "detail" in answer.json()
        assert answer.content.isascii() and len(answer.content) < 10_000 and "secret" not in answer.text


@pytest.mark.parametrize(
    "field", ["question", "candidate_paths", "image_path", "solutions", "image", "candidate_images"]
)
@pytest.mark.parametrize(
    "text", ['"\\ud800"', '"a\\u0000b"', '"\\udcff/x"', "1e400", "NaN", "[[]]", '{"a": NaN}', '[""]', "[NaN]"]
)
def test_a_good_body_with_one_bad_value_is_refused_or_an_error_of_its_item(
    served: Served, field: str, text: str
) -> None:
    path, body = served.good
    content = json.dumps({**body, field: 0}).replace(f'"{field}": 0', f'"{field}": {text}')
    headers = {**served.known, "Content-Type": "application/json"}
    answer = served.ask("POST", path, content=content, headers=headers)
    assert answer.status_code in (200, 422), answer.text
    if served.name not in MANY:
        return
    batch = served.ask("POST", MANY[served.name], content=f'{{"batch": [{content}]}}', headers=headers)
    assert batch.status_code in (200, 422), batch.text
    assert (answer.status_code == 200) <= (batch.status_code == 200)


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_of_another_kind_is_refused(served: Served, kind: str) -> None:
    """So that no page in a browser can send one without asking first (CORS)."""
    path, body = served.good
    headers = {**served.known, "Content-Type": kind}
    assert served.ask("POST", path, content=json.dumps(body), headers=headers).status_code == 422


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/JSON", "application/vnd.api+json"])
def test_json_by_another_name_is_taken(served: Served, kind: str) -> None:
    path, body = served.good
    headers = {**served.known, "Content-Type": kind}
    assert served.ask("POST", path, content=json.dumps(body), headers=headers).status_code == 200


SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["Content-Length: 6", "Transfer-Encoding: chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked", "Content-Length: 6"], b"0\r\n\r\n" + SMUGGLED),
        (["Content-Length: 0", "Content-Length: 44"], SMUGGLED),
        (["Content-Length: 0, 44"], SMUGGLED),
        (["Content-Length: +2"], b"{}" + SMUGGLED),
        (["Content-Length: -2"], b"{}" + SMUGGLED),
        (["Content-Length: 0x2"], b"{}" + SMUGGLED),
        (["Content-Length: 2 2"], b"{}" + SMUGGLED),
        (["Content-Length: \xb2"], b"{}" + SMUGGLED),
        (["Content-Length : 2"], b"{}" + SMUGGLED),
        (["Transfer-Encoding: xchunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked, identity"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: identity, chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: gzip"], SMUGGLED),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding : chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"-1\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"0x5\r\nhello\r\n0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"f" * 40 + b"\r\n" + SMUGGLED),
        (["X: y\rTransfer-Encoding: chunked"], SMUGGLED),
        (["X\0: y"], SMUGGLED),
    ],
)
def test_a_body_whose_length_can_be_read_in_two_ways_is_refused_and_hides_no_second_request(
    served: Served, lines: list[str], body: bytes
) -> None:
    for known in (True, False):
        asked = post(served, *lines, known=known).replace(b"Connection: close\r\n", b"")
        said = statuses(talk(served.port, asked + body))
        assert said in ([400], [401], [413], [422], [501]) and (known or said != [422]), said


def test_a_head_that_is_huge_or_no_http_is_refused(served: Served) -> None:
    huge = [f"X: {'y' * MIB}", *(f"X-{number}: {'y' * 100}" for number in range(20_000))]
    for top in (post(served, huge[0]), post(served, *huge[1:]), head("GET", "/" + "x" * MIB, served.port)):
        assert statuses(talk(served.port, top)) in ([400], [414], [431], [])
    nonsense = [b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200), b"\0" * 1000, b"\r\n" * 1000, b"GET\r\n\r\n"]
    nonsense += [b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
    for said in nonsense:
        assert statuses(talk(served.port, said)) in ([400], []), said


def test_a_second_request_behind_a_refused_one_is_not_answered(served: Served) -> None:
    body = json.dumps(served.good[1]).encode()
    good = post(served, f"Content-Length: {len(body)}") + body
    stranger = post(served, f"Content-Length: {len(body)}", known=False).replace(b"Connection: close\r\n", b"") + body
    assert statuses(talk(served.port, stranger + good)) == [401]
    known = good.replace(b"Connection: close\r\n", b"")
    assert statuses(talk(served.port, known + good)) == [200, 200]  # each brings its own token
    assert statuses(talk(served.port, known + stranger)) == [200, 401]


def is_left(served: Served) -> None:
    """Nobody of the tests above is still connected, but for the one connection that good requests share."""
    server = served.hosted.server
    wait_for(lambda: len(server.connections) <= 1 and not server.guard.in_flight, "the end of all connections")


def test_a_server_is_left_by_all_who_were_refused(served: Served) -> None:
    is_left(served)


def test_a_server_is_left_by_all_who_were_cut_off(hasty: Served) -> None:
    is_left(hasty)
