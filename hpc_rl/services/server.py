"""A running HTTP server in a thread: the main thread stays free for signals and for deciding when to leave."""

from __future__ import annotations

import logging
import socket
import threading
import time

import uvicorn

from hpc_rl.services.connections import BACKLOG, MAX_HEAD_BYTES, Connections
from hpc_rl.services.guard import Guard

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 30


class ServerThread:
    """A running server. `start` returns once it answers; `drain` turns new requests away; `stop` ends it.

    Parameters
    ----------
    guard
        What it serves.
    sock
        A listening socket (`address.bind`).
    connections
        Those that are open.
    """

    def __init__(self, guard: Guard, sock: socket.socket, connections: Connections) -> None:
        self.guard, self.connections, self._sock = guard, connections, sock
        options = uvicorn.Config(
            guard,
            http=connections.protocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="error",  # what a stranger sends is no line in the log
            access_log=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,  # `drain` has waited already; what is left is cancelled and told so
            server_header=False,
            proxy_headers=False,
        )
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(target=self._serve, name="http-server", daemon=True)

    def _serve(self) -> None:
        self._server.run(sockets=[self._sock])

    @property
    def port(self) -> int:
        """The port it is bound to."""
        return int(self._sock.getsockname()[1])

    @property
    def idle_s(self) -> float:
        """Seconds since the last request for the service began or ended; 0 while one waits or is answered.

        `/health`, `/ready` and `/metrics` are no requests for the service: who only looks keeps nobody here.
        """
        return 0.0 if self.guard.in_flight else time.monotonic() - self.guard.last_request

    @property
    def alive(self) -> bool:
        """False once the server has ended, by itself or by `stop`."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start serving; returns when the first request would be answered."""
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the HTTP server did not start; its reason is in the log above")
            time.sleep(0.01)

    def drain(self, timeout_s: float) -> bool:
        """Turn new requests away (503) and wait for those in flight; True when none is left."""
        self.guard.draining = True
        deadline = time.monotonic() + timeout_s
        while self.guard.in_flight and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.guard.in_flight

    def stop(self) -> None:
        """Close all connections and end the thread, unless that hangs."""
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the HTTP server does not end; it is left behind")
        self._sock.close()
