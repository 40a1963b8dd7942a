"""The Slurm executor: submitit's parameters, script and sbatch call around our own light entry command.

submitit pickles the function that a job shall run and moves the pickle into place after sbatch has returned; a launcher
killed in between leaves a job that waits for its pickle and fails. Our jobs need no pickle: they are told a spec file
that was on disk before sbatch. So we subclass submitit's executor at `_submit_command`, its own way to submit a
command. (Names with an underscore: submitit's version is pinned, and the golden scripts in tests/cluster/ notice any
change.)
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import ceil

import submitit
from submitit.core.utils import FailedJobError

from hpc_rl.cluster import queries
from hpc_rl.cluster.base import ExecutorError, JobRequest, Queued
from hpc_rl.orchestrate.graph import Kind

SUBMIT_PATIENCE_S = 120.0
_SETUP = "\n\n# setup\n"
"""What stands between the options and the commands of submitit's scripts."""


class _CommandExecutor(submitit.SlurmExecutor):  # type: ignore[misc]  # its types are not looked at
    """submitit's Slurm executor for plain commands: no pickles, an array is `elements` copies of one command."""

    beside: tuple[tuple[_CommandExecutor, str], ...] = ()
    """What runs in the same job: executors with the parameters of further components, and their commands."""

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        own = str(super()._make_submission_file_text(command, uid))
        return hetjob_script(own, [other.script(text, None) for other, text in self.beside]) if self.beside else own

    def submit_command(self, command: str, elements: int | None) -> str:
        """One sbatch; returns the job id."""
        if elements is not None:
            self.parameters["map_count"] = elements
        self.folder.mkdir(parents=True, exist_ok=True)
        return str(self._submit_command(command).job_id)

    def script(self, command: str, elements: int | None) -> str:
        """The script that `submit_command` would submit."""
        if elements is not None:
            self.parameters["map_count"] = elements
        return str(self._make_submission_file_text(command, ""))

    @classmethod
    def affinity(cls) -> int:
        """Scripts can be rendered anywhere (`--dry-run` on a laptop); a missing sbatch is said when it is needed."""
        return 2


def hetjob_script(leader: str, others: Sequence[str]) -> str:
    """The scripts of several jobs joined into that of one heterogeneous job, a component each (sbatch(1), hetjob).

    What the leader sets and another one does not, that one inherits from sbatch; hosts that are not wanted are the
    leader's own matter and are undone (memory cannot be: `ServicesConfig.placement_faults`).

    The others' commands run in the background. The job ends when the leader's command ends, and with its exit code;
    Slurm then tells the others to leave (SIGTERM) and kills who stays longer than KillWait.
    """
    header, _, body = leader.partition(_SETUP)
    beside = ""
    for other in others:
        options, _, commands = other.partition(_SETUP)
        lines = [line for line in options.splitlines() if line.startswith("#SBATCH")]
        if "#SBATCH --exclude" in header and "#SBATCH --exclude" not in options:
            lines.append("#SBATCH --exclude=")
        header += "\n".join(["", "#SBATCH hetjob", *lines])
        beside += f"\n\n# beside it\n(\n{commands.strip()}\n) &"
    return f"{header}{beside}{_SETUP}{body}"


@contextmanager
def _scrubbed_environment() -> Iterator[None]:
    """Run sbatch without the SLURM_* of the job that we may be in ourselves."""
    saved = dict(os.environ)
    os.environ.clear()
    os.environ.update(queries.clean_environment(saved))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


