"""A run on the test cluster, as a test drives it: launch, wait, kill, and look at what is on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc_rl.run import manifest
from hpc_rl.run.ledger import Attempt, Ledger
from hpc_rl.run.workspace import Workspace
from tests.slurm.cluster import SlurmCluster
from tests.slurm.hosts import Process, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]

_SBATCH = """#!/bin/sh
# sbatch, except that where the test asked for it, it kills its caller: before the job is submitted or right after
if mv {folder}/kill-before {folder}/used-before 2>/dev/null; then kill -9 $PPID; exit 1; fi
out=$({sbatch} "$@"); code=$?
if mv {folder}/kill-after {folder}/used-after 2>/dev/null; then kill -9 $PPID; exit 1; fi
printf '%s\\n' "$out"; exit $code
"""


class ClusterRun:
    """One run, from the login host of `cluster`, with its workspace in `folder`."""

    def __init__(self, cluster: SlurmCluster, folder: Path, config: str, settings: Sequence[str] = ()) -> None:
        self.cluster, self.folder, self.config = cluster, folder, config
        self.settings = list(settings)
        self.ws = Workspace(folder / "workspace")
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        real = subprocess.run(
            ["which", "sbatch"], env=cluster.env(), capture_output=True, text=True, check=True
        ).stdout.strip()
        (self.bin / "sbatch").write_text(_SBATCH.format(folder=folder, sbatch=real))
        (self.bin / "sbatch").chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        """What a login shell of this test has on top of the cluster's."""
        return {
            "PATH": f"{self.bin}:{self.cluster.env()['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
        }

    def kill_at_next_sbatch(self, when: str) -> Callable[[], bool]:
        """Have the next caller of sbatch killed, `before` or `after` the job is submitted; says whether it happened."""
        (self.folder / f"kill-{when}").touch()
        return lambda: (self.folder / f"used-{when}").exists()

    def command(self, module: str, *arguments: str) -> list[str]:
        """`python -m module arguments`."""
        return [sys.executable, "-m", module, *arguments]

    def launch_command(self, *options: str) -> list[str]:
        """The launch of this run."""
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return self.command("hpc_rl.launch", self.config, "--workspace", str(self.ws.root), *settings, *options)

    def launch(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Launch, as a user on the login host does."""
        return self.cluster.run(self.launch_command(*options), cwd=REPOSITORY, env=self.env, check=check, timeout_s=600)

    def tool(self, module: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One of the other commands, on this run's workspace."""
        return self.cluster.run(
            self.command(module, str(self.ws.root), *options), cwd=REPOSITORY, env=self.env, check=check
        )

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        return json.loads(self.tool("hpc_rl.status", "--json").stdout)

    def wait_until_finished(self, timeout_s: float = 600, enough: Callable[[], bool] = lambda: False) -> None:
        """Wait for the run's end, or for as much of it as is `enough`.

        Requeued jobs are released from the pause that Slurm puts before their next start.

        A run that is over, well or not, soon has nothing queued: `status`, a process of half a second, is asked then,
        and seldom before.

        Raises
        ------
        AssertionError
            When it stops, falls idle, or does not end in time; with `status` as a user would see it.
        """
        deadline = time.monotonic() + timeout_s
        asked = time.monotonic()
        while not enough():
            queue = self.cluster.queue()
            for job in queue:
                if job.state == "PENDING" and job.reason == "BeginTime":
                    self.cluster.start_now(job.id)
            now = time.monotonic()
            if not queue or now > asked + 10:
                asked = now
                state = self.status()
                if state["status"] == "finished":
                    return
                assert now < deadline and state["status"] == "running", self.tool(
                    "hpc_rl.status"
                ).stdout + self.logs_of_errors(state)
            time.sleep(0.5)

    def logs_of_errors(self, state: dict[str, Any]) -> str:
        """The ends of the logs that `status` names as failed."""
        logs = [stage["log"] for round in state["rounds"] for stage in round["stages"] if stage["log"]]
        return "".join(f"\n--- {log}\n{(self.ws.root / log).read_text(errors='replace')[-3000:]}" for log in logs[-4:])

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = 300) -> Any:
        """Wait until `condition()` is true; returns its value."""
        found: list[Any] = []

        def check() -> bool:
            found[:] = [condition()]
            return bool(found[0])

        wait_for(check, what, timeout_s, 0.02)
        return found[0]

    def attempts(self, round: int, stage: str) -> tuple[Attempt, ...]:
        """What the ledger says was submitted for a stage."""
        return Ledger(self.ws).history().of(round, stage)

    def submissions(self) -> Counter[tuple[int, str]]:
        """Number of jobs submitted per (round, stage)."""
        return Counter((a.round, a.stage) for a in Ledger(self.ws).history().attempts if a.job_ids)

    def manifests(self, round: int, stage: str) -> list[manifest.StoredManifest]:
        """The manifests of a stage, by shard."""
        return [
            manifest.read(self.ws, round, stage, shard) for shard in sorted(manifest.done_shards(self.ws, round, stage))
        ]

    def bodies(self, stage_module: str) -> list[tuple[str, Process]]:
        """Processes of a job body of this run, with their hosts."""
        return [
            (host, process)
            for host in self.cluster.nodes
            for process in self.cluster.processes(host, str(self.ws.root))
            if stage_module in process.argv
        ]

    def kill_body(self, stage_module: str, when: Callable[[], Any] = lambda: True, timeout_s: float = 300) -> str:
        """`kill -9` the first process of a job body as soon as `when()`; returns its host."""
        self.wait_for(when, f"the moment to kill {stage_module}", timeout_s)
        host, process = self.wait_for(lambda: self.bodies(stage_module), f"{stage_module} to run", timeout_s)[0]
        os.kill(process.pid, signal.SIGKILL)
        return host
