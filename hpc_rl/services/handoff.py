"""How clients find a service: one record per replica in the workspace, and one token for the run.

A server binds first and publishes afterwards, so a published address answers. `services/NAME/REPLICA.json` is replaced
atomically and renewed by a heartbeat. What a record says is a hint: whether the server at that address is the one that
wrote it is decided by the nonce, which its `/health` must repeat. The token lies beside the records in a file that only
the user can read; records may be readable to the group. In a workspace that a group may write to, others could plant
either: the folder is therefore closed to other writers, and what belongs to somebody else is not believed.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from hpc_rl.run import atomic
from hpc_rl.services.trust import Untrusted, make_folder, read_own

TOKEN_FILE = "token"


@dataclass(frozen=True)
class Endpoint:
    """One replica of a service, as published.

    Attributes
    ----------
    service, replica
        Whose record this is: `listener`, and a name unique to the replica (a requeued job keeps it).
    host, port, url
        Where it answers, as other nodes can reach it.
    job_id, restart
        The allocation it runs in, and how often that was requeued; "" outside of Slurm.
    nonce
        Drawn anew by each server process; its `/health` repeats it.
    started, heartbeat
        Seconds since the epoch, by the server's clock.
    weights_hash
        Which weights it serves.
    state
        `draining`: it finishes what it has and leaves; ask another one.
    """

    service: str
    replica: str
    host: str
    port: int
    url: str
    job_id: str
    restart: int
    nonce: str
    started: float
    heartbeat: float
    weights_hash: str
    state: Literal["ready", "draining"]


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

    Parameters
    ----------
    folder
        `services/NAME` in the workspace.
    endpoint
        The record. A record of the same replica is replaced: it belonged to this job before it was requeued.
    heartbeat_s
        How often the record is renewed. Seconds.
    """

    def __init__(self, folder: Path, endpoint: Endpoint, heartbeat_s: float) -> None:
        self.folder, self.endpoint, self.heartbeat_s = folder, endpoint, heartbeat_s
        self.path = folder / f"{endpoint.replica}.json"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        make_folder(folder)
        self._write(endpoint)
        self._thread = threading.Thread(target=self._beat, name="handoff-heartbeat", daemon=True)
        self._thread.start()

    def _write(self, endpoint: Endpoint) -> None:
        self.endpoint = replace(endpoint, heartbeat=time.time())
        atomic.write_json(self.path, asdict(self.endpoint))

    def _is_ours(self) -> bool:
        """False once the same job, requeued elsewhere, has published a newer record."""
        try:
            record = _read(self.path)
        except Untrusted:
            return True  # planted, or damaged: no successor of ours
        return record is None or record.nonce == self.endpoint.nonce

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            with self._lock:
                if self._stop.is_set():
                    return
                try:
                    if self._is_ours():
                        self._write(self.endpoint)
                except OSError:
                    continue  # a hiccup of the file system; clients judge by the nonce, not by the age alone

    def drain(self) -> None:
        """Tell clients to go elsewhere."""
        with self._lock:
            if not self._stop.is_set() and self._is_ours():
                self._write(replace(self.endpoint, state="draining"))

    def unpublish(self) -> None:
        """Take the record away, unless it is a newer server's."""
        self._stop.set()
        with self._lock:
            if self._is_ours():
                self.path.unlink(missing_ok=True)
        self._thread.join()


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
) -> Publication:
    """Publish a server that has bound its port already."""
    now = time.time()
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    nonce = nonce or new_nonce()
    record = Endpoint(service, replica, host, port, url, job_id, restart, nonce, now, now, weights_hash, "ready")
    return Publication(folder, record, heartbeat_s)


def new_nonce() -> str:
    """What a server process is recognised by."""
    return secrets.token_hex(16)


def replica_name(environ: Mapping[str, str]) -> str:
    """A name that a requeued job keeps and that no other server of the run has."""
    job = environ.get("HPC_RL_JOB_ID", "")
    return f"job-{job}" if job else f"{socket.gethostname()}-{os.getpid()}"


def discover(folder: Path, on_refused: Callable[[str], None] | None = None) -> list[Endpoint]:
    """All published replicas that take requests, those with the youngest heartbeat first.

    The folder is listed and every record opened, which makes NFS clients ask the server for changes. Records that
    cannot be read, and those that another user wrote, are left out; `on_refused` is told the reason.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        if not name.endswith(".json") or name.startswith("."):
            continue
        path = folder / name
        try:
            endpoint, problem = _read(path), f"{path} is no handoff record"
        except Untrusted as error:
            endpoint, problem = None, str(error)
        if endpoint is None:
            if on_refused is not None and os.path.lexists(path):
                on_refused(problem)
        elif endpoint.state == "ready":
            found.append(endpoint)
    return sorted(found, key=lambda endpoint: -endpoint.heartbeat)


def _read(path: Path) -> Endpoint | None:
    """The record in `path`; None when it is gone or is no record; Untrusted when it is somebody else's."""
    try:
        return Endpoint(**json.loads(read_own(path)))
    except Untrusted:
        raise
    except (FileNotFoundError, ValueError, TypeError):
        return None
