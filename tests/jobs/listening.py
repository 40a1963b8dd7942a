"""The listener's service for tests of single job bodies: in a process of its own, or in a thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff
from jobs import serve
from tests.waiting import PATIENCE_S, wait_for

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
    folder, said = ws.service_dir("listener"), (ws.root / f"serve-{job_id}.out").read_text
    try:
        wait_for(lambda: f"job-{job_id}" in [one.replica for one in handoff.discover(folder)], said, of=process)
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
    wait_for(lambda: handoff.discover(ws.service_dir("listener")) or not thread.is_alive(), "the listener")
    assert thread.is_alive()
    yield thread
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it did not leave"
    assert not handoff.discover(ws.service_dir("listener"))
