"""Calls to a service that outlive its servers: retries with back-off, fail-over between replicas, a deadline.

Three things can go wrong, and they are kept apart:

- *No server answers* (none is published, connections break, all are busy or leaving): the client waits for one, and
  asks that one. A killed server is not the request's fault and costs no retry.
- *A server answers with a failure, or not in time*: the call is repeated `max_retries` times, each after a longer wait
  and at another server where there is one, then raises `CallFailed`.
- *A server does not take the call as it is* (too large, malformed): `CallFailed` at once.

Whatever happens, after `deadline_s` it ends in `ServiceUnavailable`; nothing that a client waits for takes longer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpc_rl.config.clients import ClientConfig
from hpc_rl.run.atomic import CorruptFile
from hpc_rl.services import handoff
from hpc_rl.services.circuit import JITTER
from hpc_rl.services.loop_thread import LoopThread, each
from hpc_rl.services.replicas import Replica, Replicas
from hpc_rl.services.trust import Untrusted
from hpc_rl.services.wire import CLIENT_HEADER, TIMEOUT_HEADER, Broken, NewConnection, Reply, Wire

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

NEW_CONNECTIONS = 10
"""Connections that a call looks at before it takes a server for one that closes them all."""


class ServiceUnavailable(RuntimeError):
    """No server answered until the deadline. The work is to be tried again later (exit code 75)."""


class ServiceRefused(RuntimeError):
    """The server does not accept this client; the message says what to check."""


class CallFailed(RuntimeError):
    """A call that was answered with failures until its retries ended, or that the server will not take as it is."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


