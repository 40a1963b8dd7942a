"""HTTP as clients of a service speak it: whole answers in bounded time, no proxies, no redirects, no strangers.

A token goes only over connections on which the server has said who it is. The port of a server that died may belong to
somebody else before its connections are known to be broken, so a call never opens a connection: it raises
`NewConnection`, and the caller asks on a new one who is there (`/health`, without the token), which is then used.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

CLIENT_HEADER = "x-client-id"
"""Who asks, so that clients take turns: a name that a client draws for itself."""
TIMEOUT_HEADER = "x-timeout-s"
"""How long a client waits for an answer before it hangs up. Seconds."""
MAX_HEALTH_BYTES = 1 << 20
MAX_ANSWER_BYTES = 1 << 30
KEEP_ALIVE_S = 15.0  # servers keep theirs longer, so that it is the client who lets go
LONGEST_RETRY_AFTER_S = 30.0
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")


class NewConnection(Exception):
    """A call would have to open a connection."""


class Broken(Exception):
    """A connection that failed, or an answer that is none; the message says which."""


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Its content; ValueError when that is no JSON."""
        return read_json(self.body)

    @property
    def detail(self) -> str:
        """What it says about a failure."""
        try:
            said = self.json()
        except ValueError:
            return self.body[:200].decode(errors="replace")
        return str(said.get("detail", said) if isinstance(said, dict) else said)[:500]

    @property
    def retry_after_s(self) -> float:
        """How long its server wants to be left alone, a second where it does not say. Seconds."""
        wait_s = retry_after_s(self.headers)
        return 1.0 if wait_s is None else min(wait_s, LONGEST_RETRY_AFTER_S)


def read_json(text: bytes) -> Any:
    """What an answer holds; ValueError when it is no JSON, or nested so deep that it cannot be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long a server wants to be left alone (RFC 9110, 10.2.3). Seconds; None when it does not say.

    In seconds, in milliseconds as OpenAI does, or as a date by the server's own clock (`Date`).

    Parameters
    ----------
    headers
        Of its answer; names in small letters, or whatever the mapping takes for them.
    """
    value, milliseconds = headers.get("retry-after", ""), headers.get("retry-after-ms", "")
    if _NUMBER.fullmatch(milliseconds):
        return float(milliseconds) / 1000
    if _NUMBER.fullmatch(value):
        return float(value)
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, wait.total_seconds())


class Wire:
    """Connections of one client, kept for its next calls. All methods belong to one event loop.

    Parameters
    ----------
    headers
        Sent with everything.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # else every call is a line in the job's log
        # Cluster nodes often carry http_proxy, and a proxy knows nothing of compute nodes: trust_env=False ignores it.
        self._http = httpx.AsyncClient(
            timeout=None,  # of httpx, which knows no limit for the whole of an answer
            trust_env=False,
            follow_redirects=False,
            headers={"accept-encoding": "identity", **headers},
            limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S),
        )

    async def health(self, url: str, timeout_s: float, token: str | None = None) -> dict[str, Any]:
        """What the server at `url` says of itself, over a new or an idle connection.

        Raises
        ------
        Broken
            When it says nothing of the kind in time.
        """
        reply = await self._send("GET", f"{url}/health", None, token, timeout_s, MAX_HEALTH_BYTES, {})
        if reply.status == 421:
            raise Broken(f"it answers 421: {reply.detail}")
        try:
            said = reply.json() if reply.status == 200 else None
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Broken(f"it answers {reply.status}, and nothing that a service would say")
        return said

    async def post(self, url: str, body: bytes, token: str | None, timeout_s: float) -> Reply:
        """A call over an idle connection.

        Raises
        ------
        NewConnection
            When there is none.
        Broken
            When the connection breaks before the whole answer is there.
        TimeoutError
            When that takes longer than `timeout_s`.
        """
        extensions = {"trace": _no_new_connection}
        return await self._send("POST", url, body, token, timeout_s, MAX_ANSWER_BYTES, extensions)

    async def _send(
        self, method: str, url: str, body: bytes | None, token: str | None, timeout_s: float, limit: int, more: Any
    ) -> Reply:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        if body is not None:
            headers["content-type"] = "application/json"
        content = bytearray()
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream(method, url, content=body, headers=headers, extensions=more) as answer,
            ):
                async for part in answer.aiter_raw():
                    content += part
                    if len(content) > limit:
                        raise Broken(f"it answers more than {limit} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        return Reply(answer.status_code, answer.headers, bytes(content))

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()


async def _no_new_connection(event: str, info: Mapping[str, Any]) -> None:
    if event == "connection.connect_tcp.started":
        raise NewConnection
