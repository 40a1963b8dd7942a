"""Connections that strangers cannot use up, on a machine where anybody may connect.

A connection has to bring the whole head of its request in time, and to take in time what it is sent; otherwise it is
cut. So many are open at most: for one more, the oldest goes of those that never showed the token.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16_384
BACKLOG = 128
"""Connections that the kernel holds until the server takes them, and that it takes at once at most."""
OTHER_DESCRIPTORS = 512
"""What else a process may have open: files of a model, images, libraries."""


class Connections:
    """The open connections of one server.

    Parameters
    ----------
    limit
        How many there may be; fewer where the process may not open so many files.
    patience_s
        How long a head may take to arrive, and an answer to be taken. Seconds.
    """

    def __init__(self, limit: int, patience_s: float) -> None:
        self.limit, self.patience_s = _affordable(limit), patience_s
        self._strangers: OrderedDict[Connection, None] = OrderedDict()  # the oldest first
        self._known: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    @property
    def protocol(self) -> type[asyncio.Protocol]:
        """What uvicorn calls for each new connection."""
        return cast(type[asyncio.Protocol], partial(Connection, self))

    def add(self, connection: Connection) -> None:
        """A new one; it may be cut at once, where all others have shown the token."""
        self._strangers[connection] = None
        if len(self) > self.limit:
            oldest, _ = self._strangers.popitem(last=False)
            oldest.cut()

    def trust(self, connection: Connection) -> None:
        """It has shown the token."""
        if connection in self._strangers:
            del self._strangers[connection]
            self._known.add(connection)

    def remove(self, connection: Connection) -> None:
        """It is closed."""
        self._strangers.pop(connection, None)
        self._known.discard(connection)


class Connection(H11Protocol):
    """One connection. Its requests find it as `scope["state"]["connection"]`.

    h11 is the parser because it is strict (two `Host` headers, or none, are an error) and bounds the size of a head.
    """

    def __init__(
        self,
        others: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, {**app_state, "connection": self}, _loop)
        self._others = others
        self._head = _Timer(self.loop, others.patience_s, self.cut)
        self._answer = _Timer(self.loop, others.patience_s, self.cut)

    def trust(self) -> None:
        """It has shown the token: strangers do not displace it."""
        self._others.trust(self)

    def cut(self) -> None:
        """Close it now, whatever is still to be sent."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time for the first head begins."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` is called for whatever the kernel does not take
        self._others.add(self)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """The time for a later head begins with its first byte; until then uvicorn's keep-alive time-out runs."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """The client does not take what it is sent, for now."""
        super().pause_writing()
        self._answer.start()

    def resume_writing(self) -> None:
        """All is sent."""
        super().resume_writing()
        self._answer.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Either side has closed it."""
        self._others.remove(self)
        super().connection_lost(exc)
        self._head.stop()
        self._answer.stop()

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._head.stop()
        elif not self.transport.is_closing():
            self._head.start()


class _Timer:
    """Does something after a while, unless it is stopped. Starting it again does not prolong it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], None]) -> None:
        self._loop, self._seconds, self._then = loop, seconds, then
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._handle = self._handle or self._loop.call_later(self._seconds, self._then)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


def _affordable(connections: int) -> int:
    """How many of so many connections this process may have open, after its soft limit is raised as far as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    affordable = connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - OTHER_DESCRIPTORS))
    if affordable < connections:
        log.warning(
            "max_connections: %d of %d, for this process may have only %d files open; raise its hard limit "
            "(ulimit -Hn) to %d, or lower services.NAME.max_connections",
            *(affordable, connections, soft, wanted),
        )
    return affordable
