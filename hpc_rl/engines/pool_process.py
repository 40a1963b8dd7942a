"""One worker process as its pool sees it: started with GPUs, ports and a folder of its own, asked, ended."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.cluster.failures import last_error
from hpc_rl.engines.pool_channel import Channel, wait
from hpc_rl.engines.pool_queue import Item
from hpc_rl.run.code import source_root

PORTS = 64
"""Of one worker: vLLM scans upwards from VLLM_PORT for a free one."""
FIRST_PORT, LAST_PORT = 10_240, 32_767  # below the range from which Linux takes ports for outgoing connections
LONGEST_FOLDER = 60
"""Names of Unix sockets have 107 bytes (unix(7)); vLLM and torch put theirs into the folder of temporary files."""


@dataclass(frozen=True)
class Ended:
    """How a worker's life ended: its exit code, minus the signal if one killed it, and the last that it printed."""

    code: int
    tail: str

    def why(self) -> str:
        """In a line."""
        if self.code in (-signal.SIGKILL, -signal.SIGTERM):
            return f"killed by {signal.Signals(-self.code).name}"  # it had no time to say anything
        last = last_error(self.tail)
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}" + (f" ({last})" if last else "")
        return last or f"left with exit code {self.code}"


class WorkerProcess:
    """A running worker.

    Parameters
    ----------
    number
        Its place in the pool.
    opener, notches
        What opens its engine (pickled), and the argument.
    gpus
        Its own, as CUDA_VISIBLE_DEVICES names them.
    first_port
        Of the `PORTS` that are its own.
    threads
        Threads that torch may use in it, unless the task says otherwise (OMP_NUM_THREADS).
    patience_s
        How long it may be silent while it has requests.
    """

    def __init__(
        self,
        number: int,
        opener: bytes,
        notches: int,
        *,
        gpus: Sequence[str],
        first_port: int,
        threads: int,
        patience_s: float,
    ) -> None:
        self.first_port = first_port
        self.started = time.monotonic()
        self.folder = _temporary_folder(number)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "hpc_rl.engines.pool_guard"]
            self._guard = subprocess.Popen(
                [*command, str(number + 1), str(os.getpid()), str(theirs.fileno()), str(self.folder)],
                stdin=subprocess.PIPE,  # closed when we end, however that comes
                stdout=subprocess.PIPE,
                env=worker_environment(os.environ, number, gpus, first_port, threads, self.folder),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        self._report = self._guard.stdout
        os.set_blocking(self._report.fileno(), False)
        self._reported = b""
        self.channel = Channel(ours)
        self._prompts: set[int] = set()
        self.channel.send("open", sys.path, opener, notches, patience_s)

    @property
    def pid(self) -> int:
        """Of its guard, whose session it is in."""
        return self._guard.pid

    def sources(self) -> list[int]:
        """File descriptors that can be read when it has something to say, or has ended."""
        return [self._report.fileno(), *([] if self.channel.ended else [self.channel.fileno()])]

    def submit(self, items: Sequence[Item]) -> None:
        """Send requests of one prompt, and the prompt unless the worker has it."""
        by_prompt: dict[int, list[Item]] = {}
        for item in items:
            by_prompt.setdefault(item.group.number, []).append(item)
        for number, ours in by_prompt.items():
            if number not in self._prompts:
                self._prompts.add(number)
                self.channel.send("prompt", number, ours[0].request.prompt)
            self.channel.send("submit", number, [(item.id, item.request.seed, item.sampling) for item in ours])

    def forget(self, prompts: Iterable[int]) -> None:
        """Prompts that will not be asked any more."""
        if gone := self._prompts.intersection(prompts):
            self._prompts -= gone
            self.channel.send("forget", sorted(gone))

    def kill(self) -> None:
        """Have its guard kill it and all that it has started, at once."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()

    def ended(self) -> Ended | None:
        """How it ended, once nothing is left of it."""
        try:
            while data := os.read(self._report.fileno(), 1 << 16):
                self._reported += data
        except BlockingIOError:
            return None
        return self._bury()

    def _bury(self) -> Ended:
        code = self._guard.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._guard.pid, signal.SIGKILL)  # its session: left only if the guard itself was killed
        for end in (self._guard.stdin, self._guard.stdout, self.channel):
            assert end is not None
            end.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            report: dict[str, Any] = json.loads(self._reported)
        except ValueError:
            return Ended(code, "")
        return Ended(**report)

    def kill_with_guard(self) -> Ended:
        """For a guard that does not end: kill its session and bury it."""
        with suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        return self._bury()


def wait_for_end(processes: Iterable[WorkerProcess], timeout_s: float) -> list[WorkerProcess]:
    """Wait until nothing is left of these; those of which something is when the time is up."""
    deadline = time.monotonic() + timeout_s
    alive = list(processes)
    while True:
        for process in alive:
            process.channel.flush()
            process.channel.receive()
        alive = [process for process in alive if process.ended() is None]
        left_s = deadline - time.monotonic()
        if not alive or left_s <= 0:
            return alive
        wait([source for process in alive for source in process.sources()], [], min(left_s, 0.1))


def worker_environment(
    environ: Mapping[str, str], number: int, gpus: Sequence[str], first_port: int, threads: int, folder: Path
) -> dict[str, str]:
    """The environment of a worker, as torch and vLLM find it when they are imported."""
    path = [str(source_root()), *filter(None, [environ.get("PYTHONPATH")])]
    made = {
        "OMP_NUM_THREADS": str(threads),
        **environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HPC_RL_WORKER": str(number),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "TMPDIR": str(folder),
        "VLLM_PORT": str(first_port),
    }
    if len(str(folder)) > LONGEST_FOLDER:
        made["VLLM_RPC_BASE_PATH"] = "/tmp"
    return made


def state_of(pid: int) -> str:
    """What the kernel says of a process, `T (stopped)` for one; see proc_pid_status(5)."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("State:"))
    return "gone"


def _temporary_folder(number: int) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"hpc_rl-worker{number + 1}-"))


def free_ports(taken: Iterable[int], base: int | None, number: int) -> int:
    """The first of `PORTS` ports for a worker, apart from those of others.

    Parameters
    ----------
    taken
        First ports of the others' ranges.
    base
        The task's own VLLM_PORT: then worker `number` has the range of its number above it. None = anywhere.
    number
        The worker's place in the pool.
    """
    if base is not None:
        return base + number * PORTS
    others = set(taken)
    for _ in range(1000):
        first = FIRST_PORT + PORTS * secrets.randbelow((LAST_PORT - FIRST_PORT) // PORTS)
        if first not in others and _is_free(first):
            return first
    raise OSError(f"no port between {FIRST_PORT} and {LAST_PORT} is free on this node")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True
