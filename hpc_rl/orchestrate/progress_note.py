"""How far a task is with the shards in its hands: one small file for the task, which `status` shows.

The file stays open and is written over in place: after its first line a further one asks the file system's server for
no metadata, however long the task works. That it cannot be written is no reason to lose the shards: a warning says so,
once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

log = logging.getLogger("hpc_rl")

EVERY_S = 5.0
"""Least pause between two writes; `status --watch` shows them as often."""


class ProgressNote:
    """The file, written now and then and removed at the end. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._warned = path, -float("inf"), False
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(self, done: int, total: int) -> None:
        """So many of `total` are done. Cheap to call often."""
        with self._lock:
            if time.monotonic() - self._written < EVERY_S:
                return
            self._written = time.monotonic()
            line = f'{{"done": {done:12}, "total": {total:12}}}\n'.encode()  # as long as the one that it replaces
            try:
                if self._descriptor is None:
                    self._descriptor = self._create(line)
                else:
                    os.pwrite(self._descriptor, line, 0)
                    os.fdatasync(self._descriptor)  # NFS clients keep for themselves what is written, for half a minute
            except OSError as error:
                self._warn(error)

    def _create(self, line: bytes) -> int:
        """The file with its first line; nobody sees it without one."""
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        try:
            descriptor = self._open(temporary)
        except FileNotFoundError:  # asked for only now, as in `hpc_rl.run.atomic`
            temporary.parent.mkdir(exist_ok=True)
            descriptor = self._open(temporary)
        try:
            os.pwrite(descriptor, line, 0)
            os.fdatasync(descriptor)
            temporary.rename(self._path)
        except BaseException:  # a full disk
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        return descriptor

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def remove(self) -> None:
        """The task leaves."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is None:
                return
            try:
                os.close(descriptor)
                self._path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("status does not show how far this task is: %s cannot be written (%s)", self._path, error)
        self._warned = True
