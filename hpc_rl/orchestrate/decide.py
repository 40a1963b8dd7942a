"""What to do next, as a pure function: graph − what is done − what is queued or running → submit the rest.

`decide` looks at a `View` (manifests, ledger, queue, end records) and returns actions. It can be asked again at any
time, by anyone: on a view that its own actions have led to, it asks for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from hpc_rl.cluster.base import Queued
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.cluster.failures import Outcome, fingerprint
from hpc_rl.engines.memory import WAY_OUT, count_notches
from hpc_rl.orchestrate.graph import Graph, Kind, Stage, StageId
from hpc_rl.run.ledger import Attempt, History

BLOCKED_PER_ATTEMPT = 3


@dataclass(frozen=True)
class View:
    """Everything that the decision rests on.

    Attributes
    ----------
    done
        Number of shards of each stage that have a manifest.
    queue
        What the scheduler still has of this run.
    ends
        End records by submission name.
    notches
        After how many notches an engine of a stage would open now (`hpc_rl.engines.memory`), of stages that have run
        out of memory in their round.
    """

    graph: Graph
    done: Mapping[StageId, int]
    history: History
    queue: Sequence[Queued]
    ends: Mapping[str, Sequence[EndRecord]]
    notches: Mapping[StageId, int] = field(default_factory=dict)

    def is_done(self, id: StageId) -> bool:
        """A stage with work is done when all its shards are; a service when all whom it serves are."""
        stage = self.graph[id]
        if stage.kind is Kind.SERVICE:
            return all(self.is_done(served) for served in stage.serves)
        return stage.has_work and self.done.get(id, 0) >= stage.shards


@dataclass(frozen=True)
class Policy:
    """How far ahead to queue, and how often to try."""

    lookahead: int = 1
    max_attempts: int = 5
    control: bool = True  # advance by jobs; False where the launcher itself stays and advances


@dataclass(frozen=True)
class Submit:
    """Submit an attempt at a stage, after other submissions (by name, or by the stage submitted along with it).

    `beside`: attempts at the services that run in the same job.
    """

    stage: Stage
    number: int
    after_end: tuple[str | StageId, ...] = ()
    after_start: tuple[str | StageId, ...] = ()
    beside: tuple[Submit, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """Cancel a submission (`waiting_only`: what of it has not started)."""

    name: str
    why: str
    waiting_only: bool = False


@dataclass(frozen=True)
class WriteOff:
    """An intent that no job came of."""

    name: str


@dataclass(frozen=True)
class Decision:
    """What to do, in order, and how the run stands: `running`, `finished` or `stopped` (then `reason` says why)."""

    actions: tuple[Submit | Cancel | WriteOff, ...] = ()
    status: str = "running"
    reason: str = ""


@dataclass
class _Planner:
    view: View
    policy: Policy
    me: str
    actions: list[Submit | Cancel | WriteOff] = field(default_factory=list)
    current: dict[StageId, str | StageId] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.states: dict[str, Counter[str]] = {}
        for job in self.view.queue:
            self.states.setdefault(job.name, Counter())["waiting" if job.is_waiting else "running"] += 1

    def is_live(self, attempt: Attempt) -> bool:
        return attempt.name in self.states and attempt.name != self.me and attempt.name not in self.replaced

    def attempts_at(self, stage: Stage) -> list[Attempt]:
        """All attempts at a stage, then those at the services beside it: of one job its leader's is cancelled first."""
        return [a for id in (stage.id, *stage.beside) for a in self.view.history.of(id.round, id.name)]

    def cancel_waiting(self, attempts: Iterable[Attempt], why: str) -> None:
        """Cancel what of these attempts is still waiting."""
        waiting = [a for a in attempts if self.is_live(a) and self.states[a.name]["waiting"]]
        stay = self.states.keys() - {a.name for a in waiting}
        self.actions += [Cancel(a.name, why, waiting_only=True) for a in waiting if not self._held_by_leader(a, stay)]

    def _held_by_leader(self, attempt: Attempt, stay: Set[str]) -> bool:
        """True for a companion whose leader stays: while it waits Slurm refuses to cancel it alone."""
        return StageId(attempt.round, attempt.stage) in self.view.graph.companions and any(
            other.name in stay and other.job_ids == attempt.job_ids for other in self.view.history.attempts
        )

    def place(self, stage: Stage) -> None:
        """Keep, replace or submit the stage's job; remember what those that follow must wait for."""
        after_end = tuple(self.current[need] for need in stage.needs if need in self.current)
        after_start = tuple(self.current[used] for used in stage.uses if used in self.current)
        live = [attempt for attempt in self.attempts_at(stage) if self.is_live(attempt)]
        if own := [attempt for attempt in live if attempt.stage == stage.name]:
            attempt = next((a for a in own if self.states[a.name]["running"]), own[-1])
            # a second one is there when an sbatch was accepted so late that it had been written off
            self.cancel_waiting((a for a in own if a is not attempt), "another attempt at it is there")
            wanted = {*after_end, *after_start}
            if self.states[attempt.name]["running"] or wanted <= set(attempt.depends_on):
                self.current[stage.id] = attempt.name
                return
            self.replaced.add(attempt.name)
        beside = tuple(
            Submit(service, self._next(service)) for service in map(self.view.graph.__getitem__, stage.beside)
        )
        self.actions.append(Submit(stage, self._next(stage), after_end, after_start, beside))
        self.current[stage.id] = stage.id
        # cancelled last: whoever is killed in between leaves one advance too many rather than none
        self.actions += [Cancel(a.name, "what it waits for was submitted again") for a in live]

    def _next(self, stage: Stage) -> int:
        return 1 + max((a.number for a in self.view.history.of(stage.round, stage.name)), default=0)


