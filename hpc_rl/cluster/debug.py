"""The debug executor: every job body is a function call in this very process, one after the other, with pdb at hand.

Services run in threads beside it. Arrays run as one task, services as one replica, multi-node stages as one rank; the
log says so.
"""

from __future__ import annotations

import importlib
import os
import pdb
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence

from hpc_rl.cluster.base import ExecutorError, JobRequest, Queued
from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.orchestrate.graph import Kind


class DebugExecutor:
    """Runs a job at the moment it is submitted. An error opens the debugger where there is a terminal, and raises."""

    name = "debug"

    def __init__(self) -> None:
        self._count = 0
        self._services: dict[str, threading.Thread] = {}

    def submit(self, request: JobRequest, on_accepted: Callable[[str], None]) -> None:
        """Run the body here and now; a service is started in a thread and left running."""
        for service in request.beside:
            self.submit(service, lambda _: None)
        self._count += 1
        job_id = f"debug{os.getpid()}.{self._count}"
        on_accepted(job_id)
        spec = request.spec
        ranks = request.resources.nodes * request.resources.ranks_per_node
        if ranks > 1:
            print(f"[debug] {spec.stage}: one rank here instead of {ranks}", flush=True)
        if request.resources.tasks > 1:
            what = "replica" if request.kind is Kind.SERVICE else "task"
            print(f"[debug] {spec.stage}: one {what} here instead of {request.resources.tasks}", flush=True)
        module, arguments = _body(spec.body)
        os.environ.update(
            {
                **spec.environment,
                "HPC_RL_JOB_ID": job_id,
                "HPC_RL_RESTART": "0",
                "HPC_RL_ATTEMPT": spec.name,
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
            }
        )
        main: Callable[[list[str]], int] = importlib.import_module(module).main
        if request.kind is Kind.SERVICE:
            self._services[spec.name] = threading.Thread(target=main, args=(arguments,), name=spec.name, daemon=True)
            self._services[spec.name].start()
            return
        print(f"[debug] {' '.join(spec.body)}", flush=True)
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except Exception:
            traceback.print_exc()
            if sys.stdin.isatty():
                pdb.post_mortem()
            raise
        if code:
            reason = "its inputs are not there" if code == EXIT_BLOCKED else "see its output above"
            raise ExecutorError(f"{spec.stage} of round {spec.round} ended with exit code {code}: {reason}")

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        """Services that still run; everything else has ended when `submit` returns."""
        wanted = set(names)
        return [
            Queued(name, name, "RUNNING")
            for name, thread in self._services.items()
            if name in wanted and thread.is_alive()
        ]

    def cancel(self, names: Iterable[str], waiting_only: bool = False) -> None:
        """Nothing ever waits here, and a service leaves when its consumers are done."""

    def render(self, request: JobRequest) -> list[str]:
        """See `Executor.render`."""
        return [" ".join(request.spec.body)]


def _body(command: Sequence[str]) -> tuple[str, list[str]]:
    """Module and arguments of `… -m MODULE ARGUMENTS`."""
    at = list(command).index("-m")
    return command[at + 1], list(command[at + 2 :])
