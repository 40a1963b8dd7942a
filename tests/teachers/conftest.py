"""Clients of a teacher that misbehaves as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.teachers.client import TeacherClient
from hpc_rl.teachers.endpoints import Named
from hpc_rl.teachers.questions import Question
from tests.teachers.server import Teacher

KEY = "sk-of-the-tests"
FAST = {"timeout_s": 5, "backoff_factor": 0.01, "deadline_s": 20, "parallel_calls": 8, "max_tokens": 50}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}


def question(number: int, **more: Any) -> Question:
    return Question(({"role": "user", "content": f"What is two times {number}"},), **more)


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    made = Teacher()
    yield made
    made.die()


Ask = Callable[..., TeacherClient]


@pytest.fixture
def client(teacher: Teacher, tmp_path: Path) -> Iterator[Ask]:
    """Clients of the teacher that share a cache; options beat `FAST`."""
    made: list[TeacherClient] = []

    def make(**options: Any) -> TeacherClient:
        config = TeacherClientConfig.model_validate({"url": teacher.url, **FAST, **options})
        made.append(TeacherClient(config, Named(config, {"TEACHER_API_KEY": KEY}), "judge", tmp_path / "cache"))
        return made[-1]

    yield make
    for one in made:
        one.close()
