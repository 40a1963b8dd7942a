"""What a server tells of itself: `/metrics`, parsed as Prometheus does, and event files that TensorBoard reads."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from fastapi import Request
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_rl.config.services import ServiceConfig
from hpc_rl.services import handoff
from hpc_rl.services.address import Address
from hpc_rl.services.frame import Desk, Service, TokenCounts
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.services.openapi import REFUSALS, new_app
from tests.waiting import PATIENCE_S, wait_for

from .conftest import Lab
from .raw import head


class Lengths:
    """A model for words: how long each is. It waits when told to, and cannot take an empty one."""

    def __init__(self) -> None:
        self.tokens, self.go = TokenCounts(), Event()
        self.go.set()

    def __call__(self, words: Sequence[str]) -> list[int]:
        self.go.wait(PATIENCE_S)
        if "" in words:
            raise ValueError("no word")
        self.tokens.prompt += sum(len(word) for word in words)
        self.tokens.completion += len(words)
        return [len(word) for word in words]


def service_of(model: Lengths, options: ServiceConfig) -> Service:
    app = new_app("lengths")
    desk: Desk[str, int] = Desk(model, options)

    @app.post("/lengths", responses=REFUSALS)
    async def lengths(request: Request, words: list[str]) -> list[int]:
        return await desk.ask(request, words)

    return Service(
        "lengths",
        app,
        desk.batcher,
        "0123456789abcdef",
        tokens=model.tokens,
        details=lambda: {"word_cache": {"hits": 3, "misses": 1}},
    )


class Bench:
    """A server for words, and what it says."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model, self.folder = Lengths(), folder
        self.options = ServiceConfig(batch_wait_ms=0, **options)
        self.hosted = self.open()

    def open(self, environ: dict[str, str] | None = None) -> Hosted:
        return host(
            service_of(self.model, self.options),
            folder=self.folder / "services" / "lengths",
            address=Address("127.0.0.1", "127.0.0.1"),
            options=self.options,
            environ=environ or {"HPC_RL_JOB_ID": "7"},
            tensorboard=self.folder / "tb",
        )

    @property
    def token(self) -> str:
        return handoff.read_token(self.folder / "services" / "lengths")

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)

    def ask(self, *words: str) -> httpx.Response:
        return self.request("POST", "/lengths", json=words)

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        url = self.hosted.publication.endpoint.url
        return httpx.request(
            method, f"{url}{path}", **{"headers": headers, "trust_env": False, "timeout": PATIENCE_S, **more}
        )

    def numbers(self) -> dict[str, float]:
        """What `/metrics` says, by name and labels."""
        text = self.get("/metrics").text
        return {
            sample.name + "".join(f"/{value}" for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def points(self) -> dict[str, list[Any]]:
        """What TensorBoard shows of replica 7."""
        shown = EventAccumulator(str(self.folder / "tb" / "job-7"))
        shown.Reload()
        return {name: shown.Scalars(name) for name in shown.Tags()["scalars"]}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, batch_size=2, max_queue_items=6, max_client_items=6, metrics_s=0.1)
    yield made
    made.model.go.set()
    made.hosted.leave(1.0)


def test_metrics_counts_what_was_asked_answered_and_refused(bench: Bench) -> None:
    assert bench.ask("a", "bb", "ccc").json() == [1, 2, 3]
    assert bench.ask("").status_code == 500
    assert bench.ask(*"abcdefg").status_code == 413
    assert bench.get("/lengths", headers={}).status_code == 401
    assert bench.get("/no/such/page").status_code == 404
    said = bench.numbers()
    prefix = "hpc_rl_service_"
    found = {name.removeprefix(prefix): value for name, value in said.items() if name.startswith(prefix)}
    expected = {
        "items_total": 4,
        "batch_items_count": 3,
        "batch_items_sum": 4,
        "batch_items_bucket/1.0": 2,
        "batch_items_bucket/2.0": 3,
        "model_seconds_count": 3,
        "failed_batches_total": 1,
        "tokens_total/prompt": 6,
        "tokens_total/completion": 3,
        "cache_lookups_total/word_cache/hit": 3,
        "cache_lookups_total/word_cache/miss": 1,
        "answers_total//lengths/200": 1,
        "answers_total//lengths/500": 1,
        "answers_total//lengths/413": 1,
        "answers_total//lengths/401": 1,
        "answers_total/other/404": 1,
        "request_seconds_count//lengths": 4,
        "info/lengths/0123456789ab": 1,
        "queue_items": 0,
        "queue_clients": 0,
        "draining": 0,
        "connections": 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert 0 < found["model_seconds_sum"] < found["request_seconds_sum//lengths"]
    assert said["process_resident_memory_bytes"] > 1e6


def test_metrics_shows_what_waits_and_what_is_refused_while_the_model_is_busy(bench: Bench) -> None:
    bench.model.go.clear()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(bench.ask, "a", "b")
        batcher = bench.hosted.service.batcher
        wait_for(lambda: batcher.counters.requests == 1 and not batcher.waiting, "the first in the model")
        second = clients.submit(bench.ask, "c", "d")
        wait_for(lambda: batcher.waiting == 2, "the second in the queue")
        refusals = [bench.ask(*"efghi").status_code for _ in range(3)]
        busy = bench.numbers()
        bench.model.go.set()
        assert [first.result().json(), second.result().json()] == [[1, 1], [1, 1]]
    assert busy["hpc_rl_service_queue_items"] == 2 and busy["hpc_rl_service_queue_clients"] == 1
    assert busy["hpc_rl_service_requests_in_flight"] == 2
    assert busy["hpc_rl_service_refused_requests_total"] == 3
    assert sum(busy.get(f"hpc_rl_service_answers_total//lengths/{status}", 0) for status in set(refusals)) == 3
    wait_for(lambda: bench.numbers()["hpc_rl_service_requests_in_flight"] == 0, "the end of both")


def test_metrics_counts_who_hangs_up(bench: Bench) -> None:
    bench.model.go.clear()
    port, batcher = bench.hosted.server.port, bench.hosted.service.batcher
    lines = ["Content-Type: application/json", f"Authorization: Bearer {bench.token}", "Content-Length: 5"]
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(head("POST", "/lengths", port, *lines) + b'["a"]')
        wait_for(lambda: batcher.counters.requests == 1, "the request")
    wait_for(lambda: bench.numbers().get("hpc_rl_service_answers_total//lengths/499") == 1, "its end")
    assert bench.numbers()["hpc_rl_service_abandoned_requests_total"] == 1


def test_metrics_wants_the_token_and_has_the_type_that_prometheus_expects(bench: Bench) -> None:
    assert bench.get("/metrics", headers={}).status_code == 401
    assert bench.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_strangers_cannot_make_new_series(bench: Bench) -> None:
    bench.get("/metrics")
    before = set(bench.numbers())
    for number in range(20):
        bench.get(f"/page/{number}", headers={})
    assert {name for name in set(bench.numbers()) - before if "answers" in name} <= {
        "hpc_rl_service_answers_total/other/401",
        "hpc_rl_service_answers_created/other/401",
        "hpc_rl_service_answers_total//metrics/200",
        "hpc_rl_service_answers_created//metrics/200",
    }


def test_two_servers_of_one_process_count_for_themselves(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "other")
    try:
        bench.ask("a", "b")
        other.ask("c")
        assert (bench.numbers()["hpc_rl_service_items_total"], other.numbers()["hpc_rl_service_items_total"]) == (2, 1)
    finally:
        other.hosted.leave(1.0)


def test_the_listener_shows_its_caches(lab: Lab) -> None:
    url = lab.serve().publication.endpoint.url
    headers = {"Authorization": f"Bearer {lab.token}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE_S) as http:
        for _ in range(2):
            game = {"candidate_paths": ["a/0.png", "a/1.png"], "question": "red?"}
            assert http.post("/score", json=game).status_code == 200
        text = http.get("/metrics").text
    assert 'hpc_rl_service_cache_lookups_total{cache="answer_cache",outcome="hit"} 2.0' in text
    assert 'hpc_rl_service_cache_lookups_total{cache="image_cache",outcome="miss"} 2.0' in text


def test_tensorboard_shows_what_was_done_between_two_points_and_what_was_done_last(bench: Bench) -> None:
    bench.ask("a", "bb", "ccc")
    wait_for(lambda: any(point.value for point in bench.points().get("per_second/items", [])), "a point")
    bench.ask("")
    bench.hosted.leave(1.0)
    shown = bench.points()
    # two and one item, then a bad one: where a point lies between two batches is a matter of time
    assert [point.value for point in shown["model/mean_batch_items"]] in ([1.5, 1.0], [2.0, 1.0, 1.0], [2.0, 1.0])
    for name in ("items", "batches", "prompt_tokens", "completion_tokens", "errors"):
        assert sum(point.value > 0 for point in shown[f"per_second/{name}"]) in (1, 2, 3), name
    assert not any(point.value for point in shown["per_second/refusals"])
    assert all(0 < low.value <= high.value for low, high in zip(*latency(shown), strict=True))
    assert all(point.value == 0 for point in shown["queue/items"])
    steps = [point.step for point in shown["queue/items"]]
    assert steps == sorted(set(steps)) and steps[0] == 0


def latency(shown: dict[str, list[Any]]) -> list[list[Any]]:
    return [shown["latency/p50_seconds"], shown["latency/p99_seconds"]]


def test_a_replica_that_comes_back_goes_on_where_its_figures_were(tmp_path: Path) -> None:
    folder = tmp_path / "tb" / "job-7"
    folder.mkdir(parents=True)
    (folder / f"events.out.tfevents.{int(time.time()) - 1000}.node-01.1.0").touch()
    bench = Bench(tmp_path)
    bench.hosted.leave(1.0)
    assert [point.step >= 1000 for point in bench.points()["queue/items"]] == [True]


def test_nothing_is_written_where_no_folder_is_given(tmp_path: Path, lab: Lab) -> None:
    assert lab.serve().board is None


def test_a_folder_that_cannot_be_written_costs_a_line_in_the_log_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tb").write_text("a file")
    with caplog.at_level(logging.WARNING):
        bench = Bench(tmp_path, metrics_s=0.01)
        wait_for(lambda: caplog.messages, "the line")
        assert bench.ask("a").json() == [1]
        bench.hosted.leave(1.0)
    (line,) = caplog.messages
    assert "no more figures for TensorBoard" in line and str(tmp_path / "tb") in line


FULL = """
import asyncio, resource, sys, time
from pathlib import Path
from hpc_rl.config.services import ServiceConfig
from hpc_rl.services.frame import Desk, Service
from hpc_rl.services.openapi import new_app
from hpc_rl.services.metrics import Board, Metrics

folder = Path(sys.argv[1])
service = Service("echo", new_app("echo"), Desk(list, ServiceConfig()).batcher, "")
board = Board(Metrics(service), folder, 0.05)
while not list(folder.glob("*")):
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))  # as if the disk were full: no file can grow
board._thread.join(100)
print(asyncio.run(service.batcher.submit(["a"], 100)))
board.close()
"""


def test_a_disk_that_is_full_ends_the_figures_and_not_the_service(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (0, "['a']\n"), done.stderr
    assert done.stderr.count("no more figures for TensorBoard") == 1
