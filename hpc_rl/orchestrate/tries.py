"""How often a stage is tried: whether its next attempt is to wait, when it is hopeless, and what goes on without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

from hpc_rl.cluster.entry import EndRecord
from hpc_rl.cluster.failures import Outcome, fingerprint
from hpc_rl.engines.memory import WAY_OUT, count_notches
from hpc_rl.orchestrate.graph import Kind, Stage
from hpc_rl.run.ledger import Attempt

if TYPE_CHECKING:
    from hpc_rl.orchestrate.decide import Policy, View

BLOCKED_PER_ATTEMPT = 3


def dispensable(view: View, stage: Stage) -> list[Stage]:
    """The stages to give up so that the run can go on without this one, in order; none where it cannot.

    A service is given up with those that it serves. The next round's training needs this round's as well, but goes on
    from the weights that there are: so only stages of one round go together.
    """
    lost = {served for served in stage.serves if not view.is_done(served)} if stage.serves else {stage.id}
    if not all(view.graph[id].optional for id in lost):
        return []
    for other in view.graph.of_round(stage.round):
        if other.optional and not view.is_done(other.id) and lost & {*other.needs}:
            lost.add(other.id)
    return [other for other in view.graph.of_round(stage.round) if other.id in lost]


def is_in_vain(view: View, stage: Stage) -> bool:
    """True for a stage whose work nobody needs any more: all that needed it was given up."""
    waiting = [other for other in view.graph.work if stage.id in other.needs]
    given_up = view.history.given_up.keys()
    return bool(waiting) and all((o.round, o.name) in given_up and view.is_done(o.id) for o in waiting)


def _counting(view: View, stage: Stage) -> list[Attempt]:
    """The attempts at a stage since a person last asked for another try."""
    since = view.history.resumed_at
    return [a for a in view.history.of(stage.round, stage.name) if not a.written_off and a.time >= since]


def is_to_wait(view: View, stage: Stage, queued: Container[str]) -> bool:
    """True when the last attempt at a stage failed in a way that time may mend; `queued` ones have not ended yet."""
    attempts = [a for a in _counting(view, stage) if a.job_ids and not a.cancelled and a.name not in queued]
    if not attempts or stage.kind is Kind.CONTROL:
        return False
    if stage.notches is not None and _any(view, attempts[-1], Outcome.OUT_OF_MEMORY):
        return False  # it takes less now
    if _only(view, attempts[-1], Outcome.DONE, Outcome.LEFT):
        return False
    # where its inputs were there, what it did not reach was a service
    return not _only(view, attempts[-1], Outcome.BLOCKED, Outcome.LEFT) or all(
        view.is_done(need) for need in stage.needs if view.graph[need].has_work
    )


def hopeless(
    view: View, unfinished: Sequence[Stage], policy: Policy, is_live: Callable[[Attempt], bool]
) -> tuple[Stage, str] | None:
    """A stage that is not to be tried again, and why: one program error twice, or too many attempts. None: go on."""
    services = [stage for stage in view.graph.stages if stage.kind is Kind.SERVICE and not view.is_done(stage.id)]
    companions = view.graph.companions
    for stage in (*unfinished, *services):
        attempts = _counting(view, stage)
        if not attempts or any(is_live(a) for a in attempts):
            continue
        ends = [end for attempt in attempts for end in view.ends.get(attempt.name, ())]
        errors = [end for end in ends if end.outcome == Outcome.ERROR.value]
        counts = _count_by_fingerprint(errors)
        repeated = next((end for end in reversed(errors) if counts[fingerprint(end.error)] > 1), None)
        if repeated:
            times = counts[fingerprint(repeated.error)]
            why = f"{stage.id} failed {times} times with the same error: {repeated.error} (log: {repeated.log})"
            return stage, why
        # who runs beside another one ends with it, maybe before it has begun: that is counted there
        tries = [a for a in attempts if not a.cancelled and (stage.id not in companions or a.name in view.ends)]
        if stage.kind is Kind.SERVICE:  # one that nobody asked for long has left by itself
            tries = [a for a in tries if not any(e.outcome == Outcome.DONE.value for e in view.ends.get(a.name, ()))]
        short = []
        if stage.notches is not None:
            short = [a for a in tries if _any(view, a, Outcome.OUT_OF_MEMORY)]
            times = count_notches(end for end in ends if end.outcome == Outcome.OUT_OF_MEMORY.value)
            lowered = max(times, view.notches.get(stage.id, 0)) if times else 0  # rounds before may have begun it
            # once more where nothing gets lower at all: others may have had the memory
            if lowered > max(1, stage.notches) or len(short) >= stage.notches + policy.max_attempts:
                return stage, _out_of_memory(stage, ends, times)
        # neither is the stage's fault: its inputs were not there, or it was told to leave (time limit, preemption)
        blocked = [a for a in tries if _only(view, a, Outcome.BLOCKED, Outcome.LEFT)]
        failed = len(tries) - len(blocked) - len(short)
        once = failed > 0 and not policy.auto_retry
        if once or failed >= policy.max_attempts or len(blocked) >= BLOCKED_PER_ATTEMPT * policy.max_attempts:
            last = max(ends, key=lambda end: end.ended, default=None)
            how = f"; the last one: {last.outcome}, {last.error} (log: {last.log})" if last else ""
            often = "failed, and run.auto_retry is off" if once else f"is not done after {len(tries)} attempts"
            return stage, f"{stage.id} {often}{how}"
    return None


def _count_by_fingerprint(errors: Sequence[EndRecord]) -> Counter[str]:
    """How often each error happened. Many ranks of one job that fail the same way are one failure."""
    of_ranks = Counter((fingerprint(e.error), e.name, e.job_id, e.restart, e.rank) for e in errors)
    of_jobs: dict[tuple[str, ...], int] = {}
    for (error, name, job_id, restart, _), count in of_ranks.items():
        job = (error, name, job_id, str(restart))
        of_jobs[job] = max(count, of_jobs.get(job, 0))
    counts: Counter[str] = Counter()
    for (error, *_), count in of_jobs.items():
        counts[error] += count
    return counts


def _out_of_memory(stage: Stage, ends: Sequence[EndRecord], times: int) -> str:
    last = max((e for e in ends if e.outcome == Outcome.OUT_OF_MEMORY.value), key=lambda end: end.ended)
    often = "once" if times == 1 else f"{times} times, the last time"
    return (
        f"{stage.id} ran out of memory {often} with settings that go no lower. "
        f"{stage.way_out or WAY_OUT}; the last one: {last.error} (log: {last.log})"
    )


def _any(view: View, attempt: Attempt, outcome: Outcome) -> bool:
    return any(end.outcome == outcome.value for end in view.ends.get(attempt.name, ()))


def _only(view: View, attempt: Attempt, *outcomes: Outcome) -> bool:
    ends, wanted = view.ends.get(attempt.name, ()), {outcome.value for outcome in outcomes}
    return bool(ends) and all(end.outcome in wanted for end in ends)
