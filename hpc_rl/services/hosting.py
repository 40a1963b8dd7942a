"""A service that is up: bound, serving, published; and how it leaves: unpublished for new clients, drained, stopped."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.config.services import ServiceConfig
from hpc_rl.services import handoff
from hpc_rl.services.address import Address, bind, names_of
from hpc_rl.services.connections import Connections
from hpc_rl.services.frame import Service
from hpc_rl.services.guard import Guard, Limits
from hpc_rl.services.handoff import Publication
from hpc_rl.services.metrics import Board, Metrics
from hpc_rl.services.server import ServerThread

log = logging.getLogger(__name__)

LEAST_CLOSE_S = 1.0
"""For the threads of a model that does nothing any more to end in."""
FILE_PATIENCE_S = 5.0
"""For each thing that is done to files on leaving: a file server that is away keeps nobody here."""


@dataclass(frozen=True)
class Hosted:
    """A service at work."""

    service: Service
    server: ServerThread
    publication: Publication
    board: Board | None = None

    def leave(self, drain_s: float) -> None:
        """Send clients elsewhere, finish what was begun within `drain_s`, and end with the model. Seconds."""
        deadline = time.monotonic() + drain_s
        self.server.guard.draining = True
        _try("say that it leaves", self.publication.drain)
        if not self.server.drain(drain_s):
            log.warning(
                "leaving with %d requests unanswered; their clients will ask again", self.server.guard.in_flight
            )
        _try("take its record away", self.publication.unpublish)
        self.server.stop()
        if self.service.batcher.close(max(LEAST_CLOSE_S, deadline - time.monotonic())):
            self.service.close()
        else:
            log.warning("leaving while the model is still at a batch that nobody waits for any more")
        if self.board is not None:
            _try("close its event files", self.board.close)


def _try(what: str, action: Callable[[], None]) -> None:
    """Leave whatever the file system is up to: who reads the record still gets the nonce of nobody."""

    def attempt() -> None:
        try:
            action()
        except OSError as error:
            log.warning("cannot %s: %s", what, error)

    thread = threading.Thread(target=attempt, name="leave", daemon=True)
    thread.start()
    thread.join(FILE_PATIENCE_S)
    if thread.is_alive():
        log.warning("cannot %s: the file system does not answer", what)


def host(
    service: Service,
    *,
    folder: Path,
    address: Address,
    options: ServiceConfig,
    environ: Mapping[str, str] = os.environ,
    lag_s: float = handoff.LAG_S,
    tensorboard: Path | None = None,
) -> Hosted:
    """Bind, serve, and publish, in this order: a published address answers.

    Parameters
    ----------
    service
        Its model is loaded already.
    folder
        Of its handoff records.
    address
        Where to bind and what to publish (`hpc_rl.services.address`).
    options
        Port, limits, heartbeat.
    environ
        `HPC_RL_JOB_ID` and `HPC_RL_RESTART` go into the record.
    lag_s
        How late the records of others may be seen (`cluster.file_system_lag_s`). Seconds.
    tensorboard
        Folder of the event files of all replicas; None = none.
    """
    sock = bind(address.bind, options.port, options.port_range)
    nonce, replica, metrics = handoff.new_nonce(), handoff.replica_name(environ), Metrics(service)
    service.batcher.on_batch = metrics.on_batch
    guard = Guard(
        service,
        token=handoff.run_token(folder),
        nonce=nonce,
        names=names_of(address.published, *options.allowed_hosts),
        limits=Limits(options.max_body_bytes, options.body_timeout_s, options.max_requests_bytes),
        metrics=metrics.text,
        on_answer=metrics.on_answer,
    )
    server = ServerThread(guard, sock, Connections(options.max_connections, options.body_timeout_s))
    metrics.watch(server)
    server.start()
    publication = handoff.publish(
        folder,
        service.name,
        replica,
        address.published,
        server.port,
        job_id=environ.get("HPC_RL_JOB_ID", ""),
        restart=int(environ.get("HPC_RL_RESTART", "0")),
        weights_hash=service.weights_hash,
        nonce=nonce,
        heartbeat_s=options.heartbeat_s,
        lag_s=lag_s,
    )
    log.info("%s answers at %s", service.name, publication.endpoint.url)
    board = Board(metrics, tensorboard / replica, options.metrics_s) if tensorboard else None
    return Hosted(service, server, publication, board)
