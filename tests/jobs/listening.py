"""The listener's service for tests of single job bodies: in a process of its own, or in a thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff
from jobs import serve

REPOSITORY = Path(__file__).resolve().parents[2]


def arguments(ws: Workspace, round: int = 1) -> list[str]:
    """The arguments of a job body."""
    return ["--workspace", str(ws.root), "--round", str(round)]


@contextmanager
def listener(ws: Workspace, job_id: str) -> Iterator[Any]:
    """`jobs.serve` in a process of its own; in the context once it is published."""
    environment = {**os.environ, "HPC_RL_JOB_ID": job_id, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "jobs.serve", *arguments(ws), "--stage", "grade.listener"]
    with (ws.root / f"serve-{job_id}.out").open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    deadline = time.monotonic() + 90
    try:
        while f"job-{job_id}" not in [record.replica for record in handoff.discover(ws.service_dir("listener"))]:
            assert process.poll() is None and time.monotonic() < deadline, (ws.root / f"serve-{job_id}.out").read_text()
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def listener_thread(ws: Workspace, stage: str = "grade.listener", round: int = 1) -> Iterator[threading.Thread]:
    """`jobs.serve` in a thread, as the debug executor runs it; it leaves when its consumers are done."""
    thread = threading.Thread(target=serve.main, args=([*arguments(ws, round), "--stage", stage],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not handoff.discover(ws.service_dir("listener")):
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    yield thread
    thread.join(30)
    assert not thread.is_alive(), "it did not leave"
    assert not handoff.discover(ws.service_dir("listener"))
