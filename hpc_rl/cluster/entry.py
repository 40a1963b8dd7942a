"""The first process of every job: starts the job body in the stage's own environment and records how it ended.

`python -P -m hpc_rl.cluster.entry SPEC` is what an executor puts into an allocation. It translates ranks, opens the
log, passes signals on (Slurm's USR2 before the time limit or a preemption, SIGTERM, Ctrl-C) and requeues the job when
it was asked to leave early. Standard library only: it starts in tens of milliseconds, under any interpreter, and has
nothing to crash on.

Without `-P`, `-m` looks for modules in the current directory first: that of the launch, where the code may change while
jobs wait. They import the snapshot that PYTHONPATH names.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from hpc_rl.cluster import ending, memory_killer, walltime
from hpc_rl.cluster.failures import EXIT_NEVER_FITS, EXIT_OUT_OF_TIME, Outcome, classify, last_error
from hpc_rl.cluster.rendezvous import rank_environment
from hpc_rl.run import atomic, manifest
from hpc_rl.run.closed import NotClosed, check_closed, keep_closed
from hpc_rl.run.workspace import Workspace

CODE = "HPC_RL_CODE"
"""Name of the snapshot of the code, in `code/`, that a job was submitted with."""

TAIL_BYTES = 20_000
RESTARTS_IN_PLACE = 3
MEMORY = "-memory"
"""In the name of an end record whose body ran out of memory, so that the next attempt finds it by listing a folder."""

STARTED = "HPC_RL_STARTED"
"""When the body's life began, seconds since the epoch, as its end record will say."""


class OtherCode(RuntimeError):
    """The job does not run the code that it was submitted with."""


@dataclass(frozen=True)
class Spec:
    """One submission, as its jobs find it on disk.

    Attributes
    ----------
    name
        Unique to the submission: its Slurm job name, and what the ledger calls it.
    body
        Command line of the job body.
    environment
        Variables that the body gets on top of the job's own.
    companion
        It runs beside another one, in whose job it is: it needs no early warning, since it is asked until that one
        ends, and Slurm then ends it (SIGTERM). That one asks for the requeue, which is the whole job's.
    service
        Start the body again in place when it dies; a service's consumers wait for it.
    grace_s
        How long the body may take to leave before it is killed.
    gpus
        GPUs per rank, for the account of GPU time.
    time_limit_s, warning_s
        The job's time limit, and how long before it the signal to leave may come; no limit outside of Slurm.
    """

    name: str
    workspace: str
    round: int
    stage: str
    shards: int
    executor: str
    body: tuple[str, ...]
    environment: dict[str, str]
    companion: bool = False
    service: bool = False
    grace_s: float = 30.0
    gpus: float = 0.0
    time_limit_s: float | None = None
    warning_s: float = 0.0

    @property
    def ws(self) -> Workspace:
        """The workspace of the run."""
        return Workspace(Path(self.workspace))

    @property
    def path(self) -> Path:
        """Where this spec lies."""
        return self.ws.attempts_dir(self.round, self.stage) / f"{self.name}.json"

    def save(self) -> Path:
        """Write it; returns its path."""
        atomic.write_json(self.path, asdict(self), closed=True)
        return self.path


@dataclass(frozen=True)
class EndRecord:
    """How one process of a submission ended.

    For reports: `cpu_s`, `gpu_s`, and `peak_memory_bytes`, of the largest process of the body and of those that it has
    started and waited for (getrusage(2), `ru_maxrss`); None where nobody could look.
    """

    name: str
    job_id: str
    restart: int
    rank: int
    host: str
    outcome: str
    exit_code: int
    error: str
    log: str
    started: float
    ended: float
    cpu_s: float
    gpu_s: float
    peak_memory_bytes: int | None = None

    @classmethod
    def read(cls, path: Path) -> EndRecord:
        """The record in `path`; CorruptFile when it is none."""
        try:
            return cls(**atomic.read_json(path))
        except TypeError as error:
            raise atomic.CorruptFile(f"{path} is no end record ({error})") from error


def load_spec(path: Path) -> Spec:
    """The spec in `path`.

    Raises
    ------
    ValueError
        When it is not that of a job of this workspace.
    """
    data: dict[str, Any] = atomic.read_json(path)
    spec = Spec(**{**data, "body": tuple(data["body"])})
    if spec.path != path.absolute():
        raise ValueError(f"{path} is a spec for {spec.path}, and is not run: launch the run in its workspace again")
    return spec


