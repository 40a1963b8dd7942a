"""Asking a teacher: order, the cache, limits, keys."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.config.loader import load
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.calling import ServiceRefused
from hpc_rl.services.trust import Untrusted
from hpc_rl.teachers.cache import Answer, Cache, key_of
from hpc_rl.teachers.client import TeacherClient
from hpc_rl.teachers.endpoints import Named
from hpc_rl.teachers.questions import Reply
from tests.teachers.server import Misbehave, Teacher, number_in

from .conftest import FAST, KEY, SCHEMA, Ask, question

REPOSITORY = Path(__file__).resolve().parents[2]


def numbers(answers: list[Any]) -> list[int]:
    return [int(answer.text.split()[-1]) for answer in answers]


def test_answers_come_in_the_order_of_the_questions_whoever_is_fast(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: Misbehave(delay_s=0.03 * (number_in(body) % 3))
    told: list[tuple[int, int]] = []
    answers = client().ask_all([question(n) for n in range(30)], progress=lambda *so_far: told.append(so_far))
    assert numbers(answers) == [2 * n for n in range(30)]
    assert told == [(done, 30) for done in range(1, 31)]
    assert client().ask_all([]) == []


def test_so_many_calls_are_under_way_at_once(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: Misbehave(delay_s=0.1)
    client(parallel_calls=32).ask_all([question(n) for n in range(96)])
    assert 16 < teacher.most_at_once <= 32


def test_equal_questions_are_paid_once_and_those_with_other_seeds_are_not_equal(teacher: Teacher, client: Ask) -> None:
    asking = client()
    answers = asking.ask_all([question(1), question(2), question(1), question(1, seed=1), question(1, seed=2)] * 3)
    assert numbers(answers) == [2, 4, 2, 2, 2] * 3
    assert teacher.calls == 4
    assert asking.totals.shared + asking.totals.cache_hits == 11


def test_threads_that_ask_at_once_share_what_is_under_way(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: Misbehave(delay_s=0.1)
    asking, found = client(), []
    threads = [
        threading.Thread(target=lambda: found.append(numbers(asking.ask_all([question(n) for n in range(8)]))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[2 * n for n in range(8)]] * 4
    assert teacher.calls == 8


def test_what_another_client_has_paid_for_is_known(teacher: Teacher, client: Ask) -> None:
    early, other = client(), client()
    early.ask_all([question(n) for n in range(5)])
    answers = other.ask_all([question(n) for n in range(8)])
    assert [answer.cached for answer in answers if isinstance(answer, Reply)] == [True] * 5 + [False] * 3
    assert teacher.calls == 8


def test_the_cache_goes_by_what_is_asked_and_not_by_whom(teacher: Teacher, client: Ask) -> None:
    client().ask_all([question(1)])
    for other in ({"temperature": 0.5}, {"max_tokens": 51}, {"extra_body": {"top_p": 0.9}}):
        client(**other).ask_all([question(1)])
    client().ask_all([question(1, schema=SCHEMA)])
    assert teacher.calls == 5
    elsewhere = Teacher()
    client(url=elsewhere.url, parallel_calls=2, timeout_s=9).ask_all([question(1), question(1, schema=SCHEMA)])
    elsewhere.die()
    assert (teacher.calls, elsewhere.calls) == (5, 0)


def test_what_is_sent(teacher: Teacher, client: Ask) -> None:
    asking = client(extra_body={"top_p": 0.9}, max_tokens_field="max_completion_tokens", temperature=None)
    asking.ask_all([question(1, schema=SCHEMA, seed=3, max_tokens=7, temperature=0.7)])
    client(structured="none").ask_all([question(2, schema=SCHEMA, temperature=1.0)])
    client(structured="json_object").ask_all([question(3, schema=SCHEMA)])
    first, second, third = (body for body in teacher.bodies if len(body["messages"]) == 1)
    messages = [{"role": "user", "content": "What is two times 1"}]
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}}
    assert first == {
        "model": "judge", "messages": messages, "max_completion_tokens": 7, "top_p": 0.9, "seed": 3,
        "response_format": form,
    }  # fmt: skip
    assert "response_format" not in second and second["temperature"] == 1.0 and second["max_tokens"] == 50
    assert third["response_format"] == {"type": "json_object"} and third["temperature"] == 0.0


KILLED = """
import sys
from pathlib import Path
from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.teachers.client import TeacherClient
from hpc_rl.teachers.endpoints import Named
from teachers.conftest import FAST, question

