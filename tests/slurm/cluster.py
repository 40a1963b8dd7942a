"""A real Slurm cluster on one machine, for tests: several hosts, accounting, preemption, GPUs that are only names.

    python -m tests.slurm.cluster start              # bring one up and leave it running
    python -m tests.slurm.cluster shell              # a shell on its login host (or: shell node2)
    python -m tests.slurm.cluster exec squeue        # one command there
    python -m tests.slurm.cluster status | stop

Tests use the fixture `cluster` (conftest.py). Nothing of the machine's own /etc, /run or /dev changes: daemons, keys,
ports and state all belong to the cluster's folder, and its hosts are namespaces that end with their owner (init.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.bringup import Daemons, search_path, why_unavailable
from tests.slurm.hosts import Hosts, Process, wait_for
from tests.slurm.settings import CTL, Settings


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue. `id` is `7` or, for an array element, `7_2` (`7_[2-5]` while several wait together)."""

    id: str
    name: str
    state: str
    reason: str
    nodes: str
    partition: str


class SlurmCluster:
    """A cluster with the hosts `ctl` (controller and login host) and `node1`, `node2`, …

    Parameters
    ----------
    root
        A folder of its own, with a path of at most 80 characters (it holds Unix sockets). `stop` deletes it.
    nodes, gpus, cpus, mem_mb
        Number of nodes and what each pretends to have.
    settings
        All of it, instead of the numbers.
    """

    def __init__(
        self,
        root: Path,
        nodes: int = 4,
        gpus: int = 2,
        cpus: int = 4,
        mem_mb: int = 4000,
        settings: Settings | None = None,
    ) -> None:
        self.root = Path(root)
        self.settings = settings or Settings(nodes=nodes, gpus=gpus, cpus=cpus, mem_mb=mem_mb)
        self.hosts = Hosts(self.root, (CTL, *self.settings.node_names))
        self._daemons = Daemons(self.root, self.hosts, self.env())

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.settings.node_names

    # --- bring-up

    def start(self, *, detached: bool = False) -> float:
        """Start everything and wait until a step has run on every node.

        Parameters
        ----------
        detached
            Let the cluster outlive this process.

        Returns
        -------
        float
            Seconds it took.

        Raises
        ------
        RuntimeError
            When there is a reason not to, or with the last lines of each daemon's log. Nothing runs then.
        """
        began = time.monotonic()
        self._check()
        shutil.rmtree(self.root, ignore_errors=True)
        try:
            self._daemons.start(self.settings, detached=detached)
            wait_for(lambda: self._nodes_in("idle") == set(self.nodes), "all nodes to be idle")
            # "idle" is only what the controller believes; a step on every node shows that they answer
            everywhere = (f"--nodes={len(self.nodes)}", f"--ntasks={len(self.nodes)}")
            self.run(["srun", "--quiet", *everywhere, "--mem-per-cpu=1", "true"])
        except BaseException as error:
            logs = self._daemons.log_tails()
            self.stop()
            if isinstance(error, Exception):
                raise RuntimeError(f"the Slurm cluster did not start: {error}\n{logs}") from error
            raise
        return time.monotonic() - began

    def _check(self) -> None:
        reason = why_unavailable()
        if reason:
            raise RuntimeError(reason)
        if len(str(self.root)) > 80:
            raise RuntimeError(f"the cluster's folder has too long a path for Unix sockets: {self.root}")
        if self.hosts.up():
            raise RuntimeError(f"a cluster already runs in {self.root}: stop it first, or name another folder")
        if self.root.exists() and not (self.root / "etc" / "slurm.conf").exists() and any(self.root.iterdir()):
            raise RuntimeError(f"{self.root} holds something that is not a test cluster: name another folder")

    def stop(self) -> None:
        """End the cluster with everything that runs on it and delete its folder; safe to call twice."""
        self.hosts.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- commands on its hosts

    def env(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment as a login shell of the cluster would have it: no trace of another Slurm."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "PMI_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return clean | {"PATH": search_path(), "SLURM_CONF": f"{self.root}/etc/slurm.conf"} | dict(extra or {})

    def popen(
        self,
        argv: Sequence[str],
        host: str = CTL,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command on a host. It leads a process group: end it with `os.killpg(process.pid, signal)`."""
        command = self.hosts.command(host, argv, cwd)
        return subprocess.Popen(command, env=self.env(env), text=True, start_new_session=True, **options)

    def run(
        self,
        argv: Sequence[str],
        host: str = CTL,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 180,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host (`ctl` is the login host) and return its output.

        Raises
        ------
        RuntimeError
            When it fails (unless `check` is False), with both its outputs.
        TimeoutError
            When it takes longer than `timeout_s`; it and its children are killed then.
        """
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(argv, host, cwd=cwd, env=env, **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                raise TimeoutError(f"{shlex.join(argv)} took over {timeout_s:.0f} s on {host}\n{out}{err}") from None
        if check and process.returncode:
            raise RuntimeError(f"{shlex.join(argv)} on {host} ended with status {process.returncode}\n{out}{err}")
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    # --- jobs

    def sbatch(self, *argv: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Submit with `sbatch --parsable` and return the job id."""
        return self.run(["sbatch", "--parsable", *argv], cwd=cwd, env=env).stdout.strip()

    def queue(self, *options: str) -> list[QueuedJob]:
        """What squeue shows: jobs that wait, run or end; finished ones are not in it. `options` go to squeue."""
        out = self.run(["squeue", "--noheader", "--format=%i|%j|%T|%r|%N|%P", *options]).stdout
        return [QueuedJob(*line.split("|")) for line in out.splitlines()]

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job` (JobState, Restarts, NodeList, …); of an array, the first."""
        out = self.run(["scontrol", "--oneliner", "show", "job", job_id]).stdout.splitlines()[0]
        fields = (field.partition("=") for field in out.split() if "=" in field)
        return {name: value for name, _, value in fields}

    def state(self, job_id: str) -> str:
        """A job's state, such as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, NODE_FAIL, PREEMPTED."""
        return self.job(job_id)["JobState"]

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """Wait until a job is in one of `states` and return its fields.

        Raises
        ------
        TimeoutError
            With the job as Slurm shows it.
        """
        try:
            wait_for(lambda: self.state(job_id) in states, f"job {job_id} to be {' or '.join(states)}", timeout_s, 0.1)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.run(['scontrol', 'show', 'job', job_id]).stdout}") from None
        return self.job(job_id)

    def wait_for_empty_queue(self, timeout_s: float = 180) -> None:
        """Wait until no job waits or runs.

        Raises
        ------
        TimeoutError
            With the jobs that are left.
        """
        try:
            wait_for(lambda: not self.queue(), "the queue to be empty", timeout_s, 0.1)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.run(['squeue', '--long']).stdout}") from None

    def start_now(self, job_id: str) -> None:
        """Let a requeued job skip the wait that Slurm puts before its next start (BeginTime).

        The next second is soon enough. A job that was started again within the second in which its last start ended
        was seen to fail at once and without a log, probably as slurmd counts credentials only if they were made after
        it had revoked the last ones (slurm_cred.c, `slurm_cred_handle_reissue`).
        """
        left = f"slurmstepd: [{self.job(job_id)['JobId']}."
        wait_for(lambda: not any(self.processes(node, left) for node in self.nodes), f"what is left of job {job_id}")
        self.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now+1"])

    # --- nodes

    def processes(self, host: str, containing: str = "") -> list[Process]:
        """What runs on a host, with the pids that `os.kill` here understands; only command lines with `containing`."""
        return [process for process in self.hosts.processes(host) if containing in shlex.join(process.argv)]

    def kill_node(self, name: str, *, notice_now: bool = False) -> None:
        """The node dies: slurmd, its jobs and all their children are killed at once and none can say goodbye.

        Slurm notices about `node_timeout_s` + 8 s later and requeues the node's jobs; with `notice_now` it is told.
        """
        self.hosts.kill_processes(name)
        if notice_now:
            self.run(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed"])

    def start_node(self, name: str) -> None:
        """Boot a node that was killed, and wait until jobs can run on it."""
        self._daemons.start_node(name)
        # a node that was told to be DOWN waits for a person; one that is up already refuses to be resumed
        self.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], check=False)
        wait_for(lambda: name in self._nodes_in("idle,mixed,allocated"), f"{name} to come back")

    @contextmanager
    def node_killed(self, name: str, *, notice_now: bool = False) -> Iterator[None]:
        """The node is dead inside the `with` block and boots at its end."""
        self.kill_node(name, notice_now=notice_now)
        try:
            yield
        finally:
            self.start_node(name)

    def reset(self) -> None:
        """Back to an empty queue and all nodes up, whatever a test left behind."""
        for job in self.queue("--array"):
            self.run(["scancel", "--signal=KILL", "--full", job.id], check=False)
            self.run(["scancel", job.id], check=False)
        for node in self.nodes:
            if not self.processes(node, "slurmd"):
                self.start_node(node)
        self.wait_for_empty_queue()
        for node in self.nodes:  # without cgroups, Slurm loses sight of what a job puts into a session of its own
            for process in self.processes(node):
                if not process.argv[0].startswith("slurm"):
                    os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: self._nodes_in("idle") == set(self.nodes), "all nodes to be idle")

    def _nodes_in(self, states: str) -> set[str]:
        return set(self.run(["sinfo", "--noheader", "--Node", f"--states={states}", "--format=%N"]).stdout.split())