class SlurmExecutor:
    """Submits to the cluster that sbatch finds.

    Parameters
    ----------
    array_limit
        Largest number of elements of one array; None asks Slurm for its MaxArraySize when it is first needed.
    """

    name = "slurm"

    def __init__(self, array_limit: int | None = None) -> None:
        self._array_limit = array_limit

    @cached_property
    def array_limit(self) -> int:
        """Elements that fit into one array."""
        return self._array_limit if self._array_limit is not None else queries.max_array_size() - 1

    def submit(self, request: JobRequest, on_accepted: Callable[[str], None]) -> None:
        """One sbatch for a stage, or one per `array_limit` elements; each accepted id is reported at once."""
        accepted: set[str] = set()
        for elements in self._chunks(request):
            job_id = self._sbatch(request, elements, accepted)
            accepted.add(job_id)
            on_accepted(job_id)

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        """See `Executor.queue`."""
        return queries.queued_jobs(list(names))

    def cancel(self, names: Iterable[str], waiting_only: bool = False) -> None:
        """scancel by job name: names are unique to a submission, so nothing else can be hit."""
        for name in names:
            queries.ask(["scancel", "--quiet", f"--name={name}", *(["--state=PENDING"] if waiting_only else [])])

    def render(self, request: JobRequest) -> list[str]:
        """See `Executor.render`."""
        return [
            self._executor(request).script(_command(request), elements) for elements in self._chunks(request, ask=False)
        ]

    def _chunks(self, request: JobRequest, ask: bool = True) -> list[int | None]:
        tasks = request.resources.tasks
        if tasks == 1:
            return [None]
        limit = self.array_limit if ask or self._array_limit is not None else 1000
        return [min(limit, tasks - first) for first in range(0, tasks, limit)]

    def _sbatch(self, request: JobRequest, elements: int | None, known: set[str]) -> str:
        """sbatch with patience. A call without an answer may have been accepted: its name tells, before another."""
        executor, command = self._executor(request), _command(request)
        pause_s, deadline = 1.0, time.monotonic() + SUBMIT_PATIENCE_S
        while True:
            try:
                with _scrubbed_environment():
                    return executor.submit_command(command, elements)
            except FileNotFoundError as error:
                raise ExecutorError(
                    "sbatch is not on the PATH: run on a login node, or choose --executor local"
                ) from error
            except FailedJobError as error:
                message = str(error)
                if not queries.is_transient(message) and "Job violates accounting/QOS policy" not in message:
                    raise ExecutorError(f"sbatch refused {request.spec.name}: {message.strip()}") from error
                if time.monotonic() + pause_s > deadline:
                    raise ExecutorError(
                        f"sbatch did not accept {request.spec.name} within {SUBMIT_PATIENCE_S:.0f} s: {message.strip()}"
                    ) from error
            time.sleep(pause_s)  # before the look: a controller that is busy may accept late
            pause_s = min(2 * pause_s, 20.0)
            accepted = {job.job_id.split("_")[0] for job in self.queue([request.spec.name])} - known
            if accepted:
                return accepted.pop()

    def _executor(self, request: JobRequest, component: int = 0) -> _CommandExecutor:
        wanted, spec = request.resources, request.spec
        executor = _CommandExecutor(folder=spec.ws.log_dir(spec.round, spec.stage))
        after = [f"afterany:{':'.join(request.after_end)}"] if request.after_end else []
        after += [f"after:{':'.join(request.after_start)}"] if request.after_start else []
        optional = {
            "partition": wanted.partition,
            "account": wanted.account,
            "qos": wanted.qos,
            "constraint": wanted.constraint,
            "mem": None if wanted.mem_gb is None else f"{round(wanted.mem_gb * 1024)}MB",
            "gpus_per_node": wanted.gpus_per_node or None,
            "dependency": ",".join(after) or None,
        }
        kill = ["--kill-on-bad-exit=1", "--wait=0"] if request.kind is Kind.MULTINODE else []
        group = [f"--het-group={component}"] if request.beside or component else []
        executor.beside = tuple((self._executor(r, n), _command(r)) for n, r in enumerate(request.beside, 1))
        executor.update_parameters(
            job_name=spec.name,
            nodes=wanted.nodes,
            ntasks_per_node=wanted.ranks_per_node,
            cpus_per_task=wanted.cpus_per_task,
            time=wanted.time_min,
            signal_delay_s=wanted.signal_delay_s,
            comment=f"hpc_rl {spec.round} {spec.stage}",
            wckey=None,
            stderr_to_stdout=True,
            setup=[
                *wanted.setup,
                "umask go-w",  # as the launcher does: Python writes what it compiles beside the code
                f"export PYTHONPATH={shlex.quote(str(request.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            ],
            additional_parameters={
                "requeue": True,
                **({"begin": f"now+{ceil(request.delay_s)}"} if request.delay_s else {}),
                **{key.replace("_", "-"): value for key, value in wanted.sbatch.items()},
            },
            # srun does not inherit --cpus-per-task since 22.05 (srun(1)); sites set --wait, which kills uneven ranks
            srun_args=[*group, f"--cpus-per-task={wanted.cpus_per_task}", *kill],
            **{name: value for name, value in optional.items() if value is not None},
        )
        return executor


def _command(request: JobRequest) -> str:
    return shlex.join([sys.executable, "-P", "-m", "hpc_rl.cluster.entry", str(request.spec.path)])
