"""How a run stands, round by round and stage by stage: what `status` shows and the state file holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc_rl.cluster.base import Queued
from hpc_rl.cluster.failures import Outcome
from hpc_rl.orchestrate.decide import View
from hpc_rl.orchestrate.graph import Kind, Stage
from hpc_rl.run.ledger import Attempt

QUIET = frozenset({Outcome.BLOCKED.value, Outcome.LEFT.value})
"""Ends that are nobody's failure: inputs were not there yet, or the job was told to leave."""


@dataclass(frozen=True)
class StageOverview:
    """One stage.

    `state` is done, running, waiting (in the queue), failed (its last attempt went wrong), incomplete (nothing is
    queued for it), not yet (nothing was submitted) or given up (it was left undone, and the run goes on). `shards_*`
    count work, `tasks_*` jobs or array elements in the queue.
    """

    round: int
    stage: str
    kind: str
    state: str
    shards_done: int
    shards: int
    tasks_running: int
    tasks_waiting: int
    attempts: int
    job_ids: tuple[str, ...]
    nodes: tuple[str, ...]
    reason: str
    last_error: str
    log: str


@dataclass(frozen=True)
class Overview:
    """The whole run. `status` is finished, running, paused, stopped or idle (unfinished and nothing queued)."""

    status: str
    reason: str
    rounds: int
    stages: tuple[StageOverview, ...]


def build(view: View) -> Overview:
    """The overview of what a view shows."""
    stages = tuple(_stage(view, stage) for stage in view.graph.stages)
    history = view.history
    if all(view.is_done(stage.id) for stage in view.graph.work):
        status, reason = "finished", ""
    elif history.stopped:
        status, reason = "stopped", history.stopped
    elif history.paused:
        status, reason = "paused", history.paused
    else:
        status, reason = ("running", "") if view.queue else ("idle", "nothing of it is queued; launch again to go on")
    return Overview(status, reason, view.graph.rounds, stages)


def to_plain(overview: Overview) -> dict[str, Any]:
    """The overview as JSON holds it: rounds, each with its stages."""
    rounds: dict[int, list[dict[str, Any]]] = {}
    for stage in overview.stages:
        plain = asdict(stage)
        rounds.setdefault(plain.pop("round"), []).append(plain)
    return {
        "status": overview.status,
        "reason": overview.reason,
        "last_round": overview.rounds,
        "rounds": [{"round": number, "stages": stages} for number, stages in rounds.items()],
    }


def _stage(view: View, stage: Stage) -> StageOverview:
    attempts = view.history.of(stage.round, stage.name)
    names = {attempt.name for attempt in attempts}
    jobs = [job for job in view.queue if job.name in names]
    counts: Counter[str] = Counter()
    for job in jobs:
        counts["waiting" if job.is_waiting else "running"] += job.tasks
    ends = [end for attempt in attempts for end in view.ends.get(attempt.name, ()) if end.outcome != Outcome.DONE.value]
    last = max(ends, key=lambda end: end.ended, default=None)
    done = view.is_done(stage.id) if stage.kind is not Kind.CONTROL else bool(attempts) and not jobs
    lost = "" if done else _lost(view, stage, attempts, jobs)
    given_up = view.history.given_up.get((stage.round, stage.name), "") if done else ""
    if done and not counts["running"]:
        state = "given up" if given_up else "done"
    elif counts["running"]:
        state = "running"
    elif counts["waiting"]:
        state = "waiting"
    elif not attempts:
        state = "not yet"
    else:
        state = "failed" if lost or (last and last.outcome not in QUIET) else "incomplete"
    return StageOverview(
        round=stage.round,
        stage=stage.name,
        kind=stage.kind.value,
        state=state,
        shards_done=view.done.get(stage.id, 0),
        shards=stage.shards,
        tasks_running=counts["running"],
        tasks_waiting=counts["waiting"],
        attempts=len(attempts),
        job_ids=tuple(i for attempt in attempts for i in attempt.job_ids or ()),
        nodes=tuple(sorted({job.node for job in jobs if job.node})),
        reason=next((job.reason for job in jobs if job.reason not in ("", "None")), ""),
        last_error=(f"given up: {given_up}" if given_up else lost) or (f"{last.outcome}: {last.error}" if last else ""),
        log=last.log if last else "",
    )


def _lost(view: View, stage: Stage, attempts: Sequence[Attempt], jobs: Sequence[Queued]) -> str:
    """What to say of a last attempt that ended without a word: its node died, or it could not even start."""
    if not attempts or jobs or attempts[-1].name in view.ends or attempts[-1].cancelled or not attempts[-1].job_ids:
        return ""
    of_its_job = (a.name for a in view.history.attempts if a.job_ids == attempts[-1].job_ids)
    if stage.id in view.graph.companions and any(name in view.ends for name in of_its_job):
        return ""  # its leader ended the job: Slurm kills a companion that has not left by then
    job_id = attempts[-1].job_ids[-1]
    hint = f" (a node failure? `sacct -j {job_id}` may tell)" if attempts[-1].executor == "slurm" else ""
    return f"{Outcome.LOST.value}: job {job_id} left no end record{hint}"
