"""Waiting for what happens: until a condition holds, with a deadline against hanging and no other."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

Found = TypeVar("Found")

PATIENCE_S = 180.0
"""More than anything takes on a machine that is ten times slower; who waits so long waits in vain."""


class Process(Protocol):
    """A `subprocess.Popen`, or what can be asked as one."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...


def wait_for(
    condition: Callable[[], Found],
    what: str | Callable[[], str],
    *,
    within_s: float = PATIENCE_S,
    of: Process | None = None,
    pause_s: float = 0.01,
) -> Found:
    """What `condition` returns, as soon as that is true.

    Parameters
    ----------
    condition
        Asked again and again.
    what
        What is waited for, for the message; called when it did not happen, where that is yet to be found out.
    within_s
        Long enough for any machine. Seconds.
    of
        The process from which it is expected: once that has ended it will not happen any more.
    pause_s
        Between two looks. Seconds.
    """
    deadline = time.monotonic() + within_s
    while True:
        ended = of is not None and of.poll() is not None  # before the last look: it may have done so just before
        late = time.monotonic() > deadline
        if found := condition():
            return found
        if ended or late:
            waited = f"the process ended with {of.returncode}" if of and ended else f"{within_s:g} s have passed"
            raise AssertionError(f"{waited}, and not: {what if isinstance(what, str) else what()}")
        time.sleep(pause_s)


def is_alive(pid: int) -> bool:
    """False when there is no such process any more, or only its zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
