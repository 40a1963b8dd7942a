"""How a job body ended, in the few classes that decide what happens next."""

from __future__ import annotations

import re
import signal
from enum import StrEnum

EXIT_BLOCKED = 75
"""EX_TEMPFAIL (sysexits.h): inputs are not there, or a service was not reached in time; it is to be tried again."""
EXIT_OUT_OF_TIME = 124
"""Like timeout(1): what is left does not fit before the job's time limit, so it left by itself; to be run again."""
EXIT_NEVER_FITS = 76
"""The job's whole time was too short for one piece of its work: queued again, it would be for ever."""


class Outcome(StrEnum):
    """Classes of ends. Only `ERROR` is the program's own fault and is not retried when it repeats itself."""

    DONE = "done"
    BLOCKED = "blocked"
    LEFT = "left"  # asked to: walltime, preemption, cancellation
    KILLED = "killed"  # by a signal nobody announced: another process, an administrator
    OUT_OF_MEMORY = "out of memory"  # it said so, or the kernel's memory killer ended it (`memory_killer`)
    ERROR = "error"
    LOST = "lost"  # no record of an end: the node died, or the job never started


_OUT_OF_MEMORY = re.compile(
    r"(?:CUDA|HIP) out of memory|OutOfMemoryError\b|(?:CUDA|HIP|CUDA driver) error: out of memory"
    r"|BLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|Cuda failure 2 'out of memory'"  # cuBLAS, hipBLAS; NCCL
    r"|is less than desired (?:GPU|CPU) memory utilization"  # vllm/v1/worker/utils.py and cpu_worker.py
    r"|on kv cache allocation is less than requested memory for kv"  # vllm/v1/worker/cpu_worker.py
    r"|DefaultCPUAllocator: can't allocate memory|std::bad_alloc|\[Errno 12\] Cannot allocate memory"
    r"|^(?:numpy\.[\w.]+\._Array)?MemoryError\b",
    re.MULTILINE,
)
_NO_ROOM_FOR_CACHE = re.compile(  # vllm/v1/core/kv_cache_utils.py
    r"No available memory for the cache blocks|is needed, which is larger than the available KV cache memory"
)
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_WENT_ON = re.compile(r"Exception ignored in|\d{4}-\d\d-\d\d [\d:,]+ (?:DEBUG|INFO|WARNING) ")
"""A line, and what a traceback begins with, after which a program goes on."""
_SOURCE_LINE = re.compile(r'  File "| {4}')
_CAUSE_IS_ABOVE = re.compile(  # vllm/v1/engine/{utils,exceptions}.py, vllm/v1/executor/multiproc_executor.py
    r"See root cause above|[Ss]ee (?:the )?stack trace|check the stack trace above"
)
_WORKER = re.compile(r"worker \d+: ")
"""What a pool's worker prints has it before each line (`hpc_rl.engines.pool_guard`)."""
_ENGINE_PROCESS = re.compile(r"\([^()]+ pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[\w./]+:\d+\] )?")
"""What vLLM's processes print has it."""
_RANK = re.compile(r"^\[rank\d+\]: ")  # torch puts it before each line of a traceback once processes are joined
_EXCEPTION = re.compile(
    r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Corrupt\w*|Unavailable|Output|Failure))\b"
    r"|^(?:[a-z_]\w*\.)+[A-Z]\w*(?=:|$)"  # whatever a class of a package is called, its module stands before it
)


def classify(exit_code: int, log_tail: str, asked_to_leave: bool) -> Outcome:
    """The class of an end from the body's exit code (minus the signal, as in `subprocess`) and its last output."""
    if exit_code == 0:
        return Outcome.DONE
    if exit_code == EXIT_NEVER_FITS:  # told to leave or not
        return Outcome.ERROR
    by_itself = 0 < exit_code < 128 and exit_code not in (EXIT_BLOCKED, EXIT_OUT_OF_TIME)
    if by_itself and is_out_of_memory(log_tail):
        return Outcome.OUT_OF_MEMORY  # told to leave or not: a rank that it lost may have ended first, so srun told it
    if asked_to_leave or exit_code == EXIT_OUT_OF_TIME:
        return Outcome.LEFT
    if exit_code == EXIT_BLOCKED:
        return Outcome.BLOCKED
    if exit_code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGTERM):
        return Outcome.KILLED
    return Outcome.OUT_OF_MEMORY if is_out_of_memory(log_tail) else Outcome.ERROR


def is_out_of_memory(text: str) -> bool:
    """True when an error's text, or the end of a log, says that memory ran out where taking less of it helps.

    Of a log only the error that it ends with counts: a pool's worker that ran out of memory long ago has been replaced.
    An error that refers to what another process has printed (vLLM's, for an engine on several GPUs) is looked up there.
    """
    lines = [_RANK.sub("", line.rstrip()) for line in text.splitlines()]
    own = [line for line in lines if not _WORKER.match(line)]
    said = "\n".join(_last_report(own))
    if not _CAUSE_IS_ABOVE.search(said):
        return bool(_OUT_OF_MEMORY.search(said)) and not has_no_room_for_cache(said)
    printed = lines if "PoolFailed" in said else own
    printed = [_ENGINE_PROCESS.sub("", _WORKER.sub("", line, count=1), count=1) for line in printed]
    causes = [line for line in printed if not _SOURCE_LINE.match(line)]
    words = [line for line in causes if _OUT_OF_MEMORY.search(line) or has_no_room_for_cache(line)]
    return bool(words) and not has_no_room_for_cache(words[-1])


def _last_report(lines: list[str]) -> list[str]:
    """The exception that a program ended with, and those that led to it, to the end of its log; else all but chatter.

    Lines of source code are left out: they may name any error.
    """
    starts = [at for at, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    fatal = [at for at in starts if not (at and _WENT_ON.match(lines[at - 1]))]
    if not fatal:
        return [line for line in lines if not _WENT_ON.match(line)]
    first = fatal[-1]
    for start in reversed(fatal[:-1]):
        before = next((line for line in reversed(lines[:first]) if line), "")
        if before not in _CHAINED:
            break
        first = start
    return [line for line in lines[first:] if not _SOURCE_LINE.match(line) and not _WENT_ON.match(line)]


def has_no_room_for_cache(text: str) -> bool:
    """True when vLLM was given too little memory: beside the weights the KV cache has no room. Less does not help."""
    return bool(_NO_ROOM_FOR_CACHE.search(text))


def last_error(log_tail: str) -> str:
    """The line of a log that says what went wrong: the last exception, else the last line that is not empty."""
    lines = [_RANK.sub("", line.rstrip()) for line in log_tail.splitlines() if line.strip()]
    for line in reversed(lines):
        if _EXCEPTION.match(line):
            return line[:500]
    return lines[-1][:500] if lines else ""


def fingerprint(error: str) -> str:
    """What two occurrences of one error have in common: numbers and hexadecimal tokens are left out."""
    return re.sub(r"0x[0-9a-f]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b|\b[0-9a-f]{12,}\b|\d+", "#", error.lower())
