"""The right to do one piece of work, held by one process at a time and taken over when its holder dies.

A lease is a series of *generations*: `NAME.lease.0001`, `.0002`, … Each is created exclusively (link) and holds who
took it; its modification time is the heartbeat. The highest generation is the lease. It is free when it is released (a
`.released` file beside it) or stale: no heartbeat for `ttl_s`, or its process is known to be dead because it ran on
this very host. Taking over means creating the next generation, which only one process can; nothing is ever overwritten,
so a late take-over cannot steal a lease that was renewed meanwhile. Lower generations are removed by the holder of a
higher one.

What this does not promise: a holder that was frozen and wakes up does not know at once that it lost its lease. So work
ends in an exclusive manifest (`hpc_rl.run.manifest`), and of two workers the first wins and the second is thrown away.

Heartbeats and their age are both read off the file system's own clock, so clocks that differ between hosts do not
matter.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.run import atomic

_GENERATION = re.compile(r"\.lease\.(\d{4,})$")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as written into its file."""

    token: str
    host: str
    pid: int
    pid_start: str
    pid_space: str
    job_id: str
    taken: float

    def is_known_dead(self) -> bool:
        """True when the holder ran on this host and its process is gone (a recycled pid has another start time).

        A container may number processes for itself: from outside of it nothing can be said about them.
        """
        here = (self.host, self.pid_space) == (socket.gethostname(), _process_space())
        return here and self.pid_start != _process_start(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job_id})" if self.job_id else "")


@dataclass(frozen=True)
class LeaseState:
    """What a look at a lease found: nobody ever held it (generation 0), or its latest generation."""

    generation: int
    holder: Holder | None
    age_s: float
    released: bool

    def is_held(self, ttl_s: float) -> bool:
        """True while its holder is believed to be alive and at work."""
        return self.holder is not None and not self.released and self.age_s <= ttl_s and not self.holder.is_known_dead()


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot (proc(5), field 22), '' when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _process_space() -> str:
    """Which numbering of processes ours belongs to (pid_namespaces(7))."""
    return str(Path("/proc/self/ns/pid").readlink())


def _file_system_now(folder: Path) -> float:
    """The time on the file system's clock: that of a file touched just now.

    Somebody who may only read cannot touch files; for those, who only look, this host's clock has to do.
    """
    probe = folder / f".tmp-clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS):
            return time.time()
        raise
    try:
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _generations(folder: Path, name: str) -> dict[int, Path]:
    prefix = f"{name}.lease."
    found = {}
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return {}
    for entry in entries:
        match = _GENERATION.search(entry)
        if match and entry.startswith(prefix) and entry[: match.start()] == name:
            found[int(match[1])] = folder / entry
    return found


def look(folder: Path, name: str) -> LeaseState:
    """The state of lease `name` in `folder`, without touching it."""
    while True:
        generations = _generations(folder, name)
        if not generations:
            return LeaseState(0, None, 0.0, True)
        generation = max(generations)
        path = generations[generation]
        try:
            holder = Holder(**json.loads(path.read_text()))
            age_s = _file_system_now(folder) - path.stat().st_mtime
        except FileNotFoundError:
            continue  # a higher generation replaced it while we looked
        return LeaseState(generation, holder, age_s, path.with_name(path.name + ".released").exists())


class Lease:
    """A lease that this process holds; beats in a thread until `release`.

    Use `acquire` to get one. As a context manager it is released on exit.
    """

    def __init__(self, folder: Path, name: str, generation: int, holder: Holder, ttl_s: float) -> None:
        self.folder, self.name, self.generation, self.holder, self.ttl_s = folder, name, generation, holder, ttl_s
        self.path = folder / f"{name}.lease.{generation:04d}"
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{name}", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """Unique to this holding of the lease; part of the names of what is written under it."""
        return self.holder.token

    @property
    def lost(self) -> bool:
        """True once somebody else has taken this lease over."""
        return self._lost.is_set() or self._superseded()

    def _superseded(self) -> bool:
        generations = _generations(self.folder, self.name)
        if not generations or max(generations) > self.generation:
            self._lost.set()
        return self._lost.is_set()

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl_s / 5):
            try:
                if self._superseded():
                    return
                os.utime(self.path)
            except FileNotFoundError:
                self._lost.set()
                return
            except OSError:
                continue  # a hiccup of the file system: the next beat may reach it before the lease is stale

    def release(self) -> None:
        """Give the lease back, so that the next holder need not wait for it to become stale."""
        self._stop.set()
        self._thread.join()
        if not self._superseded():
            atomic.create_exclusive(self.path.with_name(self.path.name + ".released"), "")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(folder: Path, name: str, ttl_s: float) -> Lease | None:
    """Take the lease `name` in `folder` if it is free or stale; None when somebody holds it or was faster.

    Parameters
    ----------
    folder, name
        Where the lease's files lie, and what they are called.
    ttl_s
        A holder that shows no heartbeat for this long is taken for dead. On a file system that shows changes late it
        must include that lag.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = look(folder, name)
    if state.is_held(ttl_s):
        return None
    pid = os.getpid()
    holder = Holder(
        secrets.token_hex(6),
        socket.gethostname(),
        pid,
        _process_start(pid),
        _process_space(),
        os.environ.get("HPC_RL_JOB_ID", ""),
        time.time(),
    )
    generation = state.generation + 1
    path = folder / f"{name}.lease.{generation:04d}"
    if not atomic.create_exclusive(path, json.dumps(vars(holder))):
        return None
    generations = _generations(folder, name)
    if max(generations, default=generation) > generation:
        path.unlink(missing_ok=True)  # we built on a view that was out of date
        return None
    for lower in sorted(set(generations) - {generation}):
        generations[lower].with_name(generations[lower].name + ".released").unlink(missing_ok=True)
        generations[lower].unlink(missing_ok=True)
    return Lease(folder, name, generation, holder, ttl_s)


def acquire_patiently(folder: Path, name: str, ttl_s: float, patience_s: float, poll_s: float = 0.2) -> Lease | None:
    """`acquire`, tried again for up to `patience_s`."""
    deadline = time.monotonic() + patience_s
    while (lease := acquire(folder, name, ttl_s)) is None and time.monotonic() < deadline:
        time.sleep(poll_s)
    return lease
