"""A teacher that misbehaves: every answer is the right one or none, in order, and none is paid twice."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from time import time
from typing import Any

import pytest

from hpc_rl.services.calling import ServiceRefused, ServiceUnavailable
from hpc_rl.teachers.questions import Reply, TeacherError
from tests.teachers.server import Misbehave, Teacher, completion, number_in

from .conftest import SCHEMA, Ask, question

MANY = [question(number) for number in range(40)]


def assert_all_right(answers: list[Reply | TeacherError]) -> None:
    assert [a.text for a in answers if isinstance(a, Reply)] == [f"{n} times two is {2 * n}" for n in range(40)]


def first_of_each(wrong: Misbehave) -> Callable[[int, dict[str, Any]], Misbehave | None]:
    """Every tenth question is treated badly the first time that it is asked."""
    asked: Counter[int] = Counter()
    lock = threading.Lock()

    def behave(call: int, body: dict[str, Any]) -> Misbehave | None:
        number = number_in(body)
        with lock:
            asked[number] += 1
            return wrong if number % 10 == 0 and asked[number] == 1 else None

    return behave


TOMORROW = formatdate(time() + 86400, usegmt=True)
TROUBLES = {
    "429 with Retry-After": Misbehave(429, {"Retry-After": "0.2"}),
    "429 with milliseconds": Misbehave(429, {"Retry-After-Ms": "150"}),
    "429 with a date": Misbehave(429, {"Retry-After": formatdate(time(), usegmt=True)}),
    "429 with a date of a clock that is ahead": Misbehave(429, dict.fromkeys(("Date", "Retry-After"), TOMORROW)),
    "429 without": Misbehave(429, body=b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}'),
    "500": Misbehave(500),
    "502 of a proxy": Misbehave(502, {"content-type": "text/html"}, b"<html>bad gateway</html>"),
    "503": Misbehave(503, {"Retry-After": "0"}),
    "408": Misbehave(408),
    "a closed connection": Misbehave(hang_up=True),
    "half a JSON": Misbehave(body=b'{"choices": [{"message": {"content": "80"'),
    "a page": Misbehave(headers={"content-type": "text/html"}, body=b"<html>log in</html>"),
    "no choice": Misbehave(body=b'{"choices": []}'),
    "a list": Misbehave(body=b"[1]"),
    "JSON without end": Misbehave(body=b"[" * 100_000),
    "an answer that is no text": Misbehave(body=b'{"choices": [{"message": {"content": 80}}]}'),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_goes_wrong_once_is_asked_again(teacher: Teacher, client: Ask, trouble: str) -> None:
    teacher.behave = first_of_each(TROUBLES[trouble])
    asking = client()
    assert_all_right(asking.ask_all(MANY))
    assert set(teacher.paid.values()) == {1}
    assert teacher.calls == asking.totals.calls == 40 + 4
    assert asking.totals.repeats == 4
    assert (asking.totals.answers, asking.totals.completion_tokens) == (40, 200)


def test_an_answer_that_takes_too_long_is_asked_for_again(teacher: Teacher, client: Ask) -> None:
    teacher.behave = first_of_each(Misbehave(delay_s=1.5))
    assert_all_right(client(timeout_s=0.5, parallel_calls=20).ask_all(MANY))


def test_a_429_stops_all_calls_until_retry_after_and_makes_them_fewer(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: Misbehave(429, {"Retry-After": "1"}) if call == 4 else None
    assert_all_right(client(parallel_calls=4).ask_all(MANY))
    gaps = [after - before for before, after in zip(teacher.times, teacher.times[1:], strict=False)]
    assert max(gaps) >= 0.9
    assert teacher.calls == 41


def test_an_endpoint_that_dies_in_the_middle_is_waited_for(teacher: Teacher, client: Ask) -> None:
    died = threading.Event()

    def behave(call: int, body: dict[str, Any]) -> Misbehave | None:
        if call == 15 and not died.is_set():
            died.set()
            threading.Thread(target=die_for_a_while).start()
        return Misbehave(delay_s=0.02)

    def die_for_a_while() -> None:
        teacher.die()
        threading.Event().wait(2.0)
        teacher.come_back()

    teacher.behave = behave
    # Far more tries than one question has: that nobody is there is not the question's fault.
    asking = client(max_retries=1, backoff_factor=0.05)
    assert_all_right(asking.ask_all(MANY))
    assert asking.totals.errors == 0
    assert sum(teacher.paid.values()) <= 40 + 8  # what was under way when it died may have been paid


def test_one_question_that_fails_every_time_is_left_out_and_the_others_are_not(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: Misbehave(500) if number_in(body) == 7 else None
    answers = client(max_retries=2).ask_all(MANY)
    assert isinstance(answers[7], TeacherError)
    assert "answered 500" in answers[7].message and "tried 3 times" in answers[7].message
    assert all(isinstance(answer, Reply) for number, answer in enumerate(answers) if number != 7)
    assert teacher.calls == 39 + 3


def test_one_question_that_breaks_its_connection_is_left_out_and_the_others_are_not(
    teacher: Teacher, client: Ask
) -> None:
    teacher.behave = lambda call, body: (
        Misbehave(hang_up=True) if number_in(body) == 7 else Misbehave(delay_s=0.01 * (number_in(body) > 7))
    )
    answers = client(max_retries=1, parallel_calls=4, backoff_factor=0.001).ask_all(MANY)
    assert isinstance(answers[7], TeacherError)
    assert sum(isinstance(answer, Reply) for answer in answers) == 39


def test_a_question_that_the_endpoint_refuses_is_left_out_at_once(teacher: Teacher, client: Ask) -> None:
    body = b'{"error": {"message": "maximum context length is 4096 tokens", "code": "context_length_exceeded"}}'
    teacher.behave = lambda call, asked: Misbehave(400, body=body) if number_in(asked) == 3 else None
    answers = client().ask_all(MANY)
    assert isinstance(answers[3], TeacherError)
    assert "maximum context length" in answers[3].message
    assert teacher.calls == 40


@pytest.mark.parametrize("parallel", [1, 32])
def test_an_endpoint_that_refuses_all_of_the_first_questions_is_refused_with_the_way_out(
    teacher: Teacher, client: Ask, parallel: int
) -> None:
    """Else a run would leave out all that it asks, and go on."""
    teacher.behave = lambda call, asked: Misbehave(400, body=b'{"error": {"message": "no response_format here"}}')
    asking = client(parallel_calls=parallel)
    twice = [*MANY[:15], *MANY[:15]]
    assert all(isinstance(answer, TeacherError) for answer in asking.ask_all(twice)), "the same ones count once"
    with pytest.raises(ServiceRefused, match=r"no response_format here.*structured \(json_schema") as refused:
        asking.ask_all(MANY)
    assert "services.teacher.client" in str(refused.value)
    assert teacher.calls <= 30 + 15 + parallel


@pytest.mark.parametrize("answered", [0, 9, 15])
def test_an_endpoint_that_answered_one_of_the_first_may_refuse_the_others(
    teacher: Teacher, client: Ask, answered: int
) -> None:
    """Also when that takes longer than refusals; and when it was asked that before."""
    slow = Misbehave(delay_s=0.5)
    teacher.behave = lambda call, asked: slow if number_in(asked) == answered else Misbehave(400, body=b'{"x": 1}')
    for one in (client(parallel_calls=16), client(parallel_calls=1)):
        answers = one.ask_all(MANY)
        assert [number for number, answer in enumerate(answers) if isinstance(answer, Reply)] == [answered]


@pytest.mark.parametrize(
    ("wrong", "way_out"),
    [
        (Misbehave(401), "api_key_env and api_key_file"),
        (Misbehave(403), "api_key_env and api_key_file"),
        (Misbehave(404, body=b'{"error": {"message": "no model judge"}}'), "no model judge.*model, and url"),
        (Misbehave(307, {"location": "http://127.0.0.1:9/v1"}), "model, and url"),
        (Misbehave(429, body=b'{"error": {"message": "pay", "code": "insufficient_quota"}}'), "Pay"),
    ],
    ids=["401", "403", "404", "a redirect", "no money"],
)
def test_what_no_repeat_can_help_ends_at_once_with_the_way_out(
    teacher: Teacher, client: Ask, wrong: Misbehave, way_out: str
) -> None:
    teacher.behave = lambda call, body: wrong
    with pytest.raises(ServiceRefused, match=way_out):
        client(parallel_calls=2).ask_all(MANY)
    assert teacher.calls <= 4


@pytest.mark.parametrize("wrong", [Misbehave(503), Misbehave(429), Misbehave(hang_up=True)])
def test_after_the_deadline_there_is_an_exception_and_what_was_answered_is_kept(
    teacher: Teacher, client: Ask, wrong: Misbehave
) -> None:
    teacher.behave = lambda call, body: wrong if call > 10 else None
    with (
        pytest.raises(ServiceUnavailable, match="no answer from the teacher within 1 s; last problem"),
        client(deadline_s=1, parallel_calls=4) as impatient,
    ):
        impatient.ask_all(MANY)
    teacher.behave = lambda call, body: None
    later = client()
    assert_all_right(later.ask_all(MANY))
    assert (later.totals.cache_hits, later.totals.answers) == (10, 30)
    assert set(teacher.paid.values()) == {1}


def test_an_endpoint_that_wants_to_be_left_alone_beyond_the_deadline_is_not_waited_for(
    teacher: Teacher, client: Ask
) -> None:
    teacher.behave = lambda call, body: Misbehave(429, {"Retry-After": "86400"})
    with pytest.raises(ServiceUnavailable, match="answered 429"):
        client().ask_all(MANY)
    assert teacher.calls < 20


BAD_REPLIES = {
    "no JSON": "the answer is 14",
    "half a JSON": '{"answer": 1',
    "another type": '{"answer": "14"}',
    "another key": '{"result": 14}',
    "too many keys": '{"answer": 14, "note": ""}',
    "NaN": '{"answer": NaN}',
    "nothing": "",
}


@pytest.mark.parametrize("bad", BAD_REPLIES)
def test_an_answer_against_its_schema_is_asked_for_again_with_a_note(teacher: Teacher, client: Ask, bad: str) -> None:
    teacher.behave = lambda call, body: BAD_REPLIES[bad] if len(body["messages"]) == 1 else None
    asking = client()
    (answer,) = asking.ask_all([question(7, schema=SCHEMA, seed=5)])
    assert isinstance(answer, Reply)
    assert answer.value == {"answer": 14}
    assert asking.totals.bad_replies == 1 and asking.totals.answers == 2
    first, second = teacher.bodies
    assert first["seed"] != second["seed"]
    assert second["messages"][0] == first["messages"][0]
    assert "cannot be used" in second["messages"][2]["content"]


def test_a_teacher_that_never_follows_the_schema_gets_so_many_tries_and_gives_no_answer(
    teacher: Teacher, client: Ask
) -> None:
    teacher.behave = lambda call, body: "I would rather not"
    asked = [question(7, schema=SCHEMA)]
    first = client(bad_reply_retries=2)
    (answer,) = first.ask_all(asked)
    assert isinstance(answer, TeacherError)
    assert "no answer of use in 3 tries: the answer is not valid JSON" in answer.message
    assert (teacher.calls, first.totals.bad_replies, first.totals.errors) == (3, 3, 1)
    assert isinstance(client(bad_reply_retries=2).ask_all(asked)[0], TeacherError)
    assert teacher.calls == 3  # bad answers are paid answers


def test_json_is_found_in_a_fence_and_after_thoughts(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: (
        f'<think>maybe {{"answer": 0}}?</think>\nHere:\n```json\n{{"answer": {2 * number_in(body)}}}\n```\nDone.'
    )
    answers = client().ask_all([question(number, schema=SCHEMA) for number in range(5)])
    assert [answer.value for answer in answers if isinstance(answer, Reply)] == [{"answer": 2 * n} for n in range(5)]
    assert teacher.calls == 5


def test_an_answer_that_was_cut_off_says_so(teacher: Teacher, client: Ask) -> None:
    teacher.behave = lambda call, body: Misbehave(body=completion('{"answer": 1', "length"))
    cut, whole = client(bad_reply_retries=0).ask_all([question(7, schema=SCHEMA), question(8)])
    assert isinstance(cut, TeacherError) and "cut off at the longest length" in cut.message
    assert isinstance(whole, Reply) and whole.finish_reason == "length"
