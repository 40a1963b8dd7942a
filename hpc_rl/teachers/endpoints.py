"""Where a teacher answers, and with which key: an endpoint that the config names, or the run's own teacher."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import openai

from hpc_rl.config.clients import CallConfig, ClientConfig, TeacherClientConfig
from hpc_rl.services.calling import CallFailed, ServiceClient, ServiceRefused
from hpc_rl.services.wire import read_json
from hpc_rl.teachers.cache import Answer
from hpc_rl.teachers.calls import Problem, problem_of, read_chat, read_models
from hpc_rl.teachers.keys import BadKey, read_key

T = TypeVar("T")
CONNECT_S = 10.0
NO_KEY = "none"
"""Sent where there is no key; many endpoints of a site want none."""


class Endpoint(Protocol):
    """Makes one call at a time for whoever asks. Belongs to one event loop."""

    async def chat(self, body: Mapping[str, Any]) -> Answer | Problem:
        """The answer to one chat completion.

        Raises
        ------
        ServiceRefused
            When no call can succeed.
        ServiceUnavailable
            When it has waited for a server until the deadline.
        """

    async def models(self) -> list[str] | Problem:
        """Names of the models that it has."""

    async def weights(self) -> str:
        """Hash of the weights that answer, all the time from now on; "" where it does not say.

        Raises
        ------
        ServiceUnavailable
            When it has waited for a server until the deadline.
        """

    async def close(self) -> None:
        """Close the connections."""


class Named:
    """The endpoint that the config names, called with the openai package.

    Parameters
    ----------
    options
        `services.teacher.client`, with a `url`.
    environ
        Where the key is, unless it is in a file.
    section
        Where the options are in the config, for messages.

    Raises
    ------
    ServiceRefused
        When the key cannot be read, or no header may carry it (`read_key`).
    """

    def __init__(
        self, options: TeacherClientConfig, environ: Mapping[str, str], section: str = "services.teacher.client"
    ) -> None:
        assert options.url is not None
        self._url, self._timeout_s, self._section = options.url, options.timeout_s, section
        self._key = _key(options, environ, section)
        self._openai = openai.AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=options.url,
            max_retries=0,  # ours are the only ones
            timeout=openai.Timeout(options.timeout_s, connect=CONNECT_S),
            # Cluster nodes often carry http_proxy, and a proxy knows nothing of compute nodes. Redirects are not
            # followed: the key is for this endpoint alone.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=options.proxy_from_env, follow_redirects=False),
        )

    async def chat(self, body: Mapping[str, Any]) -> Answer | Problem:
        """See `Endpoint`."""
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}

        async def call() -> Answer:
            raw = await self._openai.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=rest
            )
            return read_chat(read_json(raw.http_response.content))

        return await self._attempt(call)

    async def models(self) -> list[str] | Problem:
        """See `Endpoint`."""

        async def call() -> list[str]:
            raw = await self._openai.models.with_raw_response.list()
            return read_models(read_json(raw.http_response.content))

        return await self._attempt(call)

    async def weights(self) -> str:
        """See `Endpoint`. The name of its model has to do."""
        return ""

    async def _attempt(self, call: Callable[[], Awaitable[T]]) -> T | Problem:
        try:
            async with asyncio.timeout(self._timeout_s):  # of the whole answer; httpx limits each of its parts
                return await call()
        except (openai.APIError, TimeoutError, ValueError) as error:
            return problem_of(error, self._url, self._timeout_s, self._key, self._section)

    async def close(self) -> None:
        """See `Endpoint`."""
        await self._openai.close()


def _key(options: TeacherClientConfig, environ: Mapping[str, str], section: str) -> str:
    """The endpoint's key; "" where there is none."""
    try:
        return read_key(options, environ, section).text
    except BadKey as error:
        raise ServiceRefused(str(error)) from error


class OfTheRun:
    """The teacher that the run serves itself, called like all of its services, whichever replica answers.

    Parameters
    ----------
    folder
        The service's handoff folder.
    options
        `services.teacher.client`.
    """

    def __init__(self, folder: Path, options: TeacherClientConfig) -> None:
        shared = options.model_dump(include=set(CallConfig.model_fields))
        self._service = ServiceClient(folder, ClientConfig.model_validate(shared))
        self._threads = ThreadPoolExecutor(options.parallel_calls, thread_name_prefix="teacher-call")

    async def chat(self, body: Mapping[str, Any]) -> Answer | Problem:
        """See `Endpoint`. What can be repeated has been."""
        loop = asyncio.get_running_loop()
        try:
            return read_chat(
                await loop.run_in_executor(self._threads, self._service.post, "/v1/chat/completions", body)
            )
        except CallFailed as error:
            return Problem("refused", str(error))
        except ValueError as error:
            return Problem("failed", f"the run's teacher answered {error}")

    async def models(self) -> list[str] | Problem:
        """See `Endpoint`."""
        raise AssertionError("the run's teacher is called by the name of what it serves")

    async def weights(self) -> str:
        """See `Endpoint`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._service.settle)

    async def close(self) -> None:
        """See `Endpoint`."""
        self._service.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
