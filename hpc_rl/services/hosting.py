"""A service that is up: bound, serving, published; and how it leaves: unpublished for new clients, drained, stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.services import handoff
from hpc_rl.services.batching import Batcher
from hpc_rl.services.handoff import Publication
from hpc_rl.services.server import Limits, ServerThread

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hosted:
    """A service at work."""

    server: ServerThread
    publication: Publication
    batcher: Batcher[Any, Any]

    def leave(self, drain_s: float) -> None:
        """Send clients elsewhere, finish what was begun within `drain_s`, and end. Seconds."""
        self.publication.drain()
        if not self.server.drain(drain_s):
            log.warning(
                "leaving with %d requests unanswered; their clients will ask again", self.server.guard.in_flight
            )
        self.publication.unpublish()
        self.server.stop()


def host(
    app: FastAPI,
    batcher: Batcher[Any, Any],
    *,
    service: str,
    folder: Path,
    address: handoff.Address,
    options: ListenerServiceConfig,
    details: Callable[[], Mapping[str, Any]],
    weights_hash: str = "",
    environ: Mapping[str, str] = os.environ,
) -> Hosted:
    """Bind, serve, and publish, in this order: a published address answers.

    Parameters
    ----------
    app, batcher
        The service; its model is loaded already.
    service, folder
        Its name, and the folder of its handoff records.
    address
        Where to bind and what to publish (`handoff.choose_address`).
    options
        Port, limits, heartbeat.
    details
        What `/health` tells those who have the token.
    environ
        `HPC_RL_JOB_ID` and `HPC_RL_RESTART` go into the record.
    """
    sock = handoff.bind(address.bind, options.port, options.port_range)
    nonce = handoff.new_nonce()
    server = ServerThread(
        app,
        sock,
        token=handoff.run_token(folder),
        nonce=nonce,
        limits=Limits(options.max_body_bytes),
        details=details,
    )
    server.start()
    publication = handoff.publish(
        folder,
        service,
        handoff.replica_name(environ),
        address.published,
        server.port,
        job_id=environ.get("HPC_RL_JOB_ID", ""),
        restart=int(environ.get("HPC_RL_RESTART", "0")),
        weights_hash=weights_hash,
        nonce=nonce,
        heartbeat_s=options.heartbeat_s,
    )
    log.info("%s answers at %s", service, publication.endpoint.url)
    return Hosted(server, publication, batcher)
