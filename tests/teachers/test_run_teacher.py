"""The teacher that the run serves itself: real servers of the service, with an engine that needs no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.config.services import TeacherServiceConfig
from hpc_rl.engines.base import Completion, Request, Sampling
from hpc_rl.services.address import Address
from hpc_rl.services.calling import ServiceUnavailable
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.services.teacher import Writer, service_of
from hpc_rl.teachers.client import TeacherClient
from hpc_rl.teachers.endpoints import OfTheRun
from hpc_rl.teachers.questions import Reply
from tests.engines.answering import Answering

from .conftest import FAST, question


class Says(Answering):
    """An engine that says one thing to everybody, and counts how often."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.asked = text, 0

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        self.asked += 1
        return Completion((1,), (2,), (0.0,), self.text, "stop")


class Reader:
    max_tokens = 1000

    def length(self, messages: Sequence[Mapping[str, str]]) -> int:
        return 1


class Teachers:
    """Servers of one folder's name, whose weights may differ, and clients that share a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hosted = folder, list[Hosted]()

    def serve(self, weights_hash: str) -> Says:
        engine = Says(f"I am {weights_hash}")
        options = TeacherServiceConfig(model=str(self.folder / "judge"), batch_wait_ms=0)
        service = service_of("teacher", options, Writer(engine, Reader(), 10), weights_hash, {})
        where, environ = Address("127.0.0.1", "127.0.0.1"), {"HPC_RL_JOB_ID": str(len(self.hosted))}
        folder = self.folder / "services" / "teacher"
        self.hosted.append(host(service, folder=folder, address=where, options=options, environ=environ))
        return engine

    def client(self, **options: object) -> TeacherClient:
        config = TeacherClientConfig.model_validate({**FAST, **options})
        endpoint = OfTheRun(self.folder / "services" / "teacher", config)
        return TeacherClient(config, endpoint, "judge", self.folder / "cache")


@pytest.fixture
def teachers(tmp_path: Path) -> Iterator[Teachers]:
    made = Teachers(tmp_path)
    yield made
    for hosted in made.hosted:
        hosted.leave(0.0)


def said(client: TeacherClient, *numbers: int) -> list[tuple[str, bool]]:
    answers = client.ask_all([question(number) for number in numbers])
    return [(answer.text, answer.cached) for answer in answers if isinstance(answer, Reply)]


def test_a_model_that_was_trained_anew_in_its_folder_answers_anew(teachers: Teachers) -> None:
    teachers.serve("old")
    with teachers.client() as client:
        assert said(client, 1, 2) == [("I am old", False)] * 2
    with teachers.client() as client:
        assert said(client, 1, 2) == [("I am old", True)] * 2
    teachers.hosted[0].leave(0.0)
    teachers.serve("new")
    with teachers.client() as client:
        assert said(client, 1, 2) == [("I am new", False)] * 2


def test_a_client_asks_servers_of_the_same_weights_until_it_ends(teachers: Teachers) -> None:
    teachers.serve("old")
    with teachers.client(deadline_s=8) as client:
        assert said(client, 1) == [("I am old", False)]
        new = teachers.serve("new")
        assert said(client, *range(2, 20)) == [("I am old", False)] * 18
        teachers.hosted[0].leave(0.0)
        with pytest.raises(ServiceUnavailable, match="serves the weights old; published are new"):
            client.ask_all([question(20)])
    assert not new.asked