def decide(view: View, policy: Policy, me: str = "") -> Decision:
    """What to do now.

    Parameters
    ----------
    me
        Name of the submission that the caller itself runs in, which is about to end.
    """
    plan = _Planner(view, policy, me)
    for attempt in view.history.attempts:
        if attempt.job_ids is None and not attempt.written_off and attempt.name not in plan.states:
            plan.actions.append(WriteOff(attempt.name))
    if view.history.paused:
        return Decision(tuple(plan.actions), "paused", view.history.paused)

    unfinished = [stage for stage in view.graph.work if not view.is_done(stage.id)]
    if not unfinished:
        plan.cancel_waiting(view.history.attempts, "the run is finished")
        return Decision(tuple(plan.actions), "finished")
    reason = view.history.stopped or _hopeless(view, plan, unfinished, policy)
    if reason:
        plan.cancel_waiting(view.history.attempts, "the run stopped")
        # services that run would hold their GPUs for consumers that never come
        services = {s.id for s in view.graph.stages if s.kind is Kind.SERVICE} - view.graph.companions
        plan.actions += [
            Cancel(a.name, "the run stopped")
            for a in view.history.attempts
            if StageId(a.round, a.stage) in services and plan.states.get(a.name, Counter())["running"]
        ]
        return Decision(tuple(plan.actions), "stopped", reason)

    first = min(stage.round for stage in unfinished)
    for stage in view.graph.stages:
        if stage.kind is Kind.CONTROL:
            # one more advance than rounds in the queue: if one is killed, the next one does its work
            if policy.control and first <= stage.round <= first + max(1, policy.lookahead):
                plan.place(stage)
        elif stage.round > first + policy.lookahead or stage.id in view.graph.companions:
            continue
        elif view.is_done(stage.id):
            plan.cancel_waiting(plan.attempts_at(stage), "its work is done")
        else:
            plan.place(stage)
    return Decision(tuple(plan.actions))


def _hopeless(view: View, plan: _Planner, unfinished: Sequence[Stage], policy: Policy) -> str:
    """Why the run must stop: one program error twice at a stage, or too many attempts at it. '' when it may go on."""
    services = [stage for stage in view.graph.stages if stage.kind is Kind.SERVICE and not view.is_done(stage.id)]
    companions = view.graph.companions
    for stage in (*unfinished, *services):
        attempts = [
            a
            for a in view.history.of(stage.round, stage.name)
            if not a.written_off and a.time >= view.history.resumed_at
        ]
        if not attempts or any(plan.is_live(a) for a in attempts):
            continue
        ends = [end for attempt in attempts for end in view.ends.get(attempt.name, ())]
        errors = [end for end in ends if end.outcome == Outcome.ERROR.value]
        counts = _count_by_fingerprint(errors)
        repeated = next((end for end in reversed(errors) if counts[fingerprint(end.error)] > 1), None)
        if repeated:
            times = counts[fingerprint(repeated.error)]
            return f"{stage.id} failed {times} times with the same error: {repeated.error} (log: {repeated.log})"
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
                return _out_of_memory(stage, ends, times)
        # neither is the stage's fault: its inputs were not there, or it was told to leave (time limit, preemption)
        blocked = [a for a in tries if _only(view, a, Outcome.BLOCKED, Outcome.LEFT)]
        if (
            len(tries) - len(blocked) - len(short) >= policy.max_attempts
            or len(blocked) >= BLOCKED_PER_ATTEMPT * policy.max_attempts
        ):
            last = max(ends, key=lambda end: end.ended, default=None)
            how = f"; the last one: {last.outcome}, {last.error} (log: {last.log})" if last else ""
            return f"{stage.id} is not done after {len(tries)} attempts{how}"
    return ""


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
