"""SIGTERM while sampling: it cuts a step of the engine or a pause short, and nothing else.

So no completion is lost between two hands, and no shard is published twice.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Leaving:
    """Hears SIGTERM while it is entered; then `check` raises SystemExit(143), and so does the signal in `at_once`."""

    def __init__(self) -> None:
        self._asked = self._at_once = False

    def check(self) -> None:
        """Raise SystemExit when SIGTERM came."""
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
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hears:
            signal.signal(signal.SIGTERM, self._before)
