"""The small process around each worker of a pool: nothing of a worker outlives the pool, whoever is killed.

`python -m hpc_rl.engines.pool_guard NUMBER POOL_PID SOCKET FOLDER`, run by the pool. It starts the worker, passes its
output on line by line with the worker's number before it, and when the worker has ended or the pool is gone kills what
the worker has left (processes of an engine on several GPUs), removes the worker's folder of temporary files, and tells
the pool how it ended. It has a session of its own: signals for the task (walltime, Ctrl-C) go to the pool only, which
decides what becomes of its workers. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from hpc_rl.cluster.entry import die_with_parent

TAIL_BYTES = 20_000
LONGEST_LINE_BYTES = 1 << 20
LOOK_S = 0.2
"""How often it looks whether the pool is still there."""
LEFTOVERS_S = 2.0
"""For what the worker has started to end by itself: trackers of shared memory remove what is left of it."""
KILLED_S = 10.0
"""For the kernel to end killed processes. One that waits for a broken GPU may never end."""

_PR_SET_CHILD_SUBREAPER = 36


class Output:
    """What a worker prints, passed on line by line; the last of it is kept."""

    def __init__(self, source: int, prefix: bytes) -> None:
        self._source, self._prefix = source, prefix
        self._line = b""
        self.tail = b""
        os.set_blocking(source, False)

    def pump(self) -> bool:
        """Pass on what there is; False at its end."""
        try:
            data = os.read(self._source, 1 << 16)
        except BlockingIOError:
            return True
        self.tail = (self.tail + data)[-TAIL_BYTES:]
        *lines, self._line = (self._line + data)[-LONGEST_LINE_BYTES:].split(b"\n")
        if not data and self._line:
            lines, self._line = [self._line], b""
        if lines:
            with suppress(OSError):  # nobody reads the task's log any more
                shown = [self._prefix + line.rpartition(b"\r")[2] + b"\n" for line in lines]  # of a bar its last state
                sys.stderr.buffer.write(b"".join(shown))
                sys.stderr.buffer.flush()
        return bool(data)


def watch(worker: subprocess.Popen[bytes], output: Output, pool_pid: int) -> None:
    """Pass output on until the worker has ended, the pool has closed our standard input, or it is gone."""
    assert worker.stdout is not None
    sources = [0, worker.stdout.fileno()]
    while worker.poll() is None and os.getppid() == pool_pid:
        ready, _, _ = select.select(sources, [], [], LOOK_S)
        if 0 in ready:
            return  # nothing is ever written to it
        if ready and not output.pump():
            sources = [0]


def end(worker: subprocess.Popen[bytes], output: Output, since: float) -> int:
    """Kill the worker if it is alive, then all that it has left; its exit code, minus the signal if one killed it.

    Parameters
    ----------
    since
        When it was started, in seconds since the epoch.
    """
    shared = _shared_memory(_descendants(), since)
    started = time.monotonic()
    if worker.poll() is None:
        worker.kill()
    try:
        code = worker.wait(KILLED_S)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL  # it will be, if it ever comes back
    while _reap():
        waited_s = time.monotonic() - started
        if waited_s > LEFTOVERS_S:
            for pid in _descendants():
                if waited_s > 2 * LEFTOVERS_S or not _is_tracker(pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        if waited_s > KILLED_S:
            break
        output.pump()
        time.sleep(0.02)
    while output.pump():
        pass
    for path in shared:
        path.unlink(missing_ok=True)
    return code


def _reap() -> bool:
    """Bury what has died of the worker's descendants; whether others are left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _descendants() -> list[int]:
    """Processes that come from us: our children, theirs, and so on."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(after_name[1])
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _is_tracker(pid: int) -> bool:
    """Whether this is Python's process that removes the shared memory of others once they have ended."""
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _shared_memory(pids: list[int], since: float) -> set[Path]:
    """Named shared memory (shm_overview(7)) of these processes: whoever made it may not live to remove it."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}
    ours = set()
    for path in found:
        with suppress(FileNotFoundError):  # or it is removed already
            status = path.stat()
            if status.st_uid == os.getuid() and status.st_ctime >= since:  # older: that of others
                ours.add(path)
    return ours


def main(argv: list[str]) -> int:
    """Run one worker to its end."""
    number, pool_pid, sock, folder = int(argv[0]), int(argv[1]), int(argv[2]), Path(argv[3])
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, lambda *_: None)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the worker become our children
    since = time.time() - 1.0  # the clock of files ticks more coarsely
    worker = subprocess.Popen(
        [sys.executable, "-P", "-u", "-m", "hpc_rl.engines.pool_worker", str(sock)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(sock,),
        preexec_fn=die_with_parent(),
    )
    os.close(sock)  # the pool sees the worker's end at once
    assert worker.stdout is not None
    output = Output(worker.stdout.fileno(), b"worker %d: " % number)
    watch(worker, output, pool_pid)
    code = end(worker, output, since)
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(BrokenPipeError):
        print(json.dumps({"code": code, "tail": output.tail.decode(errors="replace")}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
