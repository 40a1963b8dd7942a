"""How clients find a service: one record per replica in the workspace, and one token for the run.

A server binds first and publishes afterwards, so a published address answers. `services/NAME/REPLICA-NONCE.json` is
replaced atomically and renewed by a heartbeat. What a record says is a hint: whether the server at that address is the
one that wrote it is decided by the nonce, which its `/health` must repeat. The token lies beside the records in a file
that only the user can read; records may be readable to the group. In a workspace that a group may write to, others
could plant either: the folder is therefore closed to other writers, and what belongs to somebody else is not believed.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from hpc_rl.run import atomic
from hpc_rl.services.records import Endpoint, Watch, parse, record_paths
from hpc_rl.services.trust import Untrusted, make_folder, read_own

log = logging.getLogger(__name__)

TOKEN_FILE = "token"
LAG_S = 60.0


def run_token(folder: Path) -> str:
    """The token of a service in this run: drawn by whoever asks first (0600, created exclusively), then the same.

    Raises
    ------
    Untrusted
        See `read_token`.
    """
    make_folder(folder)
    path = folder / TOKEN_FILE
    if not os.path.lexists(path):
        atomic.create_exclusive(path, secrets.token_urlsafe(32) + "\n", private=True)
    return read_token(folder)


def read_token(folder: Path) -> str:
    """The token of a service; FileNotFoundError before its first server started.

    Raises
    ------
    Untrusted
        When the file is another user's, or others may read or write it: somebody else may know the token.
    CorruptFile
        When it is empty.
    """
    token = read_own(folder / TOKEN_FILE, private=True).decode(errors="replace").strip()
    if not token:
        raise atomic.CorruptFile(f"{folder / TOKEN_FILE} is empty; remove it and start the service again")
    return token


class Publication:
    """A published record, kept alive by a heartbeat thread until `unpublish`.

    The record is this server's alone, and no other server ever writes to it. What is left of servers before this one
    is taken away: at once where they were the same job before it was requeued, else when they have missed some beats.

    Parameters
    ----------
    folder
        `services/NAME` in the workspace.
    endpoint
        The record.
    lag_s
        How long a file system may show others an old state. Seconds.
    """

    def __init__(self, folder: Path, endpoint: Endpoint, lag_s: float = LAG_S) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.path = folder / f"{endpoint.replica}-{endpoint.nonce[:8]}.json"
        self._watch = Watch(folder, self.path.name, endpoint.heartbeat_s, lag_s)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        make_folder(folder)
        self._remove_predecessors()
        self._write(endpoint)
        self._thread = threading.Thread(target=self._beat, name="handoff-heartbeat", daemon=True)
        self._thread.start()

    def _remove_predecessors(self) -> None:
        for path in record_paths(self.folder):
            with suppress(Untrusted, FileNotFoundError):
                record = parse(read_own(path))
                if record is not None and record.replica == self.endpoint.replica:
                    path.unlink(missing_ok=True)

    def _write(self, endpoint: Endpoint) -> None:
        self.endpoint = replace(endpoint, heartbeat=time.time())
        atomic.write_json(self.path, asdict(self.endpoint), closed=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.endpoint.heartbeat_s):
            try:
                with self._lock:
                    if not self._stop.is_set():
                        self._write(self.endpoint)
                self._watch.look()
            except OSError as error:
                log.warning("the record in %s could not be renewed: %s", self.folder, error)

    def drain(self) -> None:
        """Tell clients to go elsewhere. Where the disk is full they hear it from the server itself, with each call."""
        with self._lock, _reported(self.path):
            if not self._stop.is_set():
                self._write(replace(self.endpoint, state="draining"))

    def unpublish(self) -> None:
        """Take the record away."""
        self._stop.set()
        with self._lock, _reported(self.path):
            self.path.unlink(missing_ok=True)
        self._thread.join()


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """A server that leaves does not stay because its record cannot be changed."""
    try:
        yield
    except OSError as error:
        log.warning("%s could not be changed: %s", path, error)


def publish(
    folder: Path,
    service: str,
    replica: str,
    host: str,
    port: int,
    *,
    job_id: str = "",
    restart: int = 0,
    weights_hash: str = "",
    nonce: str | None = None,
    heartbeat_s: float = 10.0,
    lag_s: float = LAG_S,
) -> Publication:
    """Publish a server that has bound its port already."""
    now = time.time()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    nonce = nonce or new_nonce()
    record = Endpoint(
        service, replica, host, port, url, job_id, restart, nonce, now, now, heartbeat_s, weights_hash, "ready"
    )
    return Publication(folder, record, lag_s)


def new_nonce() -> str:
    """What a server process is recognised by."""
    return secrets.token_hex(16)


def replica_name(environ: Mapping[str, str]) -> str:
    """A name that a requeued job keeps and that no other server of the run has."""
    job = environ.get("HPC_RL_JOB_ID", "")
    return f"job-{job}" if job else f"{socket.gethostname()}-{os.getpid()}"


def discover(folder: Path, on_refused: Callable[[str], None] | None = None) -> list[Endpoint]:
    """All published replicas that take requests, by name.

    The folder is listed and every record opened, which makes NFS clients ask the server for changes. Records that
    cannot be read, and those that another user wrote, are left out; `on_refused` is told the reason. How old a record
    is says nothing: its times are by another host's clock.
    """
    found = []
    for path in record_paths(folder):
        try:
            endpoint, problem = parse(read_own(path)), f"{path} is no handoff record"
        except FileNotFoundError:
            continue
        except Untrusted as error:
            endpoint, problem = None, str(error)
        if endpoint is None:
            if on_refused is not None:
                on_refused(problem)
        elif endpoint.state == "ready":
            found.append(endpoint)
    return found
