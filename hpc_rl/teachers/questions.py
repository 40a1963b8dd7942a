"""What a teacher is asked, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """What a teacher is asked.

    Attributes
    ----------
    messages
        `{"role": "system" | "user" | "assistant", "content": text}`.
    schema
        JSON schema that the answer must follow; None = any text.
    seed
        Tells equal questions apart that want answers of their own; None = none is sent.
    temperature, max_tokens
        Instead of the config's. Where the config says null for the temperature none is sent.
    check
        What is wrong with a value that follows the schema, "" for nothing: else it counts as one that does not. Pure
        and quick; called in the client's own thread.
    """

    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, Any] | None = None
    seed: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    check: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Reply:
    """A teacher's answer.

    Attributes
    ----------
    text
        As it came.
    value
        The JSON in it, where the question had a schema.
    finish_reason
        `length`: it was cut off.
    prompt_tokens, completion_tokens
        Of this answer; what answers cost that could not be used is in `Totals`.
    cached
        It was not paid now.
    """

    text: str
    value: Any
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool


@dataclass(frozen=True)
class TeacherError:
    """Why a question has no answer. It is left out, never counted as wrong.

    Attributes
    ----------
    message
        For people.
    bad_reply
        There was an answer, but none of use in all tries.
    value
        The last of them, where it followed the schema and failed the question's own check.
    """

    message: str
    bad_reply: bool = False
    value: Any = None


@dataclass
class Totals:
    """What a client has done so far, for reports. `calls` are all that were made, repeats included; `answers` those
    that were paid; `shared` the questions that waited for the same one under way."""

    questions: int = 0
    calls: int = 0
    repeats: int = 0
    answers: int = 0
    cache_hits: int = 0
    shared: int = 0
    bad_replies: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def metrics(self, since: Totals) -> dict[str, int]:
        """For a manifest: what was done since then, as `teacher_calls`, `teacher_answers` …"""
        return {f"teacher_{name}": value - getattr(since, name) for name, value in vars(self).items()}
