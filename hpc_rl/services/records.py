"""The record of a server: what it says, and when it is so old that it is taken away."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from hpc_rl.services.trust import Untrusted, read_own

log = logging.getLogger(__name__)

MISSED_BEATS = 6


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
        When it began and when it renewed this record, for people: seconds since the epoch by the server's clock, which
        may be minutes off. What matters is that `heartbeat` changes.
    heartbeat_s
        How often it renews this record. Seconds.
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
    heartbeat_s: float
    weights_hash: str
    state: Literal["ready", "draining"]


_ENDPOINT = TypeAdapter(Endpoint)


def record_paths(folder: Path) -> list[Path]:
    """Files that may be records, by name."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [folder / name for name in names if name.endswith(".json") and not name.startswith(".")]


def parse(content: bytes) -> Endpoint | None:
    """A record; None when it is none."""
    try:
        return _ENDPOINT.validate_json(content)
    except ValueError:
        return None


@dataclass
class _Seen:
    content: bytes
    since: float
    looks: int = 1


class Watch:
    """Takes away the records of others that are not renewed any more.

    No two clocks are compared: a record is old when its content has stayed the same for `MISSED_BEATS` of its beats and
    the file system's lag by this process's monotonic clock, and in as many looks, so that time in which this process
    itself was frozen, or the file server away, is not held against anyone. It is read once more before it goes. A
    server that was only frozen writes its record again when it wakes up.

    Parameters
    ----------
    folder
        Of the records.
    own
        Name of the record that is not watched.
    heartbeat_s, lag_s
        How often `look` is called; see `Publication`. Seconds.
    """

    def __init__(self, folder: Path, own: str, heartbeat_s: float, lag_s: float) -> None:
        self._folder, self._own, self._heartbeat_s, self._lag_s = folder, own, heartbeat_s, lag_s
        self._seen: dict[str, _Seen] = {}

    def look(self) -> None:
        """Look at all records, and remove the old ones."""
        seen = {}
        for path in record_paths(self._folder):
            if path.name == self._own:
                continue
            with suppress(Untrusted, FileNotFoundError):  # what is not ours is not for us to remove
                seen[path.name] = found = self._compare(path.name, read_own(path))
                if self._is_old(found) and read_own(path) == found.content:
                    path.unlink(missing_ok=True)
                    log.warning("removed %s: its server has not renewed it for long", path)
        self._seen = seen

    def _compare(self, name: str, content: bytes) -> _Seen:
        found = self._seen.get(name)
        if found is None or found.content != content:
            return _Seen(content, time.monotonic())
        found.looks += 1
        return found

    def _is_old(self, found: _Seen) -> bool:
        record = parse(found.content)
        beat_s = max(self._heartbeat_s, record.heartbeat_s if record is not None else 0.0)
        patience_s = MISSED_BEATS * beat_s + self._lag_s
        return found.looks > MISSED_BEATS and time.monotonic() - found.since > patience_s