def main(argv: Sequence[str] | None = None) -> int:
    default_root = Path(tempfile.gettempdir()) / "hpc_rl-slurm-dev"
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.cluster", description="A Slurm cluster right here.")
    parser.add_argument("--root", type=Path, default=default_root, help="its folder (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="bring it up and leave it running")
    for name, default in (("nodes", 4), ("gpus", 2), ("cpus", 4), ("mem-mb", 4000)):
        start.add_argument(f"--{name}", type=int, default=default)
    commands.add_parser("stop", help="end it and delete its folder")
    commands.add_parser("status", help="its nodes and queue")
    shell = commands.add_parser("shell", help="a shell on one of its hosts")
    shell.add_argument("host", nargs="?", default=CTL)
    execute = commands.add_parser("exec", help="run one command on its login host")
    execute.add_argument("argv", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)

    if args.command == "start":
        cluster = SlurmCluster(args.root, args.nodes, args.gpus, args.cpus, args.mem_mb)
        print(f"{len(cluster.nodes)} nodes are up after {cluster.start(detached=True):.1f} s in {args.root}")
        return 0
    cluster = SlurmCluster(args.root)
    if args.command == "stop":
        cluster.stop()
        return 0
    if not cluster.hosts.up():
        print(f"no cluster runs in {args.root}; python -m tests.slurm.cluster start makes one", file=sys.stderr)
        return 1
    if args.command == "status":
        command = ["sh", "-c", "scontrol ping; sinfo --Node --long; squeue"]
    elif args.command == "shell":
        command = [os.environ.get("SHELL", "bash")]
    else:
        command = args.argv
    host = args.host if args.command == "shell" else CTL
    return subprocess.run(cluster.hosts.command(host, command), env=cluster.env()).returncode


if __name__ == "__main__":
    sys.exit(main())
