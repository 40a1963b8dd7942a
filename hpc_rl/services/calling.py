"""Calls to a service that outlive its servers: retries with back-off, fail-over between replicas, a deadline.

Three things can go wrong, and they are kept apart:

- *No server answers* (none is published, connections fail, all are busy or leaving): the client waits for one, for up
  to `deadline_s`, then raises `ServiceUnavailable`. A killed server is not the request's fault and costs no retry.
- *A server answers with a failure, or not in time*: the call is repeated `max_retries` times, each after a longer wait,
  then raises `CallFailed`.
- *A server does not take the call as it is* (too large, malformed): `CallFailed` at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from hpc_rl.config.services import ClientConfig
from hpc_rl.services import handoff
from hpc_rl.services.replicas import Replica, Replicas
from hpc_rl.services.trust import Untrusted

log = logging.getLogger(__name__)

POLL_S = 0.5
JITTER = 0.25


class ServiceUnavailable(RuntimeError):
    """No server could be reached until the deadline. The work is to be tried again later (exit code 75)."""


class ServiceRefused(RuntimeError):
    """The server does not accept this client; the message says what to check."""


class CallFailed(RuntimeError):
    """A call that was answered with failures until its retries ended, or that the server will not take as it is."""

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


class ServiceClient:
    """Calls a service, whichever of its servers answers.

    Parameters
    ----------
    folder
        The service's handoff folder; its token is there.
    options
        Time limits and retries.
    token
        Instead of the one in the folder.
    sleep, rng
        How to wait, and where jitter comes from.
    """

    def __init__(
        self,
        folder: Path,
        options: ClientConfig,
        *,
        token: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._folder, self._options, self._given_token, self._sleep = folder, options, token, sleep
        self._rng = rng or random.Random()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else every call is a line in the job's log
        # Cluster nodes often carry http_proxy, and a proxy knows nothing of compute nodes: trust_env=False ignores it.
        self._http = httpx.Client(timeout=httpx.Timeout(options.timeout_s, connect=10.0), trust_env=False)
        self._replicas = Replicas(folder, options.url, self._http, self._rng)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def post(self, route: str, payload: Any) -> Any:
        """The JSON that a server answers to `payload`.

        Raises
        ------
        ServiceUnavailable
            When no server answered until `deadline_s` after the call began.
        ServiceRefused
            When the token is wrong or missing.
        CallFailed
            When a server answered with failures and the retries ended, or finds the call too large or malformed.
        """
        deadline = time.monotonic() + self._options.deadline_s
        failures = 0
        while True:
            with self._replicas.least_busy() as replica:
                answer = self._try(replica, route, payload) if replica else None
            if isinstance(answer, _Answer):
                return answer.content
            if isinstance(answer, _Failure):
                failures += 1
                if failures > self._options.max_retries:
                    raise CallFailed(f"{answer.reason}; tried {failures} times")
                log.warning("%s; repeating (%d of %d)", answer.reason, failures, self._options.max_retries)
                self._sleep(self.backoff_s(failures))
            if time.monotonic() >= deadline:
                waited = f"no answer to {route} within {self._options.deadline_s:g} s"
                raise ServiceUnavailable(f"{waited}; last problem: {self._replicas.problem}")
            if not isinstance(answer, _Failure):
                self._sleep(POLL_S * (1 + JITTER * self._rng.random()))

    def backoff_s(self, failures: int) -> float:
        """Wait before the n-th repeat: backoff_factor · 2^(n−1), up to a quarter more so that clients spread."""
        return self._options.backoff_factor * 2.0 ** (failures - 1) * (1 + JITTER * self._rng.random())

    def _try(self, replica: Replica, route: str, payload: Any) -> _Answer | _Failure | None:
        """One call: the answer, a failure that counts, or None where another server or a later moment may do better."""
        token = self._token()
        if token is None and replica.nonce:
            self._replicas.busy(replica, f"{self._folder / handoff.TOKEN_FILE} is not there yet", POLL_S)
            return None
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = self._http.post(f"{replica.url}{route}", json=payload, headers=headers)
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            self._replicas.failed(replica, f"{replica.url} took longer than {self._options.timeout_s:g} s")
            return _Failure(self._replicas.problem)
        except httpx.TransportError as error:
            self._replicas.gone(replica, f"{replica.url} is gone ({type(error).__name__}: {error})")
            return None
        if answer.status_code == 200:
            self._replicas.succeeded(replica)
            return _Answer(answer.json())
        problem = f"{replica.url}{route} answered {answer.status_code}: {_detail(answer)}"
        if answer.status_code in (429, 503):
            self._replicas.busy(replica, problem, _retry_after_s(answer))
            return None
        if answer.status_code in (401, 403):
            raise ServiceRefused(
                f"{problem}. The token is read from {self._folder / handoff.TOKEN_FILE} or LISTENER_TOKEN"
            )
        if answer.status_code >= 500:
            self._replicas.failed(replica, problem)
            return _Failure(problem)
        raise CallFailed(problem, too_large=answer.status_code == 413)

    def _token(self) -> str | None:
        if self._given_token is not None:
            return self._given_token
        try:
            return handoff.read_token(self._folder)
        except FileNotFoundError:
            return None
        except Untrusted as error:
            raise ServiceRefused(str(error)) from error


@dataclass(frozen=True)
class _Answer:
    content: Any


@dataclass(frozen=True)
class _Failure:
    reason: str


def _detail(answer: httpx.Response) -> str:
    try:
        said = answer.json()
    except ValueError:
        return answer.text[:200]
    return str(said.get("detail", said) if isinstance(said, dict) else said)[:500]


def _retry_after_s(answer: httpx.Response) -> float:
    value = answer.headers.get("retry-after", "1")
    return min(30.0, float(value)) if value.isdigit() else 1.0
