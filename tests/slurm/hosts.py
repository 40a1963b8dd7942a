"""The hosts of a test cluster: namespaces on one machine, each with a name, an address and processes of its own.

All hosts share the machine's files and network (so a workspace is "shared storage", and 127.0.1.N reaches host N);
they differ in what software asks a host for: its name, its mounts, its /dev/shm, its processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A running process of a host; `pid` is the machine's number for it, not the cluster's own."""

    pid: int
    argv: tuple[str, ...]


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 180, interval_s: float = 0.05) -> None:
    """Poll `condition` until it is true.

    Raises
    ------
    TimeoutError
        Naming `what`, when it is still false after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"gave up after {timeout_s:.0f} s waiting for {what}")
        time.sleep(interval_s)


class Hosts:
    """Named hosts below one folder, all inside one PID namespace.

    Parameters
    ----------
    root
        The cluster's folder. `root/etc/hosts` must exist; `root/etc` becomes the hosts' /etc/slurm.
    names
        Host names; any process can reach any other by them, as `root/etc/hosts` says.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = tuple(names)
        self._init: subprocess.Popen[bytes] | None = None

    def start(self, *, detached: bool = False) -> None:
        """Make the hosts. Unless `detached`, they end with the calling process, however that ends."""
        (self.root / "hosts").mkdir(exist_ok=True)
        unshare = ["unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount", "--propagation", "private"]
        init = [sys.executable, "-I", str(Path(__file__).with_name("init.py")), str(self.root)]
        with (self.root / "log" / "hosts.log").open("ab") as log:
            self._init = subprocess.Popen(
                [*unshare, *init, "detached" if detached else "owned", *self.names],
                stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for the tests; the cluster leaves through stop()
            )
        ready = [self.root / "hosts" / name for name in ("init", *self.names)]
        wait_for(lambda: all(path.exists() for path in ready) or self._init_ended(), "the hosts to be made")
        if self._init_ended():
            raise RuntimeError(f"the hosts could not be made:\n{(self.root / 'log' / 'hosts.log').read_text()}")

    def _init_ended(self) -> bool:
        return self._init is not None and self._init.poll() is not None

    def up(self) -> bool:
        """Whether process 1 of these hosts lives (also when another process started them)."""
        try:
            pid = int((self.root / "hosts" / "init").read_text())
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return str(self.root) in argv  # else the number now belongs to somebody else

    def stop(self) -> None:
        """End every process of every host at once (SIGKILL, by the kernel); safe to call twice."""
        if self.up():
            os.kill(int((self.root / "hosts" / "init").read_text()), signal.SIGKILL)
        if self._init is not None:
            self._init.wait(timeout=180)
            if self._init.stdin:
                self._init.stdin.close()
            self._init = None
        wait_for(lambda: not self.up(), "the hosts to end")

    def pid(self, name: str) -> int:
        """The process that keeps a host's namespaces alive."""
        if name not in self.names:
            raise ValueError(f"unknown host {name!r}; there are: {', '.join(self.names)}")
        return int((self.root / "hosts" / name).read_text())

    def command(self, name: str, argv: Sequence[str], cwd: Path | None = None) -> list[str]:
        """`argv` as a command line that runs on host `name`, in folder `cwd` (default: the caller's)."""
        enter = ["nsenter", f"--target={self.pid(name)}", "--pid", "--uts", "--mount"]
        # `env --chdir`, not `nsenter --wd`: the latter opens the folder outside, and getcwd() then says "(unreachable)"
        return [*enter, "--", "env", f"--chdir={cwd or Path.cwd()}", *argv]

    def processes(self, name: str) -> list[Process]:
        """What runs on a host (zombies left out): known by its UTS namespace, which no process leaves by accident."""
        keeper = self.pid(name)
        home = Path(f"/proc/{keeper}/ns/uts").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == keeper:
                continue
            try:
                if (entry / "ns" / "uts").readlink() != home:
                    continue
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            except PermissionError:
                continue  # the machine's, with more capabilities than we have; what we started has none to spare
            if state not in "ZX":
                found.append(Process(int(entry.name), tuple(argv)))
        return found

    def kill_processes(self, name: str) -> None:
        """SIGKILL everything on a host, as when its power goes; the host itself can be used again."""

        def none_left() -> bool:
            left = self.processes(name)
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            return not left

        wait_for(none_left, f"the processes of {name} to end", interval_s=0.01)
