"""Leaving when told to: SIGTERM ends a rank even where it hangs, and gives training the time to save first."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hpc_rl.cluster.failures import EXIT_NEVER_FITS

log = logging.getLogger(__name__)

EXIT_GRACE_S = 20.0
"""How long a rank may take to leave. Less than the entry process's grace (30 s), after which it is killed."""

EXIT_TERMINATED = 128 + signal.SIGTERM


class Leaving:
    """Hears SIGTERM for one rank.

    Outside of `deferred()` the rank leaves at once (SystemExit). Inside, `asked` is set and the training loop saves and
    leaves at its next step. Either way the process ends after `grace_s`: Python runs signal handlers between its own
    instructions, so a rank that waits inside a collective for a rank that is gone would never hear one. A second thread
    does, through the descriptor that the C-level handler writes to (signal.set_wakeup_fd).

    Attributes
    ----------
    asked
        SIGTERM came.
    grace_s
        Seconds from then to the end of the process.
    in_vain
        Asked when it leaves: why it would lead nowhere to run the job again, or ''.
    """

    def __init__(self, grace_s: float = EXIT_GRACE_S) -> None:
        self.asked = False
        self.grace_s = grace_s
        self.in_vain: Callable[[], str] = str
        self._deferred = False
        self._over = False
        self._timers: list[threading.Timer] = []

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts, SIGTERM only sets `asked`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def leave_if_asked(self) -> None:
        """Raise SystemExit when SIGTERM came."""
        if self.asked:
            raise SystemExit(self._code())

    def _code(self) -> int:
        if why := self.in_vain():
            log.error("NeverFits: %s", why)
            return EXIT_NEVER_FITS
        return EXIT_TERMINATED

    def __enter__(self) -> Leaving:
        self._hears = threading.current_thread() is threading.main_thread()
        if not self._hears:  # the debug executor's threads get no signals
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.signal(signal.SIGTERM, self._hear)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="leaving", daemon=True).start()
        return self

    def _hear(self, _number: int, _frame: object) -> None:
        self.asked = True
        if not self._deferred:
            self.leave_if_asked()

    def _watch(self) -> None:
        with suppress(OSError):
            while heard := self._reader.recv(1):
                if heard[0] == signal.SIGTERM:
                    self._timers.append(timer := _exit_later(self.grace_s, self._code))
                    if self._over:  # the block was left first, and nobody else would cancel it
                        timer.cancel()

    def __exit__(self, *_: object) -> None:
        if not self._hears:
            return
        signal.set_wakeup_fd(self._previous_fd)
        signal.signal(signal.SIGTERM, self._previous)
        self._over = True
        self._writer.close()
        self._reader.close()
        for timer in self._timers:
            timer.cancel()


@contextmanager
def exit_anyway_after(seconds: float) -> Iterator[None]:
    """End the process with code 1 when what is inside takes longer than `seconds`."""
    timer = _exit_later(seconds, lambda: 1)
    try:
        yield
    finally:
        timer.cancel()


def _exit_later(seconds: float, code: Callable[[], int]) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os._exit(code()))
    timer.daemon = True
    timer.start()
    return timer
