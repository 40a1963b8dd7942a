"""How a job body ended, in the few classes that decide what happens next."""

from __future__ import annotations

import re
import signal
from enum import StrEnum

EXIT_BLOCKED = 75
"""EX_TEMPFAIL (sysexits.h): inputs are not there, or a service was not reached in time; it is to be tried again."""


class Outcome(StrEnum):
    """Classes of ends. Only `ERROR` is the program's own fault and is not retried when it repeats itself."""

    DONE = "done"
    BLOCKED = "blocked"
    LEFT = "left"  # asked to: walltime, preemption, cancellation
    KILLED = "killed"  # by a signal nobody announced: the kernel's memory killer, an administrator
    GPU_MEMORY = "out of GPU memory"
    ERROR = "error"
    LOST = "lost"  # no record of an end: the node died, or the job never started


_GPU_MEMORY = re.compile(r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory")
_EXCEPTION = re.compile(
    r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Corrupt\w*|Unavailable|Output|Failure))\b"
)


def classify(exit_code: int, log_tail: str, asked_to_leave: bool) -> Outcome:
    """The class of an end from the body's exit code (minus the signal, as in `subprocess`) and its last output."""
    if exit_code == 0:
        return Outcome.DONE
    if asked_to_leave:
        return Outcome.LEFT
    if exit_code == EXIT_BLOCKED:
        return Outcome.BLOCKED
    if exit_code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGTERM):
        return Outcome.KILLED
    return Outcome.GPU_MEMORY if _GPU_MEMORY.search(log_tail) else Outcome.ERROR


def last_error(log_tail: str) -> str:
    """The line of a log that says what went wrong: the last exception, else the last line that is not empty."""
    lines = [line.rstrip() for line in log_tail.splitlines() if line.strip()]
    for line in reversed(lines):
        if _EXCEPTION.match(line):
            return line[:500]
    return lines[-1][:500] if lines else ""


def fingerprint(error: str) -> str:
    """What two occurrences of one error have in common: numbers and hexadecimal tokens are left out."""
    return re.sub(r"0x[0-9a-f]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b|\b[0-9a-f]{12,}\b|\d+", "#", error.lower())