class ServiceClient:
    """Calls a service, whichever of its servers answers. For any number of threads; it has one of its own.

    Parameters
    ----------
    folder
        The service's handoff folder; its token is there.
    options
        Time limits and retries.
    token
        To use instead of the folder's.
    token_from
        Where that token comes from, for messages.
    weights_hash
        Only servers of these weights are asked; "" = any.
    rng
        Jitter.

    Attributes
    ----------
    troubles
        How many tries ended otherwise than in an answer so far: `failed`, `gone`, `busy`.
    """

    def __init__(
        self,
        folder: Path,
        options: ClientConfig,
        *,
        token: str | None = None,
        token_from: str = "by the caller",
        weights_hash: str = "",
        rng: random.Random | None = None,
    ) -> None:
        self._folder, self._options, self._given_token = folder, options, token
        self._token_from = token_from
        self._rng = rng or random.Random()
        self.troubles: Counter[str] = Counter()
        self._next_call = 0.0
        self._wire = Wire({CLIENT_HEADER: secrets.token_hex(8), TIMEOUT_HEADER: f"{options.timeout_s:g}"})
        self._replicas = Replicas(folder, options.url, self._wire, self._rng, weights_hash, self._token)
        self._loop = LoopThread("service-client")

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End calls that are under way, and close the connections."""
        self._loop.close(self._wire.close)

    def post(self, route: str, payload: Any) -> Any:
        """The JSON that a server answers to `payload`.

        Raises
        ------
        ServiceUnavailable
            When no server answered until `deadline_s` after the call began.
        ServiceRefused
            When the token is wrong or missing, or what answers is another service.
        CallFailed
            When a server answered with failures and the retries ended, or finds the call too large or malformed.
        """
        return self._loop.run(self._post(route, payload))

    def settle(self) -> str:
        """The weights that the service's servers in the folder serve; those of others are not asked from now on.

        Raises
        ------
        ServiceUnavailable
            When no server answered until `deadline_s`.
        """
        return self._loop.run(self._until_deadline(self._replicas.settle(), "who are you"))

    def ask(
        self,
        route: str,
        items: Sequence[Item],
        payload: Callable[[Sequence[Item]], Any],
        read: Callable[[Sequence[Item], Any], Sequence[Answer]],
        failed: Callable[[str], Answer],
    ) -> list[Answer]:
        """Answers to any number of items, in order: in chunks of `chunk_size`, `parallel_calls` of them at once.

        Parameters
        ----------
        payload
            What to send for a chunk. A chunk that is too large for a server is sent in halves.
        read
            The chunk's answers, out of what a server sent; called in the client's thread as soon as they are there.
        failed
            The answer to an item of a chunk whose retries ended, given the reason.

        Raises
        ------
        ServiceUnavailable, ServiceRefused
            See `post`; calls that are still under way are ended.
        """
        size = self._options.chunk_size
        chunks = [items[start : start + size] for start in range(0, len(items), size)]

        async def ask(chunk: Sequence[Item]) -> list[Answer]:
            await self._keep_distance()
            try:
                return list(read(chunk, await self._post(route, payload(chunk))))
            except CallFailed as error:
                if error.too_large and len(chunk) > 1:
                    half = len(chunk) // 2
                    return await ask(chunk[:half]) + await ask(chunk[half:])
                return [failed(str(error))] * len(chunk)

        answered = self._loop.run(each(chunks, ask, self._options.parallel_calls)) if chunks else []
        return [answer for answers in answered for answer in answers]

    def backoff_s(self, failures: int) -> float:
        """Wait before the n-th repeat: backoff_factor · 2^(n−1), up to a quarter more so that clients spread."""
        return self._options.backoff_factor * 2.0 ** (failures - 1) * (1 + JITTER * self._rng.random())

    async def _keep_distance(self) -> None:
        """`chunk_delay_s` between calls."""
        if self._options.chunk_delay_s:
            wait_s = max(0.0, self._next_call - time.monotonic())
            self._next_call = time.monotonic() + wait_s + self._options.chunk_delay_s
            await asyncio.sleep(wait_s)

    async def _post(self, route: str, payload: Any) -> Any:
        return await self._until_deadline(self._repeat(route, json.dumps(payload).encode()), route)

    async def _until_deadline(self, work: Coroutine[Any, Any, Answer], what: str) -> Answer:
        try:
            async with asyncio.timeout(self._options.deadline_s):
                return await work
        except TimeoutError:
            waited = f"no answer to {what} within {self._options.deadline_s:g} s"
            raise ServiceUnavailable(f"{waited}; last problem: {self._replicas.problem}") from None

    async def _repeat(self, route: str, body: bytes) -> Any:
        failed_by: list[Replica] = []
        while True:
            async with self._replicas.least_busy(avoid=failed_by) as replica:
                answer = await self._try(replica, route, body)
            if isinstance(answer, _Answer):
                return answer.content
            if answer is not None:
                failed_by.append(replica)
                failures = len(failed_by)
                if failures > self._options.max_retries:
                    raise CallFailed(f"{answer.reason}; tried {failures} times")
                log.warning("%s; repeating (%d of %d)", answer.reason, failures, self._options.max_retries)
                await asyncio.sleep(self.backoff_s(failures))

    async def _try(self, replica: Replica, route: str, body: bytes) -> _Answer | _Failure | None:
        """One call: the answer, a failure that counts, or None where another server or a later moment may do better."""
        try:
            reply = await self._call(replica, route, body)
        except Broken as error:
            replica.circuit.lost()
            self._note("gone", f"{replica.url} is gone ({error})")
            return None
        except TimeoutError:
            replica.circuit.lost()
            return _Failure(self._note("failed", f"{replica.url} took longer than {self._options.timeout_s:g} s"))
        if reply is None:
            return None
        if reply.status == 200:
            try:
                content = reply.json()
            except ValueError:
                replica.circuit.failed()
                return _Failure(self._note("failed", f"{replica.url}{route} answered what is no JSON: {reply.detail}"))
            replica.circuit.answered()
            return _Answer(content)
        problem = f"{replica.url}{route} answered {reply.status}: {reply.detail}"
        if reply.status in (429, 503):
            replica.circuit.rest(reply.retry_after_s)
            self._note("busy", problem)
            return None
        if reply.status in (401, 403):
            given = f"was given {self._token_from}, and may differ from that in"
            whose = "is that in" if self._given_token is None else given
            raise ServiceRefused(f"{problem}. The token {whose} {self._folder / handoff.TOKEN_FILE}")
        if reply.status in (404, 405) or 300 <= reply.status < 400:
            setting = f"services.{self._folder.name}.client.url"
            raise ServiceRefused(f"{problem}. That is no such service: check {setting}")
        if reply.status == 408 or reply.status >= 500:
            replica.circuit.failed()
            return _Failure(self._note("failed", problem))
        raise CallFailed(problem, too_large=reply.status == 413)

    async def _call(self, replica: Replica, route: str, body: bytes) -> Reply | None:
        """The answer, over a connection on which the server has said who it is; None where it did not."""
        token = await asyncio.to_thread(self._token)
        if token is None and replica.nonce:
            replica.circuit.rest(1.0)
            self._replicas.trouble(f"{self._folder / handoff.TOKEN_FILE} is not there yet")
            return None
        for _ in range(NEW_CONNECTIONS):
            try:
                return await self._wire.post(f"{replica.url}{route}", body, token, self._options.timeout_s)
            except NewConnection:
                if not await self._replicas.prove(replica):
                    self.troubles["gone"] += 1
                    return None
        raise Broken("it closes every connection")

    def _note(self, kind: str, problem: str) -> str:
        self.troubles[kind] += 1
        self._replicas.trouble(problem)
        return problem

    def _token(self) -> str | None:
        if self._given_token is not None:
            return self._given_token
        try:
            return handoff.read_token(self._folder)
        except FileNotFoundError:
            return None
        except (Untrusted, CorruptFile) as error:
            raise ServiceRefused(str(error)) from error


@dataclass(frozen=True)
class _Answer:
    content: Any


@dataclass(frozen=True)
class _Failure:
    reason: str
