"""Staying with a run until it ends: reconcile whenever something has ended, and say how it goes.

For the local executor this is what runs the jobs. On a cluster it stands in for the advance jobs where compute nodes
may not submit (`launch --watch`); it may be killed and started again at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hpc_rl.cluster.base import Executor, ExecutorError
from hpc_rl.cluster.local import LocalExecutor
from hpc_rl.orchestrate import overview
from hpc_rl.orchestrate.decide import Decision, Policy
from hpc_rl.orchestrate.graph import Kind, StageId
from hpc_rl.orchestrate.overview import StageOverview
from hpc_rl.orchestrate.reconcile import Run, RunBusy, look, reconcile
from hpc_rl.run import manifest
from hpc_rl.run.ledger import Ledger

PROGRESS_EVERY_S = 10.0
LOOK_EVERY_S = 1.0
LOCAL_POLL_S = 0.2
AWAY_S = 30.0
BUSY_S, LOCAL_BUSY_S = 120.0, 1.0
"""How long one reconcile waits for another that is under way; where jobs run here they are looked at in between."""


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
    resume, told_busy = True, -BUSY_S
    while True:
        # nothing starts here while we wait for another reconcile, so that has to be short once jobs run here
        patience_s = LOCAL_BUSY_S if local and not resume else BUSY_S
        try:
            report = reconcile(run, executor, code, policy, resume=resume, patience_s=patience_s)
        except RunBusy as error:
            if resume:
                raise
            if time.monotonic() - told_busy >= BUSY_S:
                told_busy = time.monotonic()
                say(f"{error}; trying again")  # it has waited already, and jobs that run here must not die of it
            if local:
                local.poll()
                write_local_queue(run, local)
            continue
        except ExecutorError as error:
            if local or resume:
                raise
            say(
                f"{error}; trying again in {AWAY_S:.0f} s"
            )  # a controller may be away for longer than one question waits
            time.sleep(AWAY_S)
            continue
        resume = False
        for note in report.notes:
            say(note)
        if report.decision.status != "running":
            watch.look(executor, at_once=True)
            if local:
                local.shutdown()
                write_local_queue(run, local)
            return report.decision
        with suppress(ExecutorError):  # what the scheduler did not answer, the next reconcile asks again
            before = _alive(run, executor)
            while before and _alive(run, executor) == before:
                watch.look(executor)  # before anything starts: what is over by the next look has begun and ended
                if local:
                    local.poll()
                    write_local_queue(run, local)
                if Ledger(run.ws).history().paused:
                    break
                time.sleep(LOCAL_POLL_S if local else poll_s)


def _alive(run: Run, executor: Executor) -> set[str]:
    """Submissions with work that the scheduler still has: when one of them ends there may be something to do."""
    services = {stage.id for stage in run.graph.stages if stage.kind is Kind.SERVICE}
    attempts = [a for a in Ledger(run.ws).history().attempts if StageId(a.round, a.stage) not in services]
    return {job.name for job in executor.queue([a.name for a in attempts])}


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
        self.looked = self.progress = -PROGRESS_EVERY_S

    def look(self, executor: Executor, at_once: bool = False) -> None:
        """Say what changed since the last look; at most once a second unless `at_once`."""
        now = time.monotonic()
        if now - self.looked < LOOK_EVERY_S and not at_once:
            return
        self.looked = now
        stages = [s for s in overview.build(look(self.run, executor)).stages if s.kind not in ("service", "control")]
        before, self.states = self.states, {(s.round, s.stage): s.state for s in stages}
        for stage in stages if before else ():
            if before[stage.round, stage.stage] != stage.state:
                self._changed(stage)
        running = [s for s in stages if s.state == "running"]
        if running and now - self.progress > PROGRESS_EVERY_S:
            self.progress = now
            self.say(" · ".join(f"{_title(s)} {s.shards_done}/{s.shards}" for s in running))

    def _changed(self, stage: StageOverview) -> None:
        if stage.state == "running":
            self.say(f"{_title(stage)} started")
        elif stage.state == "done":
            made = [manifest.read(self.run.ws, stage.round, stage.stage, shard) for shard in range(stage.shards)]
            took_s = max(m.ended for m in made) - min(m.started for m in made)
            self.say(f"{_title(stage)} done in {took_s:.0f} s")
        elif stage.state == "given up":
            self.say(f"{_title(stage)} is {stage.last_error}")
        elif stage.state == "failed":
            self.say(f"{_title(stage)}: {stage.last_error} (log: {self.run.ws.root / stage.log})")


def _title(stage: StageOverview) -> str:
    return f"round {stage.round} {stage.stage}"
