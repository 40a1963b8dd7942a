"""The client against a real `vllm serve`, which is what most sites run as a teacher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.services.calling import ServiceRefused
from hpc_rl.teachers.client import TeacherClient
from hpc_rl.teachers.endpoints import Named
from hpc_rl.teachers.questions import Question, Reply, TeacherError
from tools.tiny_chat_model import write

pytest.importorskip("vllm", reason="vLLM is not installed here")

START_S = 240.0
KEY = "sk-of-vllm"
STRUCTURED = '{"backend": "xgrammar", "disable_any_whitespace": true}'  # random weights would write little else
SCHEMA = {
    "type": "object",
    "properties": {"correct": {"type": "boolean"}, "grade": {"enum": ["good", "bad"]}},
    "required": ["correct", "grade"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("vllm-serve")
    model = write(folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "judge",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--api-key", KEY,
        "--structured-outputs-config", STRUCTURED,
        "--no-enable-chunked-prefill",  # on CPUs a request with a seed must not be read in two steps
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    log = folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not is_up(port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()  # its children end with it
        server.wait(60)


def is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


Ask = Callable[..., TeacherClient]


@pytest.fixture
def client(url: str, tmp_path: Path) -> Iterator[Ask]:
    made: list[TeacherClient] = []

    def make(key: str = KEY, model: str | None = None, cache: str = "cache", **options: Any) -> TeacherClient:
        config = TeacherClientConfig.model_validate(
            {"url": url, "timeout_s": 120, "deadline_s": 60, "max_tokens": 40, **options}
        )
        made.append(TeacherClient(config, Named(config, {"TEACHER_API_KEY": key}), model, tmp_path / cache))
        return made[-1]

    yield make
    for one in made:
        one.close()


def question(text: str, **more: Any) -> Question:
    return Question(({"role": "user", "content": text},), **more)


def test_grades_follow_their_schema_and_are_paid_once(client: Ask) -> None:
    asked = [question(f"Is {n} + 3 = 5?", schema=SCHEMA, temperature=1.0, seed=n) for n in range(40)]
    with client() as first:
        answers = first.ask_all(asked)
        for answer in answers:
            assert isinstance(answer, Reply)
            assert set(answer.value) == {"correct", "grade"} and answer.completion_tokens > 3
        assert len({answer.text for answer in answers if isinstance(answer, Reply)}) > 1
        assert (first.totals.answers, first.totals.calls) == (40, 41)  # one asks for the model's name
    again = client()
    assert [a.text for a in again.ask_all(asked)] == [a.text for a in answers]  # type: ignore[union-attr]
    assert (again.totals.answers, again.totals.cache_hits) == (0, 40)
    afresh = client(cache="other").ask_all(asked)
    assert [a.text for a in afresh] == [a.text for a in answers]  # type: ignore[union-attr]


def test_without_a_schema_any_text_will_do_up_to_its_length(client: Ask) -> None:
    (answer,) = client().ask_all([question("Is 2 + 3 = 5?", max_tokens=3)])
    assert isinstance(answer, Reply)
    assert (answer.finish_reason, answer.completion_tokens, answer.value) == ("length", 3, None)


def test_without_structured_output_a_model_that_cannot_write_json_gives_no_grade(client: Ask) -> None:
    asking = client(model="judge", structured="none", bad_reply_retries=1)
    (answer,) = asking.ask_all([question("Is 2 + 3 = 5?", schema=SCHEMA)])
    assert isinstance(answer, TeacherError) and "no answer of use in 2 tries" in answer.message
    assert asking.totals.calls == 2


def test_a_question_that_is_too_long_is_left_out_and_the_others_are_not(client: Ask) -> None:
    long, short = client().ask_all([question("yes " * 600), question("Is 2 + 3 = 5?")])
    assert isinstance(long, TeacherError) and "answered 400" in long.message and "512" in long.message
    assert isinstance(short, Reply)


def test_a_wrong_key_and_a_wrong_model_are_errors_at_once(client: Ask) -> None:
    with pytest.raises(ServiceRefused, match=r"answered 401.*api_key_file"):
        client(key="sk-wrong", model="judge").ask_all([question("?")])
    with pytest.raises(ServiceRefused, match=r"answered 404.*nobody.*services\.teacher\.client\.model"):
        client(model="nobody").ask_all([question("?")])
