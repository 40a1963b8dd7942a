"""A process that takes leases, as others see it: one file that its heart keeps fresh.

The file `.holder-TOKEN` lies in the folder of the leases and says who took them. A lease is a further name of this very
file (link(2)), so taking one is a single operation that only one process can do, and one touch of the file is the
heartbeat of all leases of the process, however many they are. The process is gone

- when its `.holder-TOKEN` is: it was removed by the process itself on its way out, or by somebody who found it dead;
- when the file has not been touched for `ttl_s`;
- when it ran on this very host and its process is dead.

All names lie in one folder: BeeGFS makes hard links only within a folder.

The file's age is read off the file system's own clock, so clocks that differ between hosts do not matter. (Lustre's
clients stamp with their own clocks: there `ttl_s` must exceed by how much those differ, which with NTP is nothing.)
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path

from hpc_rl.run.atomic import CorruptFile

PREFIX = ".holder-"
BEATS = 5
"""Heartbeats in the time after which a holder is taken for dead."""


@dataclass(frozen=True)
class Holder:
    """Who takes leases, as written into the file.

    Files outlive the code that wrote them: what is new has a default, and what is unknown is not read (`see`).
    """

    token: str
    host: str
    pid: int
    pid_start: str
    pid_space: str
    job_id: str
    taken: float
    user: int = -1
    """Its user id; -1, which nobody has: not said."""

    @classmethod
    def this_process(cls) -> Holder:
        """We, under a token that nobody else has."""
        pid = os.getpid()
        return cls(
            secrets.token_hex(6),
            socket.gethostname(),
            pid,
            _process_start(pid),
            _process_space(),
            os.environ.get("HPC_RL_JOB_ID", ""),
            time.time(),
            os.getuid(),
        )

    def is_known_dead(self) -> bool:
        """True when the holder ran on this host and its process is gone (a recycled pid has another start time).

        A container may number processes for itself: from outside of it nothing can be said about them. Nor of another
        user's: /proc may hide those (proc(5), hidepid).
        """
        here = (self.host, self.pid_space, self.user) == (socket.gethostname(), _process_space(), os.getuid())
        return here and self.pid_start != _process_start(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job_id})" if self.job_id else "")


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot (proc(5), field 22), '' when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _process_space() -> str:
    """Which numbering of processes ours belongs to (pid_namespaces(7)), since which start of this very machine.

    The first numbering has the same name on every machine, and machines may share a host name.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def holder_path(folder: Path, token: str) -> Path:
    """The file of a holder."""
    return folder / f"{PREFIX}{token}"


UNWRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Why a file cannot be made: by who may only read, and on a full disk, when one wants to look at a run."""


def file_system_now(folder: Path) -> float:
    """The time on the file system's clock: that of a file touched just now.

    Where no file can be made this host's clock has to do. Nobody takes a lease there, which is a file too.
    """
    probe = folder / f".tmp-clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
    except OSError as error:
        if error.errno in UNWRITABLE:
            return time.time()
        raise
    try:
        os.utime(probe)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def see(path: Path) -> tuple[Holder, float]:
    """Who wrote the file (or the lease) `path`, and when its heart last beat, on the file system's clock.

    It is opened, not just looked at: NFS clients ask the server again when a file is opened (nfs(5), close-to-open).

    Raises
    ------
    FileNotFoundError
        When it is gone.
    CorruptFile
        When it does not say who wrote it: its process died before it had written it.
    """
    with path.open("rb") as file:
        text, beaten = file.read(), os.fstat(file.fileno()).st_mtime
    try:
        said = json.loads(text)
        return Holder(**{field.name: said[field.name] for field in fields(Holder) if field.name in said}), beaten
    except (TypeError, ValueError) as error:
        raise CorruptFile(f"{path} should say who takes leases, in JSON ({error}); {len(text)} bytes") from error


class Presence:
    """This process among those that take leases in a folder; its heart beats in a thread until `close`.

    Safe to use from several threads.
    """

    def __init__(self, folder: Path, ttl_s: float) -> None:
        self.folder, self.ttl_s = folder, ttl_s
        self.holder = Holder.this_process()
        self._lock = threading.RLock()
        self._files = [holder_path(folder, self.token)]
        self._server_time: float | None = None
        self._gone, self._overslept = False, 0
        self._create(self._files[0])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"holder-{self.token}", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """Unique to this presence; part of the names of what is written under its leases."""
        return self.holder.token

    def owns(self, token: str) -> bool:
        """True for the token in one of our files, of which a presence with very many leases has several."""
        return token.partition("-")[0] == self.token

    @property
    def taken_for_dead(self) -> bool:
        """True once somebody has removed our file: all our leases are free then, and some may have been taken."""
        return self._gone

    @property
    def overslept(self) -> int:
        """How often our heart has stood still for so long that others may have taken us for dead."""
        return self._overslept

    def now(self) -> float:
        """The time on the file system's clock: that of our last heartbeat, and the seconds since."""
        with self._lock:
            if self._server_time is None:
                try:
                    self._server_time = os.stat(self._files[-1]).st_mtime
                except FileNotFoundError:
                    self._go_on_with_another_file(self._files[-1])
            assert self._server_time is not None
            return self._server_time + time.monotonic() - self._beaten

    def link(self, lease: Path) -> bool:
        """Take a lease: make its name another name of our file. False when the name exists."""
        while True:
            with self._lock:
                file = self._files[-1]
            try:
                os.link(file, lease)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT):
                    raise
                self._go_on_with_another_file(file)

    def _go_on_with_another_file(self, full: Path) -> None:
        """A file has its limit of names (ext4: 65 000), or somebody who took us for dead removed it."""
        with self._lock:
            if self._files[-1] == full:
                another = holder_path(self.folder, f"{self.token}-{len(self._files)}")
                self._create(another)
                self._files.append(another)

    def _create(self, path: Path) -> None:
        record = {**vars(self.holder), "token": path.name.removeprefix(PREFIX)}
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(record).encode())
                file.flush()
                os.fsync(file.fileno())  # so that the time below is the server's, not the one of this client's cache
                self._beaten, self._server_time = time.monotonic(), os.fstat(file.fileno()).st_mtime
        except BaseException:  # a full disk
            path.unlink(missing_ok=True)
            raise

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl_s / BEATS):
            with self._lock:
                files = list(self._files)
                self._overslept += time.monotonic() - self._beaten > self.ttl_s
            for file in files:
                try:
                    with self._lock:
                        os.utime(file)
                        self._beaten, self._server_time = time.monotonic(), None  # it is asked for when it is needed
                except FileNotFoundError:
                    self._overslept += not self._gone
                    self._gone = True
                    continue
                except OSError:
                    continue  # a hiccup of the file system: the next beat may reach it before we are taken for dead

    def close(self) -> None:
        """Give every lease back at once, so that the next holders need not wait for them to become stale."""
        self._stop.set()
        self._thread.join()
        for file in self._files:
            file.unlink(missing_ok=True)
