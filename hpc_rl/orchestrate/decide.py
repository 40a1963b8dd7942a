"""What to do next, as a pure function: graph − what is done − what is queued or running → submit the rest.

`decide` looks at a `View` (manifests, ledger, queue, end records) and returns actions. It can be asked again at any
time, by anyone: on a view that its own actions have led to, it asks for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from hpc_rl.cluster.base import Queued
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.config.schema import RunConfig
from hpc_rl.orchestrate.graph import ADVANCE, Graph, Kind, Stage, StageId
from hpc_rl.orchestrate.tries import dispensable, hopeless, is_in_vain, is_to_wait
from hpc_rl.run.ledger import Attempt, History


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

    def with_done(self, stages: Iterable[Stage]) -> View:
        """The view in which these are done too."""
        return replace(self, done={**self.done, **{stage.id: stage.shards for stage in stages}})

    def is_done(self, id: StageId) -> bool:
        """A stage with work is done when all its shards are; a service when all whom it serves are."""
        stage = self.graph[id]
        if stage.kind is Kind.SERVICE:
            return all(self.is_done(served) for served in stage.serves)
        return stage.has_work and self.done.get(id, 0) >= stage.shards


@dataclass(frozen=True)
class Policy:
    """How far ahead to queue, how often to try, and what to do without.

    Attributes
    ----------
    lookahead, max_attempts, auto_retry, retry_delay_s, continue_on_failure
        As in `RunConfig`.
    control
        Advance by jobs; False where the launcher itself stays and advances.
    until
        The last round that may be submitted, however far `lookahead` reaches; None: there is no such limit.
    """

    lookahead: int = 1
    max_attempts: int = 5
    control: bool = True
    auto_retry: bool = True
    retry_delay_s: float = 0.0
    continue_on_failure: bool = False
    until: int | None = None

    @classmethod
    def of(cls, config: RunConfig, control: bool = True) -> Policy:
        """What a run's config says."""
        names = ("lookahead", "max_attempts", "auto_retry", "retry_delay_s", "continue_on_failure")
        return cls(control=control, **{name: getattr(config, name) for name in names})


@dataclass(frozen=True)
class Submit:
    """Submit an attempt at a stage, after other submissions (by name, or by the stage submitted along with it).

    `beside`: attempts at the services that run in the same job. `delay_s`: how long it must not start.
    """

    stage: Stage
    number: int
    after_end: tuple[str | StageId, ...] = ()
    after_start: tuple[str | StageId, ...] = ()
    beside: tuple[Submit, ...] = ()
    delay_s: float = 0.0


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
class GiveUp:
    """Leave a stage undone for good: from now on it counts as done."""

    stage: Stage
    why: str


Action = Submit | Cancel | WriteOff | GiveUp


@dataclass(frozen=True)
class Decision:
    """What to do, in order, and how the run stands.

    `status` is `running`, `finished`, `paused`, `stopped`, or `held`: the next round is not to be submitted yet
    (`Policy.until`). `reason` says why.
    """

    actions: tuple[Action, ...] = ()
    status: str = "running"
    reason: str = ""


@dataclass
class _Planner:
    view: View
    policy: Policy
    me: str
    actions: list[Action] = field(default_factory=list)
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
        delay_s = self.policy.retry_delay_s if is_to_wait(self.view, stage, self.states.keys()) else 0.0
        self.actions.append(Submit(stage, self._next(stage), after_end, after_start, beside, delay_s))
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
    if vain := [stage for stage in unfinished if is_in_vain(view, stage)]:  # killed while what belongs together fell
        plan.actions += [GiveUp(stage, "what needs it was given up") for stage in vain]
        plan.view = view = view.with_done(vain)
        unfinished = [stage for stage in unfinished if not view.is_done(stage.id)]
    if not unfinished:
        return _finished(plan)
    reason = view.history.stopped
    while not reason and (lost := hopeless(view, unfinished, policy, plan.is_live)) is not None:
        stage, reason = lost
        if without := dispensable(view, stage) if policy.continue_on_failure else []:
            itself, instead = {stage.id, *stage.serves}, f"{stage.id} was given up"
            # those that need it first: they are not to begin without it
            plan.actions += [GiveUp(one, reason if one.id in itself else instead) for one in reversed(without)]
            plan.view = view = view.with_done(without)
            unfinished = [stage for stage in unfinished if not view.is_done(stage.id)]
            reason = ""
    if not unfinished:
        return _finished(plan)
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
    last = first + policy.lookahead
    if policy.until is not None:
        if first > policy.until:
            plan.cancel_waiting(view.history.attempts, "the next round is not to begin yet")
            return Decision(tuple(plan.actions), "held", f"round {first} is not to begin yet")
        last = min(last, policy.until)
        # left over from a launch that was to go on by itself
        beyond = [a for a in view.history.attempts if a.round > last or a.stage == ADVANCE]
        plan.cancel_waiting(beyond, "the next round is not to begin yet")
    for stage in view.graph.stages:
        if stage.kind is Kind.CONTROL:
            # one more advance than rounds in the queue: if one is killed, the next one does its work
            if policy.control and first <= stage.round <= first + max(1, policy.lookahead):
                plan.place(stage)
        elif stage.round > last or stage.id in view.graph.companions:
            continue
        elif view.is_done(stage.id):
            plan.cancel_waiting(plan.attempts_at(stage), "its work is done")
        else:
            plan.place(stage)
    return Decision(tuple(plan.actions))


def _finished(plan: _Planner) -> Decision:
    plan.cancel_waiting(plan.view.history.attempts, "the run is finished")
    return Decision(tuple(plan.actions), "finished")
