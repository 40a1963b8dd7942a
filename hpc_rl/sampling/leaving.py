"""SIGTERM or USR2 while sampling: it cuts a step of the engine or a pause short, and nothing else.

So no completion is lost between two hands, and no shard is published twice. USR2 is Slurm's early warning; the entry
process makes SIGTERM of it, but srun sends it to each process of a step that was started without one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Leaving:
    """Hears the signals while it is entered; then `check` raises SystemExit(143), and so does a signal in `at_once`."""

    def __init__(self) -> None:
        self._asked = self._at_once = False

    def check(self) -> None:
        """Raise SystemExit when one of them came."""
        if self._asked:
            raise SystemExit(128 + signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is inside may be cut short anywhere."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if self._at_once:
            self._at_once = False  # once: what follows is the way out
            self.check()

    def __enter__(self) -> Leaving:
        self._hears = threading.current_thread() is threading.main_thread()
        if self._hears:  # the debug executor's threads get no signals
            self._before = [signal.signal(number, self._hear) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        if self._hears:
            for number, before in zip(SIGNALS, self._before, strict=True):
                signal.signal(number, before)
