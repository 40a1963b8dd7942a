"""How long a run took: from its first submission to its last end, how long it stood still, how long jobs waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.reporting.data import Times
from hpc_rl.run.ledger import History, Ledger


def times(run: Run, history: History, ends: Mapping[StageId, Sequence[EndRecord]], status: str, now: float) -> Times:
    """The times of a run; `now` ends those of one that is under way. Seconds since the epoch."""
    all_ends = [end for of_stage in ends.values() for end in of_stage]
    begun = [attempt.time for attempt in history.attempts] + [end.started for end in all_ends]
    if not begun:
        return Times(None, None, 0.0, 0.0, 0.0)
    began = min(begun)
    ended = None if status == "running" else max([end.ended for end in all_ends] or [began])
    until = now if ended is None else ended
    return Times(began, ended, max(0.0, until - began), _stood_still_s(run, until), waited_s(run, history, all_ends))


def _stood_still_s(run: Run, until: float) -> float:
    """Seconds between each pause or stop and what went on after it, or `until`."""
    total, since = 0.0, None
    for line in Ledger(run.ws).lines():
        event = line.get("event") if line else None
        if event in ("paused", "stopped") and since is None:
            since = line["time"]  # type: ignore[index]
        elif event == "resumed" and since is not None:
            total, since = total + line["time"] - since, None  # type: ignore[index]
    return total + (max(0.0, until - since) if since is not None else 0.0)


def waited_s(run: Run, history: History, ends: Sequence[EndRecord]) -> float:
    """How long submissions waited for their first start once those were over that they had to wait for.

    What they waited for is known by their own end records: one without any counts as over from the beginning.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for end in ends:
        first[end.name] = min(first.get(end.name, end.started), end.started)
        last[end.name] = max(last.get(end.name, end.ended), end.ended)
    stages = {attempt.name: StageId(attempt.round, attempt.stage) for attempt in history.attempts}
    total = 0.0
    for attempt in history.attempts:
        stage = run.graph.by_id.get(stages[attempt.name])
        if attempt.name not in first or stage is None or not stage.has_work:
            continue
        free = attempt.time
        for name in attempt.depends_on:
            over = first if stages.get(name) in stage.uses else last  # of its services, whose start it waits for
            free = max(free, over.get(name, free))
        total += max(0.0, first[attempt.name] - free)
    return total
