"""How far a task is with the shards in its hands: one small file for the task, which `status` shows.

That it cannot be written is no reason to lose the shards: a warning says so, once.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

log = logging.getLogger("hpc_rl")

EVERY_S = 5.0
"""Least pause between two writes."""


class ProgressNote:
    """The file, written now and then and removed at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._warned = path, -float("inf"), False

    def write(self, done: int, total: int) -> None:
        """So many of `total` are done. Cheap to call often."""
        if time.monotonic() - self._written < EVERY_S:
            return
        self._written = time.monotonic()
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        try:
            self._path.parent.mkdir(exist_ok=True)
            temporary.write_text(f'{{"done": {done}, "total": {total}}}\n')
            temporary.replace(self._path)
        except OSError as error:
            self._warn(error)

    def remove(self) -> None:
        """The task leaves."""
        if self._written > -float("inf"):
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("status does not show how far this task is: %s cannot be written (%s)", self._path, error)
        self._warned = True