def die_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: the kernel kills the child as we die (prctl(2), PR_SET_PDEATHSIG): no body outlives its job."""
    parent = os.getpid()

    def bind() -> None:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return bind


class Runner:
    """Runs one body and hears the signals meant for it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.ranks = rank_environment(os.environ)
        self.process: subprocess.Popen[bytes] | None = None
        self.asked_to_leave = False
        self.requeue = False
        self.cpu_before_s = 0.0
        self.kills_before = 0
        self.log_before_bytes = 0
        job, restart, rank = self.ranks["HPC_RL_JOB_ID"], self.ranks["HPC_RL_RESTART"], self.ranks["RANK"]
        self.tag = f"{job}-{restart}" + (f"-rank{rank}" if self.ranks["WORLD_SIZE"] != "1" else "")
        self.log = spec.ws.log_dir(spec.round, spec.stage) / f"{self.tag}.out"

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Tell the body to leave. USR2 is Slurm's early warning, after which the job may be queued again."""
        self.requeue = self.requeue or number == signal.SIGUSR2
        self.asked_to_leave = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
        signal.setitimer(signal.ITIMER_REAL, self.spec.grace_s)

    def on_grace_over(self, _number: int, _frame: FrameType | None) -> None:
        """Kill a body that did not leave in time."""
        self._kill_group()

    def _kill_group(self) -> None:
        """Kill the body's session: what it has started (an engine's workers) must not keep a GPU after it."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def run(self) -> int:
        """Run the body to its end and record it; returns its exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN if self.spec.companion else self.on_signal)
        signal.signal(signal.SIGALRM, self.on_grace_over)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.spec.environment, **self.ranks, "HPC_RL_ATTEMPT": self.spec.name}
        if self.spec.time_limit_s is not None:
            leave = walltime.leave_at(os.environ, time.time(), self.spec.time_limit_s, self.spec.warning_s)
            environment[walltime.LEAVE_AT] = f"{leave:.0f}"
        left = RESTARTS_IN_PLACE if self.spec.service else 0
        while True:
            started, self.cpu_before_s = time.time(), _cpu_of_children_s()
            self.kills_before = memory_killer.kills()
            environment[STARTED] = repr(started)
            with self.log.open("ab") as log:
                self.log_before_bytes = log.tell()
                code = self._run_body(log, environment)
            self._kill_group()
            outcome = self.record(code, started)
            if self.asked_to_leave or outcome in (Outcome.DONE, Outcome.BLOCKED, Outcome.LEFT) or not left:
                return code
            left -= 1
            print(f"the service ended ({outcome.value}); starting it again, {left} restarts left", flush=True)

    def _run_body(self, log: BinaryIO, environment: dict[str, str]) -> int:
        """One life of the body; its exit code, 126 or 127 as in a shell when it may not be run, or is not there."""
        self.process = None  # the process group of an earlier life is none of ours any more
        try:
            _check_what_runs(self.spec)
        except (OtherCode, NotClosed, OSError) as error:  # OSError: a file server that is away, or knows nothing of it
            log.write(f"{type(error).__name__}: {error}\n".encode())
            return 126
        try:
            self.process = subprocess.Popen(
                self.spec.body,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            log.write(f"{type(error).__name__}: cannot start {self.spec.body[0]} on this node: {error}\n".encode())
            return 127
        if self.asked_to_leave:
            self.process.terminate()  # the signal came before there was a body
        return self.process.wait()

    def record(self, code: int, started: float) -> Outcome:
        """Write the end record of the body that has just ended."""
        with self.log.open("rb") as log:
            log.seek(max(self.log_before_bytes, self.log.stat().st_size - TAIL_BYTES))
            tail = log.read().decode(errors="replace")
        outcome = classify(code, tail, self.asked_to_leave)
        ended = time.time()
        error = "" if outcome is Outcome.DONE else last_error(tail)
        if outcome is Outcome.KILLED and memory_killer.kills() > self.kills_before:
            outcome, error = Outcome.OUT_OF_MEMORY, memory_killer.SAID
        spec = self.spec
        record = EndRecord(
            spec.name, self.ranks["HPC_RL_JOB_ID"], int(self.ranks["HPC_RL_RESTART"]), int(self.ranks["RANK"]),
            socket.gethostname(), outcome.value, code, error, spec.ws.relative(self.log), started, ended,
            _cpu_of_children_s() - self.cpu_before_s, (ended - started) * spec.gpus,
            1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        )  # fmt: skip
        ending = f"{int(started * 1000)}{MEMORY if outcome is Outcome.OUT_OF_MEMORY else ''}.json"
        atomic.write_json(spec.path.with_name(f"{spec.name}.end-{self.tag}-{ending}"), asdict(record))
        print(
            f"{spec.name} {self.tag}: {outcome.value}, exit code {code}, {ended - started:.1f} s. {error}", flush=True
        )
        return outcome


def _check_what_runs(spec: Spec) -> None:
    """Make sure that we are the code that the job was submitted with, and that nobody else may have changed it.

    Raises
    ------
    OtherCode
        When we are another one: what is made would be said to come from code that nobody ran.
    NotClosed
        When others may write to it, or to the spec, which says what is run.
    """
    ours, name = Path(__file__).resolve().parents[2], spec.environment.get(CODE)
    if name is None:
        check_closed(spec.ws.root, [spec.path])
        return
    snapshot = spec.ws.code_dir / name
    if ours != snapshot.resolve():
        raise OtherCode(
            f"this job runs the code in {ours}, and was submitted with that in {snapshot}. Something puts other "
            f"modules before those of PYTHONPATH: does {sys.executable}, or what it reads at its start (site)?"
        )
    check_closed(spec.ws.root, [spec.path, snapshot])


def _cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_spec(path: Path) -> int:
    """Run the submission described in `path` as the process that we are; returns the body's exit code."""
    keep_closed()
    spec = load_spec(path)
    runner = Runner(spec)
    code = runner.run()
    if runner.ranks["RANK"] == "0" and spec.executor == "slurm" and shutil.which("scontrol"):
        done = spec.shards > 0 and len(manifest.done_shards(spec.ws, spec.round, spec.stage)) >= spec.shards
        if done and "SLURM_ARRAY_JOB_ID" in os.environ:
            ending.cancel_waiting(spec.name)
        if (runner.requeue or code == EXIT_OUT_OF_TIME) and code != EXIT_NEVER_FITS and not done:
            ending.requeue(runner.ranks["HPC_RL_JOB_ID"])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -P -m hpc_rl.cluster.entry SPEC   (run by the executors; see docs/architecture.md)")
    sys.exit(run_spec(Path(sys.argv[1])))
