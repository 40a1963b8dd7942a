"""What an executor is: something that takes job requests, says what is queued, and cancels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpc_rl.cluster.entry import Spec
from hpc_rl.orchestrate.graph import Kind


@dataclass(frozen=True)
class Resources:
    """What one job of a stage asks for; `tasks` is the number of array elements. None leaves a choice to the site."""

    nodes: int = 1
    ranks_per_node: int = 1
    tasks: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gb: float | None = None
    time_min: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_delay_s: int = 120
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class JobRequest:
    """One submission.

    Attributes
    ----------
    spec
        What the job runs; `spec.name` is the job's name, unique to the submission.
    after_end, after_start
        Ids of jobs that must have ended (however) or started before this one starts: afterany and after, sbatch(1).
        Of an array that is to have started its first element, `18_0`: `after:18` would wait for all of them.
    code
        Folder of the code snapshot that the job imports.
    beside
        Services that run in the same job; it ends when `spec` ends.
    delay_s
        How long from now it must not start. The debug executor, which tries nothing again, starts it at once.
    """

    spec: Spec
    kind: Kind
    resources: Resources
    code: Path
    after_end: tuple[str, ...] = ()
    after_start: tuple[str, ...] = ()
    beside: tuple[JobRequest, ...] = ()
    delay_s: float = 0.0


@dataclass(frozen=True)
class Queued:
    """A job or array elements that the scheduler still has.

    `state` is Slurm's word for it (squeue(1), JOB STATE CODES); `tasks` is the number of elements this line stands for.
    """

    name: str
    job_id: str
    state: str
    reason: str = ""
    node: str = ""
    tasks: int = 1

    @property
    def is_waiting(self) -> bool:
        """True while it has not started (a requeued job waits again)."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")


class ExecutorError(RuntimeError):
    """The scheduler refused or could not be reached; the message holds its words and the way out."""


class QueueReader(Protocol):
    """Something that knows what is queued."""

    name: str

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        """What the scheduler still has under these submission names, in one question."""


class Executor(QueueReader, Protocol):
    """Where jobs run."""

    def submit(self, request: JobRequest, on_accepted: Callable[[str], None]) -> None:
        """Hand a request to the scheduler; `on_accepted` is called with each job id as soon as there is one.

        What runs beside has the same id.
        """

    def cancel(self, names: Iterable[str], waiting_only: bool = False) -> None:
        """Cancel all jobs of these submissions."""

    def render(self, request: JobRequest) -> list[str]:
        """The exact scripts that `submit` would hand over."""
