"""What an endpoint's response means: an answer, or one of four kinds of problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import openai

from hpc_rl.services.calling import ServiceRefused
from hpc_rl.services.wire import retry_after_s
from hpc_rl.teachers.cache import Answer

SAID_CHARACTERS = 300


@dataclass(frozen=True)
class Problem:
    """Why a call has no answer.

    Attributes
    ----------
    kind
        `busy`: it wants to be asked later. `gone`: nobody answers there. `failed`: it answered with a failure, with
        something that is no answer, or not in time. `refused`: it will not take the request as it is.
    text
        For people.
    retry_after_s
        When it wants to be asked again. Seconds; None when it did not say.
    """

    kind: Literal["busy", "gone", "failed", "refused"]
    text: str
    retry_after_s: float | None = None


def read_chat(said: Any) -> Answer:
    """The answer in a chat completion; ValueError for JSON that is none."""
    try:
        (choice,) = said["choices"]
        text, usage = choice["message"]["content"], said.get("usage") or {}
        if not isinstance(text, str | None):
            raise TypeError(type(text))
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        return Answer(text or "", str(choice.get("finish_reason")), *counts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"what is no chat completion: {str(said)[:SAID_CHARACTERS]}") from error


def read_models(said: Any) -> list[str]:
    """Names of the models that an endpoint has; ValueError for JSON that is no list of models."""
    try:
        return [str(model["id"]) for model in said["data"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"what is no list of models: {str(said)[:SAID_CHARACTERS]}") from error


def problem_of(error: Exception, base_url: str, timeout_s: float, key: str, section: str) -> Problem:
    """What it means that a call of the openai package raised this; some endpoints repeat the key, which is left out.

    `section` is the config's, `services.teacher.client`, for the way out.

    Raises
    ------
    ServiceRefused
        When no call to this endpoint can succeed: a wrong key, a wrong URL or model, no money left.
    """
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, base_url, key, section)
    cause = error.__cause__ or error
    if isinstance(error, openai.APITimeoutError | TimeoutError) and type(cause).__name__ != "ConnectTimeout":
        return Problem("failed", f"{base_url} took longer than {timeout_s:g} s")
    if isinstance(error, openai.APIConnectionError):
        return Problem("gone", f"{base_url} does not answer ({type(cause).__name__}: {_without(key, str(cause))})")
    assert isinstance(error, ValueError), error
    return Problem("failed", f"{base_url} answered {_without(key, str(error))}")


def _of_status(error: openai.APIStatusError, base_url: str, key: str, section: str) -> Problem:
    status, headers = error.status_code, error.response.headers
    problem = f"{base_url} answered {status}: {_without(key, _message(error))[:SAID_CHARACTERS]}"
    if status in (400, 413, 422):
        return Problem("refused", problem)
    if status == 429 and error.code == "insufficient_quota":
        raise ServiceRefused(f"{problem}. Pay, or name another teacher in {section}")
    if status in (429, 503, 529):
        return Problem("busy", problem, retry_after_s(headers))
    if status in (502, 504):
        return Problem("gone", problem, retry_after_s(headers))
    if status in (408, 409) or status >= 500:
        return Problem("failed", problem, retry_after_s(headers))
    if status in (401, 402, 403):
        way_out = f"{section}.api_key_env and api_key_file say where the key is taken from"
    else:
        way_out = f"Check {section}.model, and url, which for most servers ends in /v1"
    raise ServiceRefused(f"{problem}. {way_out}")


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
    return str(said or error.message)


def _without(key: str, text: str) -> str:
    return text.replace(key, "***") if key else text
