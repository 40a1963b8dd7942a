"""Job bodies in processes of their own that need not import torch again: forks of a process that did so once.

They are started and killed as others are. What starts them is not their subject: that is tested by the executors.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HEAVY = (
    "hpc_rl.engines.transformers_engine", "hpc_rl.engines.yes_no", "hpc_rl.services.listener", "jobs.sample",
    "jobs.train", "hpc_rl.training.run", "hpc_rl.training.trl_parts", "deepspeed",
)  # fmt: skip
"""What takes long to import; never a process that has used it, whose threads a fork would miss."""

REPOSITORY = Path(__file__).parent.parent

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(list(HEAVY))


class Forked:
    """`python -m MODULE ARGUMENTS` in a fork, with as much of `subprocess.Popen` as tests of job bodies use.

    Parameters
    ----------
    module, arguments
        The body.
    log
        Where its output goes.
    environment
        What it has besides this process's variables.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        log.touch()
        self._process = _FORKS.Process(target=_run, args=(module, list(arguments), log, variables))
        self._process.start()
        atexit.register(self._process.kill)  # before multiprocessing, at its end, waits for it

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run(module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    with log.open("w") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    os.chdir(REPOSITORY)
    atexit._clear()  # what the parent does at its end is not ours
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a fork ends without
