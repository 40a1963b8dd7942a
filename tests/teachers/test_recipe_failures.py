"""A teacher that misbehaves while real jobs grade and enhance (S2, S3): the same files, and no answer is paid twice."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from jobs.prosetting import enhance, grade
from tests.jobs.listening import arguments
from tests.jobs.solver_round import by_rules, new_round, tables
from tests.teachers.server import Behaviour, Misbehave, Teacher, of
from tests.waiting import PATIENCE_S, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
BODIES = {"grade": grade, "enhance": enhance}
CALLS = {"grade": 36 + 8, "enhance": 12}
"""Different attempts that are not right, as `judge: not_right` says, and checked references; variants."""
PARALLEL = 4
SOME = 3
"""Fewer than any shard of enhance asks for."""
Files = dict[str, pa.Table]


class Endpoint:
    """A teacher that follows the rules of sums, and rounds that ask it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, Teacher()
        self.server.right = lambda body: by_rules({**body, "seed": 0})  # which a question that is asked again changes

    def round(self, name: str = "run", **client: Any) -> Workspace:
        options = {
            "url": self.server.url, "backoff_factor": 0.01, "deadline_s": PATIENCE_S, "parallel_calls": PARALLEL,
            "max_retries": 3, "structured": "none", **client,
        }  # fmt: skip
        return new_round(self.folder / name, services={"teacher": {"client": options}})

    def all_paid_once(self, calls: int) -> bool:
        return set(self.server.paid.values()) == {1} and len(self.server.paid) == calls


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path)
    yield made
    made.server.die()


def files_of(ws: Workspace) -> Files:
    return tables(ws, "grade") | tables(ws, "enhance")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What grade and enhance write when nothing goes wrong."""
    made = Endpoint(tmp_path_factory.mktemp("undisturbed"))
    ws = made.round()
    assert grade.main(arguments(ws)) == 0 and made.all_paid_once(CALLS["grade"])
    assert enhance.main(arguments(ws)) == 0 and made.all_paid_once(sum(CALLS.values()))
    made.server.die()
    return files_of(ws)


TROUBLES: dict[str, Misbehave | str] = {
    "429 with Retry-After": Misbehave(429, {"Retry-After": "0.1"}),
    "429 without": Misbehave(429),
    "500": Misbehave(500),
    "502 of a proxy": Misbehave(502, {"content-type": "text/html"}, b"<html>bad gateway</html>"),
    "a closed connection": Misbehave(hang_up=True),
    "half a JSON": Misbehave(body=b'{"choices": [{"message": {"content": "{"'),
    "an answer that is no JSON": "It is right, I think.",
    "JSON of something else": '{"verdict": true}',
}


TIMEOUT_S = 2.0


def first_times() -> Behaviour:
    """The first time that something is asked it is treated badly: the n-th question by the n-th trouble, in turn.

    The very first gets no answer in time.
    """
    seen: set[Any] = set()
    lock = threading.Lock()

    def behave(call: int, body: dict[str, Any]) -> Misbehave | str | None:
        with lock:
            if len(body["messages"]) > 2 or of(body) in seen:
                return None
            seen.add(of(body))
            if len(seen) > 1:
                return list(TROUBLES.values())[len(seen) % len(TROUBLES)]
        return Misbehave(500, delay_s=TIMEOUT_S + 1)

    return behave


def test_troubles_of_all_kinds_change_no_grade_and_no_question(endpoint: Endpoint, undisturbed: Files) -> None:
    endpoint.server.behave = first_times()
    ws = endpoint.round(timeout_s=TIMEOUT_S)
    assert grade.main(arguments(ws)) == enhance.main(arguments(ws)) == 0
    assert files_of(ws) == undisturbed
    asked = sum(CALLS.values())
    bad = sum(isinstance(trouble, str) for trouble in TROUBLES.values()) * asked // len(TROUBLES)
    assert set(endpoint.server.paid.values()) == {1}, "an answer that cannot be used is paid, and not again"
    assert abs(len(endpoint.server.paid) - asked - bad) <= 2


def test_an_endpoint_that_is_away_for_a_while_is_waited_for(endpoint: Endpoint, undisturbed: Files) -> None:
    server, gone = endpoint.server, threading.Event()

    def go_away() -> None:
        server.die()
        threading.Event().wait(0.5)
        server.come_back()

    def behave(call: int, body: dict[str, Any]) -> None:
        if call == 10 and not gone.is_set():
            gone.set()
            threading.Thread(target=go_away).start()

    server.behave = behave
    ws = endpoint.round(max_retries=1, backoff_factor=0.05)
    assert grade.main(arguments(ws)) == enhance.main(arguments(ws)) == 0
    assert gone.is_set() and files_of(ws) == undisturbed
    assert sum(server.paid.values()) <= sum(CALLS.values()) + PARALLEL  # what was under way may have been paid


def test_after_the_deadline_the_job_is_blocked_and_the_next_one_pays_only_for_the_rest(
    endpoint: Endpoint, undisturbed: Files
) -> None:
    ws = endpoint.round(deadline_s=0.5)
    for stage, body in BODIES.items():
        most = len(endpoint.server.paid) + 4
        endpoint.server.behave = lambda *_, most=most: Misbehave(503) if len(endpoint.server.paid) > most else None
        assert body.main(arguments(ws)) == 75
        assert len(manifest.done_shards(ws, 1, stage)) < 3
        endpoint.server.behave = lambda call, body: None
        assert body.main(arguments(ws)) == 0
    assert files_of(ws) == undisturbed
    assert endpoint.all_paid_once(sum(CALLS.values()))


def test_a_job_that_is_killed_in_the_middle_is_done_again_and_pays_only_for_the_rest(
    endpoint: Endpoint, undisturbed: Files
) -> None:
    """`kill -9`; S2: a resumed round pays nothing twice."""
    ws = endpoint.round()
    for stage, body in BODIES.items():
        kill_after_some_answers(endpoint.server, ws, stage)
        assert not manifest.done_shards(ws, 1, stage)
        assert body.main(arguments(ws)) == 0
    assert files_of(ws) == undisturbed
    assert endpoint.all_paid_once(sum(CALLS.values()))


def kill_after_some_answers(server: Teacher, ws: Workspace, stage: str) -> None:
    """Start a stage's job, and kill it when so many answers are kept and its other calls are under way."""
    killed, lock, let_through, before = threading.Event(), threading.Lock(), iter(range(SOME)), kept(ws)

    def behave(call: int, body: dict[str, Any]) -> Misbehave | None:
        with lock:
            if killed.is_set() or next(let_through, None) is not None:
                return None
        killed.wait(PATIENCE_S)
        return Misbehave(hang_up=True)

    server.behave = behave
    command = [sys.executable, "-m", f"jobs.prosetting.{stage}", *arguments(ws)]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        wait_for(lambda: kept(ws) == before + SOME, "some answers", of=process)
        process.kill()
    killed.set()


def kept(ws: Workspace) -> int:
    """Answers in the cache."""
    return sum(file.read_bytes().count(b"\n") for file in ws.teacher_cache.glob("*.jsonl"))
