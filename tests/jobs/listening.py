"""The listener's service for tests of single job bodies: in a process of its own, or in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff
from jobs import serve
from tests.forked import Forked
from tests.waiting import PATIENCE_S, wait_for


def arguments(ws: Workspace, round: int = 1) -> list[str]:
    """The arguments of a job body."""
    return ["--workspace", str(ws.root), "--round", str(round)]


@contextmanager
def listener(ws: Workspace, job_id: str) -> Iterator[Forked]:
    """`jobs.serve` in a process of its own; in the context once it is published."""
    out = ws.root / f"serve-{job_id}.out"
    options = [*arguments(ws), "--stage", "grade.listener"]
    process = Forked("jobs.serve", options, out, {"HPC_RL_JOB_ID": job_id})
    folder, said = ws.service_dir("listener"), out.read_text
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
