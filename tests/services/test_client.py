"""The client against real servers that die, lie, refuse, fail and come back; it never makes a score up."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest

from hpc_rl.config.clients import ClientConfig
from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.services import client as client_module
from hpc_rl.services import handoff
from hpc_rl.services import replicas as replicas_module
from hpc_rl.services.calling import ServiceClient, ServiceRefused
from hpc_rl.services.client import (
    ListenerClient,
    ScoreError,
    ScoreRequest,
    ScoreResult,
)
from tests.waiting import PATIENCE_S, wait_for

from .conftest import PIXELS, Lab
from .unavailable import is_unavailable

PATHS = tuple(f"a/{number}.png" for number in range(6))


def games(number: int, candidates: int = 3) -> list[ScoreRequest]:
    return [ScoreRequest(f"red {i}?", PATHS[i % 3 : i % 3 + candidates]) for i in range(number)]


def client(lab: Lab, **options: Any) -> ListenerClient:
    return ListenerClient(lab.ws, lab.config(client=options), rng=random.Random(0))


def test_scores_come_in_the_order_of_the_questions(lab: Lab) -> None:
    lab.serve()
    with client(lab, chunk_size=3) as listener:
        scores = listener.score(games(10))
        one_by_one = [ListenerClient(lab.ws, lab.config()).score([game])[0] for game in games(10)]
    for score, alone in zip(scores, one_by_one, strict=True):
        assert isinstance(score, ScoreResult) and isinstance(alone, ScoreResult)
        assert score.yes_probabilities == pytest.approx(alone.yes_probabilities, abs=1e-5)
        assert score.predicted_index == alone.predicted_index


def test_what_was_asked_is_not_asked_again_and_the_order_of_candidates_counts(lab: Lab) -> None:
    hosted = lab.serve()
    game, turned = ScoreRequest("red?", ("a/0.png", "a/1.png")), ScoreRequest("red?", ("a/1.png", "a/0.png"))
    with client(lab) as listener:
        first, again, other = listener.score([game, game, turned])
        assert first == again and hosted.service.batcher.counters.items == 4
        assert isinstance(first, ScoreResult) and isinstance(other, ScoreResult)
        assert other.yes_probabilities[::-1] == pytest.approx(first.yes_probabilities, abs=1e-5)
        assert other.predicted_index == 1 - first.predicted_index
        assert listener.score([turned, game]) == [other, first]
        assert hosted.service.batcher.counters.items == 4


def test_the_cache_is_bounded_and_keeps_what_was_used_last(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CACHE_ENTRIES", 4)
    lab.serve()
    with client(lab) as listener:
        asked = games(4)
        listener.score(asked)
        listener.score([asked[0], *games(6)[4:]])
        assert set(listener._cache) == {asked[0], asked[3], *games(6)[4:]}


def test_an_item_that_cannot_be_scored_is_an_error_and_the_others_are_not(lab: Lab) -> None:
    lab.serve()
    with client(lab) as listener:
        good, bad = listener.score([games(1)[0], ScoreRequest("red?", ("a/0.png", "a/none.png"))])
    assert isinstance(good, ScoreResult)
    assert isinstance(bad, ScoreError) and bad.message.startswith("candidate 1: there is no such image")


def test_calls_are_spread_over_the_replicas(lab: Lab) -> None:
    replicas = [lab.serve(f"r{i}") for i in range(2)]
    with client(lab, chunk_size=1) as listener:

        def spread() -> bool:  # the first of them may have done a lot before the second has said who it is
            listener._cache.clear()
            listener.score(games(40))
            return all(hosted.service.batcher.counters.requests >= 5 for hosted in replicas)

        wait_for(spread, "calls of both")


class Broken(YesNoModel):
    """A listener that fails the first `failures` times."""

    failures = 10**9

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.asked_at: list[float] = []

    def yes_probabilities(self, pairs: Any) -> Any:
        self.asked_at.append(time.monotonic())
        if self.failures:
            self.failures -= 1
            raise RuntimeError("a kernel did not launch")
        return super().yes_probabilities(pairs)


@pytest.fixture
def broken(listener_folder: Any) -> Broken:
    return Broken(str(listener_folder), **PIXELS)


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_a_server_that_fails_is_asked_again_exactly_as_often_as_the_config_says(
    lab: Lab, broken: Broken, retries: int
) -> None:
    hosted = lab.serve(model=broken)
    with client(lab, max_retries=retries, chunk_size=8) as listener:
        scores = listener.score(games(3))
    assert hosted.service.batcher.counters.failed_batches == retries + 1
    assert all(isinstance(score, ScoreError) and f"tried {retries + 1} times" in score.message for score in scores)


def test_the_waits_between_repeats_double_from_the_backoff_factor(lab: Lab, broken: Broken) -> None:
    lab.serve(model=broken)
    with client(lab, max_retries=2, backoff_factor=0.2) as listener:
        listener.score(games(1))
    first, second = (after - before for before, after in pairwise(broken.asked_at))
    assert first >= 0.2 and second >= 0.4
    with ServiceClient(lab.ws.root, ClientConfig(backoff_factor=7), rng=random.Random(0)) as calling:
        for failures, base in ((1, 7), (2, 14), (3, 28)):
            waits = {calling.backoff_s(failures) for _ in range(20)}
            assert len(waits) == 20 and all(base <= wait <= 1.25 * base for wait in waits)


def test_a_failure_that_passes_costs_nothing(lab: Lab, broken: Broken) -> None:
    broken.failures = 2
    lab.serve(model=broken)
    with client(lab, max_retries=3, chunk_size=8) as listener:
        assert all(isinstance(score, ScoreResult) for score in listener.score(games(3)))


class Slow(YesNoModel):
    """A listener that answers when it is let."""

    def yes_probabilities(self, pairs: Any) -> Any:
        self.entered.set()  # type: ignore[attr-defined]
        self.release.wait(PATIENCE_S)  # type: ignore[attr-defined]
        self.left.set()  # type: ignore[attr-defined]
        return super().yes_probabilities(pairs)


@pytest.fixture
def slow(listener_folder: Any) -> Iterator[Any]:
    model: Any = Slow(str(listener_folder), **PIXELS)  # type: ignore[arg-type]
    model.release, model.entered, model.left = threading.Event(), threading.Event(), threading.Event()
    yield model
    model.release.set()


def test_an_answer_that_takes_too_long_is_a_failure_and_not_a_score(lab: Lab, slow: Any) -> None:
    lab.serve(model=slow, inference_concurrency=2)  # so that the repeat has its turn too
    with client(lab, timeout_s=0.3, max_retries=1) as listener:
        (score,) = listener.score(games(1))
    assert isinstance(score, ScoreError) and "took longer than 0.3 s; tried 2 times" in score.message


def kill(hosted: Any) -> None:
    """End a server as a crash would: connections break, its record stays."""
    hosted.publication._stop.set()
    server = hosted.server._server
    for connection in list(server.server_state.connections):
        connection.loop.call_soon_threadsafe(connection.transport.abort)
    server.force_exit = True
    hosted.server.stop()


def test_another_replica_takes_over_from_one_that_is_killed_in_the_middle_of_a_call(lab: Lab, slow: Any) -> None:
    expected = undisturbed(lab, games(20))
    dying = lab.serve("dying", model=slow)
    with client(lab, chunk_size=5, max_retries=0) as listener, ThreadPoolExecutor(1) as background:
        answer = background.submit(listener.score, games(20))
        wait_for(slow.entered.is_set, "the model")
        heir = lab.serve("heir")
        kill(dying)
        scores = answer.result(PATIENCE_S)
    assert_same(scores, expected)
    assert heir.service.batcher.counters.items > 0


def test_a_server_that_must_stop_at_once_sends_its_clients_to_another_one(lab: Lab, slow: Any) -> None:
    expected = undisturbed(lab, games(20))
    leaving = lab.serve("leaving", model=slow)
    with client(lab, chunk_size=5, max_retries=0) as listener, ThreadPoolExecutor(1) as background:
        answer = background.submit(listener.score, games(20))
        wait_for(slow.entered.is_set, "the model")
        lab.serve("heir")
        leaving.leave(0.0)
        assert not slow.left.is_set(), "it did not wait for the model"
        assert_same(answer.result(PATIENCE_S), expected)


def undisturbed(lab: Lab, asked: list[ScoreRequest]) -> list[Any]:
    hosted = lab.serve("first")
    with client(lab) as listener:
        scores = listener.score(asked)
    hosted.leave(1.0)
    return scores


def assert_same(scores: list[Any], expected: list[Any]) -> None:
    for score, other in zip(scores, expected, strict=True):
        assert isinstance(score, ScoreResult) and score.predicted_index == other.predicted_index
        assert score.yes_probabilities == pytest.approx(other.yes_probabilities, abs=1e-5)


def test_the_client_waits_for_a_server_that_is_not_there_yet(lab: Lab) -> None:
    expected = undisturbed(lab, games(4))
    with client(lab, max_retries=0) as listener, ThreadPoolExecutor(1) as background:
        answer = background.submit(listener.score, games(4))
        wait_for(lambda: "no server is published" in listener._service._replicas.problem, "that it finds none")
        lab.serve()
        assert_same(answer.result(PATIENCE_S), expected)


def test_when_the_deadline_passes_there_is_an_exception_and_no_score(lab: Lab) -> None:
    with client(lab) as listener:
        is_unavailable(listener._service, "no server is published in", lambda: listener.score(games(4)))
    kill(lab.serve())
    with client(lab) as listener:
        is_unavailable(listener._service, r"does not answer \(Conn", lambda: listener.score(games(4)))


def test_a_busy_server_is_asked_again_later_and_that_costs_no_retry(lab: Lab, slow: Any) -> None:
    hosted = lab.serve(model=slow, batch_size=3, max_queue_items=3, max_client_items=3)
    with client(lab, chunk_size=1, max_retries=0) as listener, ThreadPoolExecutor(1) as background:
        answer = background.submit(listener.score, games(6))
        wait_for(lambda: hosted.service.batcher.counters.refused >= 1, "a refusal")
        slow.release.set()
        assert all(isinstance(score, ScoreResult) for score in answer.result(PATIENCE_S))


def test_a_chunk_that_is_too_large_for_the_server_is_cut(lab: Lab) -> None:
    lab.serve(max_queue_items=6)
    with client(lab, chunk_size=32) as listener:
        scores = listener.score(games(16))
    assert all(isinstance(score, ScoreResult) for score in scores)


def test_calls_keep_their_distance_when_asked_to(lab: Lab) -> None:
    lab.serve()
    with client(lab, chunk_size=1, chunk_delay_s=0.1) as listener:
        started = time.monotonic()
        listener.score(games(6))
        assert time.monotonic() - started >= 0.5


class Impostor(BaseHTTPRequestHandler):
    """Something else that answers on a port where a listener used to be."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def _answer(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        body = (
            b'{"status": "ok", "nonce": "another", "results": [{"yes_probabilities": [1, 0, 0], "predicted_index": 0}]}'
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def impostor() -> Iterator[Any]:
    handler = type("Handler", (Impostor,), {"seen": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_whatever_answers_at_a_dead_servers_address_is_not_asked_and_never_sees_the_token(
    lab: Lab, impostor: Any
) -> None:
    folder = lab.ws.service_dir("listener")
    handoff.run_token(folder)
    stale = handoff.publish(folder, "listener", "stale", "127.0.0.1", impostor.server_port, heartbeat_s=60)
    with client(lab) as listener:
        is_unavailable(listener._service, "is not the server that was", lambda: listener.score(games(1)))
    seen = impostor.RequestHandlerClass.seen
    assert seen and all(path == "/health" and token is None for path, token in seen)
    lab.serve("good")
    with client(lab) as listener:
        assert all(isinstance(score, ScoreResult) and score.predicted_index != 9 for score in listener.score(games(8)))
    assert all(path == "/health" and token is None for path, token in seen)
    stale.unpublish()


def test_a_stale_record_of_a_host_that_swallows_packets_does_not_slow_the_others_down(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "HEALTH_TIMEOUT_S", 600.0)  # who waited for its answer would never end
    with socket.socket() as swallowing:  # accepts by the kernel, never answers
        swallowing.bind(("127.0.0.1", 0))
        swallowing.listen(64)
        folder = lab.ws.service_dir("listener")
        lab.serve("good")
        with client(lab, chunk_size=1) as listener:
            listener.score(games(1))
            stale = handoff.publish(
                folder, "listener", "stale", "127.0.0.1", swallowing.getsockname()[1], heartbeat_s=60
            )
            replicas = listener._service._replicas

            def it_is_asked_who_it_is() -> bool:
                replicas._read_at = float("-inf")
                listener._cache.clear()
                listener.score(games(1))
                found = replicas._known.get(stale.endpoint.nonce)
                return found is not None and found.proof is not None

            wait_for(it_is_asked_who_it_is, "a look at the folder")
            assert all(isinstance(score, ScoreResult) for score in listener.score(games(12)))
        stale.unpublish()


def test_a_wrong_token_is_an_error_that_names_the_token_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.serve()
    monkeypatch.setenv("LISTENER_TOKEN", "of another run")
    with (
        client(lab) as listener,
        pytest.raises(ServiceRefused, match=r"401.*in LISTENER_TOKEN, .*services/listener/token"),
    ):
        listener.score(games(1))


def test_a_given_url_is_used_and_nothing_is_looked_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    hosted = lab.serve()
    monkeypatch.setenv("LISTENER_TOKEN", lab.token)
    elsewhere = Lab(type(lab.ws)(lab.ws.root / "elsewhere"), lab.model, lab.pictures, [])
    url = f"{hosted.publication.endpoint.url}/batch_score"
    with client(elsewhere, url=url) as listener:
        assert isinstance(listener.score(games(1))[0], ScoreResult)
    monkeypatch.setenv("LISTENER_URL", url)
    with client(elsewhere) as listener:
        assert isinstance(listener.score(games(1))[0], ScoreResult)


def test_proxies_of_the_environment_are_ignored(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    lab.serve()
    with client(lab) as listener:
        assert isinstance(listener.score(games(1))[0], ScoreResult)
