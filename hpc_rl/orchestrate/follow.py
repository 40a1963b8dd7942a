"""Staying with a run until it ends: reconcile whenever something has ended, and say how it goes.

For the local executor this is what runs the jobs. On a cluster it stands in for the advance jobs where compute nodes may not
submit (`launch --watch`); it may be killed and started again at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from hpc_rl.cluster.base import Executor
from hpc_rl.cluster.local import LocalExecutor
from hpc_rl.orchestrate import overview
from hpc_rl.orchestrate.decide import Decision, Policy
from hpc_rl.orchestrate.overview import StageOverview
from hpc_rl.orchestrate.reconcile import Run, look, reconcile
from hpc_rl.run.ledger import Ledger

PROGRESS_EVERY_S = 10.0
LOCAL_POLL_S = 0.2


def follow(
    run: Run, executor: Executor, code: Path, policy: Policy, say: Callable[[str], None], poll_s: float
) -> Decision:
    """Reconcile until the run is finished, stopped or paused; returns the last decision.

    Parameters
    ----------
    poll_s
        Pause between two looks at the scheduler, in seconds (the local executor is looked at all the time).
    """
    local = executor if isinstance(executor, LocalExecutor) else None
    watch = _Watch(run, say)
    resume = True
    while True:
        report = reconcile(run, executor, code, policy, resume=resume)
        resume = False
        for note in report.notes:
            say(note)
        if report.decision.status != "running":
            watch.look(executor)
            if local:
                local.shutdown()
            return report.decision
        before = _alive(run, executor)
        while _alive(run, executor) == before:
            if local:
                local.poll()
                write_local_queue(run, local)
            watch.look(executor)
            if Ledger(run.ws).history().paused:
                break
            time.sleep(LOCAL_POLL_S if local else poll_s)


def _alive(run: Run, executor: Executor) -> set[str]:
    """Submissions that the scheduler still has."""
    return {job.name for job in executor.queue([a.name for a in Ledger(run.ws).history().attempts])}


def write_local_queue(run: Run, executor: LocalExecutor) -> None:
    """Let `status`, another process, see what the local executor has queued."""
    queue = [vars(job) for job in executor.queue([a.name for a in Ledger(run.ws).history().attempts])]
    path = run.ws.lease_folder / "local_queue.json"
    text = json.dumps(queue)
    if not path.exists() or path.read_text() != text:
        temporary = path.with_name(".tmp-local_queue.json")
        temporary.write_text(text)
        temporary.replace(path)


class _Watch:
    """Says when a stage begins and ends, and now and then how far those that run are."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.states: dict[tuple[int, str], str] = {}
        self.began: dict[tuple[int, str], float] = {}
        self.last = self.progress = 0.0
        self.first_look = True

    def look(self, executor: Executor) -> None:
        if time.monotonic() - self.last < 1.0:
            return
        self.last = time.monotonic()
        stages = [s for s in overview.build(look(self.run, executor)).stages if s.kind not in ("service", "control")]
        for stage in stages:
            key, state = (stage.round, stage.stage), stage.state
            before = self.states.get(key)
            self.states[key] = state
            if self.first_look or before == state:
                continue
            if state == "running":
                self.began.setdefault(key, time.monotonic())
                self.say(f"{_title(stage)} started")
            elif state == "done":
                took_s = time.monotonic() - self.began.get(key, time.monotonic())
                self.say(f"{_title(stage)} done in {took_s:.0f} s")
            elif state == "failed":
                self.say(f"{_title(stage)} {stage.last_error} (log: {stage.log})")
        self.first_look = False
        running = [s for s in stages if s.state == "running"]
        if running and time.monotonic() - self.progress > PROGRESS_EVERY_S:
            self.progress = time.monotonic()
            self.say(" · ".join(f"{_title(s)} {s.shards_done}/{s.shards}" for s in running))


def _title(stage: StageOverview) -> str:
    return f"round {stage.round} {stage.stage}"