config = TeacherClientConfig.model_validate({"url": sys.argv[1], **FAST, "parallel_calls": 4})
client = TeacherClient(config, Named(config, {}), "judge", Path(sys.argv[2]))
answers = client.ask_all([question(n) for n in range(60)], progress=lambda done, of: print(done, flush=True))
print([answer.text for answer in answers], client.totals.answers)
"""


def test_a_client_that_was_killed_pays_only_for_what_is_missing(teacher: Teacher, tmp_path: Path) -> None:
    teacher.behave = lambda call, body: Misbehave(delay_s=0.05)
    command = [sys.executable, "-c", KILLED, teacher.url, str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 20:
                process.send_signal(signal.SIGKILL)
                break
    kept = len(Cache(tmp_path / "cache"))
    time.sleep(0.1)
    paid = sum(teacher.paid.values())
    assert 20 <= kept <= paid <= kept + 4  # the server was paid for what was under way, too
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == f"{[f'{n} times two is {2 * n}' for n in range(60)]} {60 - kept}"
    assert sum(teacher.paid.values()) == paid + 60 - kept


def test_a_line_that_was_torn_or_damaged_is_asked_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys = [key_of({"n": n}) for n in range(4)]
    for number, key in enumerate(keys):
        cache.put(key, Answer(f"ä{number}\n", "stop", 1, 2))
    cache.close()
    (segment,) = tmp_path.iterdir()
    assert segment.stat().st_mode & 0o777 == 0o600
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[1] = b"\0" * (len(lines[1]) - 1) + b"\n"
    lines[2] = lines[2][:-20] + b"x" * 19 + b"\n"
    segment.write_bytes(b"".join(lines)[:-1])
    found = Cache(tmp_path)
    assert [found.get(key) for key in keys] == [Answer("ä0\n", "stop", 1, 2), None, None, None]
    found.put(keys[3], Answer("again", "stop", 1, 2))
    segment.write_bytes(b"".join(lines))  # the writer was slow, not dead
    found.refresh()
    assert found.get(keys[3]) == Answer("ä3\n", "stop", 1, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_answers_that_another_user_could_have_planted_are_not_believed(tmp_path: Path) -> None:
    Cache(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o022 == 0
    (tmp_path / "cache" / "planted.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(Untrusted):
        Cache(tmp_path / "cache")


def test_requests_and_tokens_a_minute_are_kept(teacher: Teacher, client: Ask) -> None:
    client(requests_per_min=600).ask_all([question(n) for n in range(75)])
    assert teacher.times[-1] - teacher.times[0] >= 1.2  # 60 at once, then 10 a second
    teacher.most_at_once, teacher.behave = 0, lambda call, body: Misbehave(delay_s=0.2)
    # Each reserves 3 006 tokens until it is known to have used 15; 60 000 a minute are 6 000 at once, 1 000 a second.
    client(tokens_per_min=60_000, max_tokens=3000).ask_all([question(n) for n in range(8)])
    assert teacher.most_at_once <= 3


def test_the_key_comes_from_the_environment_or_a_private_file_and_shows_up_nowhere(
    teacher: Teacher, client: Ask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    teacher.behave = lambda call, body: Misbehave(500) if call < 3 else None
    asking = client()
    asking.ask_all([question(1)])
    assert teacher.keys == {f"Bearer {KEY}"}
    file = tmp_path / "key"
    file.write_text("sk-of-the-file\n")
    file.chmod(0o640)
    with pytest.raises(ServiceRefused, match=r"mode 0640 instead of 0600.*chmod 600"):
        client(api_key_file=file)
    file.chmod(0o600)
    client(api_key_file=file).ask_all([question(2)])
    assert teacher.keys == {f"Bearer {KEY}", "Bearer sk-of-the-file"}
    with pytest.raises(ServiceRefused, match=r"api_key_file: .* does not exist"):
        client(api_key_file=tmp_path / "none")
    file.write_text(f"{KEY}\n# of the group\n")
    with pytest.raises(ServiceRefused, match=r"api_key_file: .* has a line break") as refused:
        client(api_key_file=file)
    assert KEY not in str(refused.value)
    teacher.behave = lambda call, body: Misbehave(401, body=b'{"error": {"message": "wrong key: %s"}}' % KEY.encode())
    with pytest.raises(ServiceRefused, match=r"wrong key: \*\*\*\."):
        asking.ask_all([question(3)])
    written = "".join(path.read_text() for path in (tmp_path / "cache").iterdir())
    for text in (caplog.text, written, repr(vars(asking)), repr(asking.totals)):
        assert KEY not in text and "sk-of-the-file" not in text


def test_the_enhancers_endpoint_gets_its_own_key_and_never_the_teachers(teacher: Teacher, tmp_path: Path) -> None:
    overrides = [f"services.enhancer.client.{name}={value}" for name, value in {"url": teacher.url, **FAST}.items()]
    config = load("configs/tiny/prosetting.yaml", overrides, {}, cwd=REPOSITORY)
    for number, environ in enumerate([{}, {"ENHANCER_API_KEY": "sk-of-the-enhancer"}]):
        found = {"TEACHER_API_KEY": KEY, **environ}
        with TeacherClient.of_run(Workspace(tmp_path), config, found, "enhancer") as asking:
            asking.ask_all([question(number)])
    assert teacher.keys == {"Bearer none", "Bearer sk-of-the-enhancer"}


def test_a_proxy_is_used_only_where_the_config_says_so(
    teacher: Teacher, client: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert numbers(client().ask_all([question(1)])) == [2]
    with pytest.raises(Exception, match="does not answer"):
        client(proxy_from_env=True, deadline_s=0.2).ask_all([question(2)])


def test_a_model_that_is_not_named_is_the_only_one_of_the_endpoint(teacher: Teacher, tmp_path: Path) -> None:
    config = TeacherClientConfig.model_validate({"url": teacher.url, **FAST})
    with TeacherClient(config, Named(config, {}), None, tmp_path / "cache") as asking:
        asking.ask_all([question(1)])
    assert teacher.bodies[0]["model"] == "judge"


def test_a_schema_that_is_none_and_a_key_in_the_config_are_errors_before_anything_is_asked(client: Ask) -> None:
    with pytest.raises(ValueError, match="no JSON schema"):
        client().ask_all([question(1, schema={"type": "number?"})])
    with pytest.raises(ValueError, match="user name or password"):
        TeacherClientConfig.model_validate({"url": "https://me:secret@a.example/v1"})
    with pytest.raises(ValueError, match="sets this by itself"):
        TeacherClientConfig.model_validate({"extra_body": {"stream": True}})
    for name in ("temperature", "max_tokens", "max_completion_tokens"):
        with pytest.raises(ValueError, match="there is a field for this"):
            TeacherClientConfig.model_validate({"extra_body": {name: 1}})


def test_a_schema_is_never_fetched(teacher: Teacher, client: Ask) -> None:
    inside = {"$defs": {"even": {"multipleOf": 2}}, "properties": {"answer": {"$ref": "#/$defs/even"}}}
    assert isinstance(client().ask_all([question(1, schema=inside)])[0], Reply)
    with pytest.raises(ValueError, match="the schema refers to 'http:"):
        client().ask_all([question(1, schema={"anyOf": [{"$ref": f"{teacher.url}/schema.json"}]})])
