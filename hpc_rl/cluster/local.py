"""The local executor: the same jobs as processes on this machine, with dependencies, services and a limit of tasks.

It lives in the launcher. Its jobs die with it (the kernel sees to that), and launching again redoes what they left
undone.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from hpc_rl.cluster.base import ExecutorError, JobRequest, Queued
from hpc_rl.cluster.entry import die_with_parent
from hpc_rl.cluster.queries import clean_environment
from hpc_rl.orchestrate.graph import Kind

KILLED_S = 5.0
"""How long to wait for the end of a process that was killed."""


@dataclass
class _Task:
    """One array element, or all ranks of a multi-node job (they start together)."""

    element: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    gpus: tuple[str, ...] = ()
    cancelled: bool = False

    @property
    def state(self) -> str:
        if self.cancelled and not self.processes:
            return "CANCELLED"
        if not self.processes:
            return "PENDING"
        return "RUNNING" if any(process.poll() is None for process in self.processes) else "COMPLETED"


@dataclass
class _Job:
    id: str
    request: JobRequest
    tasks: list[_Task]
    not_before: float
    """By `time.monotonic`."""

    @property
    def ended(self) -> bool:
        return all(task.state in ("COMPLETED", "CANCELLED") for task in self.tasks)

    @property
    def started(self) -> bool:
        return self.ended or any(task.processes for task in self.tasks)


class LocalExecutor:
    """Runs jobs here. Call `poll` regularly: it starts what may start.

    Parameters
    ----------
    max_parallel_tasks
        How many tasks may run at a time; services do not count, since tasks wait for them.
    gpu_ids
        GPUs to deal out to jobs that ask for them, as in CUDA_VISIBLE_DEVICES. Empty: every job sees what we see.
    """

    name = "local"

    def __init__(self, max_parallel_tasks: int, gpu_ids: Sequence[str] = ()) -> None:
        self._limit = max_parallel_tasks
        self._gpus = list(gpu_ids)
        self._jobs: dict[str, _Job] = {}
        self._numbers = itertools.count(1)

    def submit(self, request: JobRequest, on_accepted: Callable[[str], None]) -> None:
        """See `Executor.submit`.

        Raises
        ------
        ExecutorError
            When it asks for more GPUs than there are: it would wait for ever.
        """
        gpus = sum(part.resources.gpus_per_node * part.resources.nodes for part in (request, *request.beside))
        if self._gpus and gpus > len(self._gpus):
            stage = request.spec.stage
            raise ExecutorError(
                f"{stage} asks for {gpus} GPUs, this machine has {len(self._gpus)}. "
                f"Ask for fewer: --set stages.{stage}.gpus_per_node=N --set stages.{stage}.nodes=1"
            )
        job_id, not_before = f"local{os.getpid()}.{next(self._numbers)}", time.monotonic() + request.delay_s
        for number, service in enumerate(request.beside, 1):  # processes of one machine need no common job
            component = f"{job_id}+{number}"
            part = replace(service, after_end=request.after_end)
            self._jobs[component] = _Job(component, part, [_Task(component)], not_before)
        tasks = request.resources.tasks
        elements = [f"{job_id}_{n}" for n in range(tasks)] if tasks > 1 else [job_id]
        self._jobs[job_id] = _Job(job_id, request, [_Task(element) for element in elements], not_before)
        on_accepted(job_id)

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        """See `Executor.queue`."""
        wanted = set(names)
        return [
            Queued(job.request.spec.name, task.element, task.state, node=os.uname().nodename)
            for job in self._jobs.values()
            if job.request.spec.name in wanted
            for task in job.tasks
            if task.state in ("PENDING", "RUNNING")
        ]

    def cancel(self, names: Iterable[str], waiting_only: bool = False) -> None:
        """See `Executor.cancel`."""
        wanted = set(names)
        for job in self._jobs.values():
            if job.request.spec.name in wanted:
                for task in job.tasks:
                    if not task.processes:
                        task.cancelled = True
                    elif not waiting_only:
                        _signal(task, signal.SIGTERM)

    def render(self, request: JobRequest) -> list[str]:
        """The command line of each process, as a shell would take it."""
        ranks = request.resources.nodes * request.resources.ranks_per_node
        copies = request.resources.tasks * ranks
        return [f"{' '.join(_command(request))}   # × {copies}" if copies > 1 else " ".join(_command(request))]

    def poll(self) -> None:
        """Start every task whose job's dependencies have ended, as far as the limit and the GPUs allow."""
        running = sum(task.state == "RUNNING" for job in self._counted() for task in job.tasks)
        for job in self._jobs.values():
            if not self._may_start(job):
                continue
            for task in job.tasks:
                if task.state != "PENDING":
                    continue
                service = job.request.kind is Kind.SERVICE
                gpus = self._free_gpus(job)
                if (running >= self._limit and not service) or gpus is None:
                    break
                self._start(job, task, gpus)
                running += not service

    def shutdown(self, patience_s: float = 30.0) -> None:
        """Ask everything to leave, wait, then kill what stayed, and see it gone."""
        self.cancel({job.request.spec.name for job in self._jobs.values()})
        deadline = time.monotonic() + patience_s
        tasks = [task for job in self._jobs.values() for task in job.tasks]
        while any(task.state == "RUNNING" for task in tasks) and time.monotonic() < deadline:
            time.sleep(0.1)
        for task in tasks:
            _signal(task, signal.SIGKILL)
        for process in (process for task in tasks for process in task.processes):
            with suppress(subprocess.TimeoutExpired):  # a file server that is away keeps even the killed
                process.wait(KILLED_S)

    def _counted(self) -> list[_Job]:
        return [job for job in self._jobs.values() if job.request.kind is not Kind.SERVICE]

    def _may_start(self, job: _Job) -> bool:
        def known(ids: Iterable[str]) -> list[_Job]:  # jobs of an earlier launcher are gone: they count as ended
            return [self._jobs[i] for i in (id.partition("_")[0] for id in ids) if i in self._jobs]

        after_end, after_start = known(job.request.after_end), known(job.request.after_start)
        ready = all(j.ended for j in after_end) and all(j.started for j in after_start)
        return ready and time.monotonic() >= job.not_before

    def _free_gpus(self, job: _Job) -> tuple[str, ...] | None:
        """GPUs for one task of the job; () where none are dealt out, None when too few are free."""
        wanted = job.request.resources.gpus_per_node * job.request.resources.nodes
        if not self._gpus or not wanted:
            return ()
        taken = {gpu for j in self._jobs.values() for task in j.tasks if task.state == "RUNNING" for gpu in task.gpus}
        free = [gpu for gpu in self._gpus if gpu not in taken]
        return tuple(free[:wanted]) if len(free) >= wanted else None

    def _start(self, job: _Job, task: _Task, gpus: tuple[str, ...]) -> None:
        request = job.request
        ranks = request.resources.nodes * request.resources.ranks_per_node
        path = os.pathsep.join(filter(None, [str(request.code), os.environ.get("PYTHONPATH")]))
        task.gpus = gpus
        for rank in range(ranks):
            environment = {
                **clean_environment(), "PYTHONPATH": path, "HPC_RL_JOB_ID": task.element, "HPC_RL_RESTART": "0",
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks),
                "HPC_RL_NODELIST_HEAD": "localhost", **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            }  # fmt: skip
            task.processes.append(
                subprocess.Popen(
                    _command(request),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
            )


def _signal(task: _Task, number: signal.Signals) -> None:
    for process in task.processes:
        if process.poll() is None:
            process.send_signal(number)


def _command(request: JobRequest) -> list[str]:
    return [sys.executable, "-P", "-m", "hpc_rl.cluster.entry", str(request.spec.path)]
