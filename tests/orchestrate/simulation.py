"""A scheduler and a world in a few hundred lines: jobs start in any order, fail in all ways, and time is a counter.

`Scheduler` behaves as Slurm does towards `decide`: dependencies are `afterany` and `after`, an array's elements start
one by one, the components of a heterogeneous job together, a job may be requeued or vanish without a record.
`Simulation` plays a run, with an `advance` that asks `decide` and may be killed between any two of its steps, and with
a user who launches again when the queue is empty.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from hpc_rl.cluster.base import Queued
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.cluster.failures import Outcome
from hpc_rl.orchestrate.decide import Cancel, Decision, GiveUp, Policy, Submit, View, WriteOff, decide
from hpc_rl.orchestrate.graph import Graph, Kind, Stage, StageId, build_graph
from hpc_rl.run.ledger import Attempt, History


def lewis_like(rounds: int, shards: int, hetjob: bool = False, optional: Sequence[str] = ()) -> Graph:
    """sample (array) → grade (array, with a listener) → train → evaluate (with a listener), as in the Lewis recipe.

    With `hetjob` the listeners run in the jobs that they serve. The run can go on without the stages in `optional`.
    """

    def with_listener(stage: Stage) -> Iterable[Stage]:
        listener = StageId(stage.round, f"{stage.name}.listener")
        yield Stage(listener, "jobs.serve", Kind.SERVICE, needs=stage.needs, shards=0, serves=(stage.id,))
        yield replace(stage, beside=(listener,)) if hetjob else replace(stage, uses=(listener,))

    def stages(round: int) -> Iterable[Stage]:
        sample, grade, train = (StageId(round, name) for name in ("sample", "grade", "train"))
        if round == 0:
            yield Stage(train, "jobs.lewis.prepare", Kind.ARRAY, shards=shards)
            return
        before, may_lack = (StageId(round - 1, "train"),), "grade" in optional
        yield Stage(sample, "jobs.sample", Kind.ARRAY, needs=before, shards=shards)
        graded = Stage(grade, "jobs.lewis.grade", Kind.ARRAY, needs=(sample,), shards=shards, optional=may_lack)
        yield from with_listener(graded)
        yield Stage(train, "jobs.train", Kind.MULTINODE, needs=(grade, *before), optional="train" in optional)
        yield from with_listener(Stage(StageId(round, "evaluate"), "jobs.lewis.evaluate", Kind.SINGLE, needs=(train,)))

    return build_graph(rounds, stages)


@dataclass
class Job:
    """A submission in the scheduler; `elements` are PENDING, RUNNING or ENDED.

    `leader` is the job whose component it is; one that is its own leader may have components.
    """

    id: str
    name: str
    stage: Stage
    after_end: frozenset[str]
    after_start: frozenset[str]
    elements: list[str]
    restarts: int = 0
    leader: str = ""

    @property
    def ended(self) -> bool:
        return all(state == "ENDED" for state in self.elements)

    def started(self, element: str) -> bool:
        """Whether `after:ID_ELEMENT` is fulfilled; `after:ID` waits for all elements of an array (sbatch(1))."""
        return "PENDING" not in (self.elements[int(element)] if element else self.elements)


@dataclass
class Scheduler:
    """Jobs, and who may start."""

    jobs: dict[str, Job] = field(default_factory=dict)

    def submit(self, name: str, stage: Stage, tasks: int, after_end: Iterable[str], after_start: Iterable[str]) -> str:
        job_id = str(len(self.jobs) + 1)
        waits = frozenset(after_end), frozenset(after_start)
        assert {id.partition("_")[0] for id in waits[0] | waits[1]} <= set(self.jobs), "depends on a job that never was"
        self.jobs[job_id] = Job(job_id, name, stage, *waits, ["PENDING"] * tasks, leader=job_id)
        return job_id

    def add_component(self, job_id: str, name: str, stage: Stage) -> None:
        """Make `stage` a further component of a job."""
        component = str(len(self.jobs) + 1)  # it has an id of its own, by which nobody calls it
        assert len(self.jobs[job_id].elements) == 1, "an array of heterogeneous jobs"
        self.jobs[component] = Job(component, name, stage, frozenset(), frozenset(), ["PENDING"], leader=job_id)

    def components(self, job: Job) -> list[Job]:
        """The other components of a job that is a leader."""
        return [other for other in self.jobs.values() if other.leader == job.id and other is not job]

    def set_state(self, job: Job, at: int, state: str) -> None:
        """Start, end or requeue an element; what a leader does its components do."""
        job.elements[at] = state
        for other in self.components(job):
            other.elements = [state]

    def queue(self, names: Iterable[str]) -> list[Queued]:
        wanted = set(names)
        return [
            Queued(job.name, f"{job.leader}_{at}" if len(job.elements) > 1 else job.leader, state)
            for job in self.jobs.values()
            if job.name in wanted
            for at, state in enumerate(job.elements)
            if state != "ENDED"
        ]

    def cancel(self, name: str, waiting_only: bool) -> None:
        for job in self.jobs.values():
            if job.name == name:
                alone = job.leader == job.id or "PENDING" not in job.elements
                assert alone, "scancel refuses: Operation not permitted on individual component of heterogeneous job"
                for at, state in enumerate(job.elements):
                    if state == "PENDING" or not waiting_only:
                        self.set_state(job, at, "ENDED")

    def startable(self) -> list[tuple[Job, int]]:
        return [
            (job, at)
            for job in self.jobs.values()
            if job.leader == job.id
            and all(self.jobs[i].ended for i in job.after_end)
            and all(self.jobs[i.partition("_")[0]].started(i.partition("_")[2]) for i in job.after_start)
            for at, state in enumerate(job.elements)
            if state == "PENDING"
        ]

    def running(self) -> list[tuple[Job, int]]:
        return [(job, at) for job in self.jobs.values() for at, state in enumerate(job.elements) if state == "RUNNING"]


class Killed(BaseException):
    """The process that reconciles is killed here."""


@dataclass
class Chaos:
    """How much still goes wrong. Each failure uses up one of its kind.

    `kill_exactly` names one advance, by how many ran before it, and the step before which it is killed.
    """

    job_failures: int = 0
    idle_leaves: int = 0  # services that leave while their consumers still wait
    advance_kills: int = 0
    kill_exactly: tuple[int, int] | None = None

    def strikes(self, chance: random.Random, kind: str, probability: float) -> bool:
        left: int = getattr(self, kind)
        if left and chance.random() < probability:
            setattr(self, kind, left - 1)
            return True
        return False


class Simulation:
    """A run in the simulated world; `play` it to its end."""

    def __init__(
        self, graph: Graph, policy: Policy, chaos: Chaos, seed: int, tasks: int = 2, replicas: int = 1
    ) -> None:
        self.graph, self.policy, self.chaos, self.tasks, self.replicas = graph, policy, chaos, tasks, replicas
        self.chance = random.Random(seed)
        self.scheduler = Scheduler()
        self.done: dict[StageId, set[int]] = {}
        self.ends: dict[str, list[EndRecord]] = {}
        self.attempts: dict[str, Attempt] = {}
        self.stopped = self.paused = ""
        self.resumed_at = 0.0
        self.clock = 0
        self.launches = self.advances = 0
        self.given_up: dict[StageId, str] = {}
        self.broken: dict[StageId, str] = {}  # stages whose program fails with this message whenever it runs

    # what reconcile does

    def view(self) -> View:
        history = History(tuple(self.attempts.values()), self.paused, self.stopped, self.resumed_at)
        done = {stage: len(shards) for stage, shards in self.done.items()}
        return View(self.graph, done, history, self.scheduler.queue(self.attempts), self.ends)

    def reconcile(self, me: str = "", kill_at: int | None = None) -> Decision:
        """Look, decide, carry out as `hpc_rl.orchestrate.reconcile` does; killed before its step `kill_at`."""
        steps = 0

        def step() -> None:
            nonlocal steps
            if steps == kill_at:
                raise Killed
            steps += 1

        view = self.view()
        decision = decide(view, self.policy, me)
        self.check(view, decision)
        for name, attempt in self.attempts.items():
            ids = {job.job_id.partition("_")[0] for job in view.queue if job.name == name}
            if attempt.job_ids is None and ids:
                step()
                self.attempts[name] = replace(attempt, job_ids=tuple(sorted(ids)), written_off=False)
        self.stopped = decision.reason if decision.status == "stopped" else self.stopped
        names: dict[StageId, str] = {}
        for action in decision.actions:
            step()
            if isinstance(action, GiveUp):
                assert action.stage.optional
                self.given_up[action.stage.id] = action.why
                step()
                self.done[action.stage.id] = set(range(action.stage.shards))
            elif isinstance(action, WriteOff):
                self.attempts[action.name] = replace(self.attempts[action.name], written_off=True)
            elif isinstance(action, Cancel):
                self.scheduler.cancel(action.name, action.waiting_only)
                if not action.waiting_only:
                    step()
                    self.attempts[action.name] = replace(self.attempts[action.name], cancelled=action.why)
            else:
                self._submit(action, names, step)
        self.check_after(me, decision)
        return decision

    def _submit(self, action: Submit, names: dict[StageId, str], step: Callable[[], None]) -> None:
        after = [
            [names[a] if isinstance(a, StageId) else a for a in side] for side in (action.after_end, action.after_start)
        ]
        for part in (action, *action.beside):
            stage, self.clock = part.stage, self.clock + 1
            name = names[stage.id] = f"r{stage.round}-{stage.name}-a{part.number}-{self.clock}"
            depends_on = (*after[0], *after[1]) if part is action else ()
            self.attempts[name] = Attempt(
                name, stage.round, stage.name, part.number, "sim", depends_on, time=self.clock
            )
            step()
        ended, started = [[i for a in side for i in self.attempts[a].job_ids or ()] for side in after]
        first = [f"{i}_0" if len(self.scheduler.jobs[i].elements) > 1 else i for i in started]
        job_id = self.scheduler.submit(names[action.stage.id], action.stage, self._tasks(action.stage), ended, first)
        for part in action.beside:
            self.scheduler.add_component(job_id, names[part.stage.id], part.stage)
        for part in (action, *action.beside):
            step()
            name = names[part.stage.id]
            self.attempts[name] = replace(self.attempts[name], job_ids=(job_id,))

    def _tasks(self, stage: Stage) -> int:
        if stage.kind is Kind.SERVICE:
            return self.replicas
        return min(self.tasks, stage.shards) if stage.kind is Kind.ARRAY and not stage.beside else 1

    # what must hold whenever somebody decides

    def check(self, view: View, decision: Decision) -> None:
        submits = [action for action in decision.actions if isinstance(action, Submit)]
        if decision.status != "running":
            assert not submits, f"{decision.status}, and yet something is submitted"
        first = min((stage.round for stage in self.graph.work if not view.is_done(stage.id)), default=0)
        for action in submits:
            assert self.policy.until is None or action.stage.round <= self.policy.until
            ahead = max(1, self.policy.lookahead) if action.stage.kind is Kind.CONTROL else self.policy.lookahead
            assert first <= action.stage.round <= first + ahead
            assert not view.is_done(action.stage.id)

    def check_after(self, me: str, decision: Decision) -> None:
        view = self.view()
        assert decide(view, self.policy, me).actions == (), "asked again, it asks for more"
        live: dict[StageId, list[str]] = {}
        states: dict[str, set[str]] = {}
        for job in view.queue:
            states.setdefault(job.name, set()).add(job.state)
        for name in states:
            if name != me:
                live.setdefault(StageId(self.attempts[name].round, self.attempts[name].stage), []).append(name)
        assert all(len(names) == 1 for names in live.values()), f"two live attempts: {live}"
        if decision.status != "running":
            return
        advances = [id for id in live if self.graph[id].kind is Kind.CONTROL]
        assert not self.policy.control or len(advances) >= 2, "no spare advance"
        for id, (name,) in live.items():
            if states[name] == {"PENDING"} and id not in self.graph.companions:
                stage = self.graph[id]
                for other in (*stage.needs, *stage.uses):
                    behind = set(live.get(other, ())) - set(self.attempts[name].depends_on)
                    assert not behind or view.is_done(other) or self._is_over(other, view), f"{name} before {behind}"

    def _is_over(self, id: StageId, view: View) -> bool:
        """True for the advance of a round that is done: what it could do is not needed any more."""
        return self.graph[id].kind is Kind.CONTROL and all(
            view.is_done(stage.id) for stage in self.graph.work if stage.round <= id.round
        )

    # what the world does

    def play(self, limit: int = 5000) -> str:
        """Steps until the run has ended; returns its status."""
        status = self.launch()
        for _ in range(limit):
            if status in ("finished", "stopped", "paused", "held"):
                return status
            possible = [*self.scheduler.startable(), *self.scheduler.running()]
            if not possible:
                assert not self.scheduler.queue(self.attempts), "what waits can never start"
                status = self.launch()
                continue
            job, at = self.chance.choice(possible)
            if job.elements[at] == "PENDING":
                self.scheduler.set_state(job, at, "RUNNING")
            else:
                status = self._run(job, at) or status
                if not self.policy.control and job.ended:
                    status = self.launch()  # a launcher that stays, or is started again
        raise AssertionError(f"no end after {limit} steps; done: {self.done}")

    def launch(self) -> str:
        """The user launches, again if need be; a launch may be killed as well."""
        self.launches += 1
        if self.stopped or self.paused:
            self.stopped = self.paused = ""
            self.resumed_at = self.clock
        try:
            return self.reconcile(kill_at=self._kill_at()).status
        except Killed:
            return "running"

    def _kill_at(self) -> int | None:
        if self.chaos.kill_exactly and self.chaos.kill_exactly[0] == self.advances:
            return self.chaos.kill_exactly[1]
        return self.chance.randrange(25) if self.chaos.strikes(self.chance, "advance_kills", 0.3) else None

    def _end(self, job: Job, at: int, outcome: Outcome, error: str = "", rank: int = 0) -> None:
        self.clock += 1
        code = {Outcome.DONE: 0, Outcome.BLOCKED: 75}.get(outcome, 1)
        record = EndRecord(
            job.name, f"{job.id}_{at}", job.restarts, rank, "node1", outcome.value, code, error, "x.out",
            self.clock - 1, self.clock, 0.0, 0.0,
        )  # fmt: skip
        self.ends.setdefault(job.name, []).append(record)
        self.scheduler.set_state(job, at, "ENDED")

    def _run(self, job: Job, at: int) -> str:
        """Something happens in a running element. Returns the run's status when an advance found one."""
        stage = job.stage
        if stage.kind is Kind.CONTROL:
            self.advances += 1
            try:
                status = self.reconcile(job.name, self._kill_at()).status
            except Killed:
                job.elements[at] = "ENDED"  # killed: no end record
                return ""
            self._end(job, at, Outcome.DONE)
            return status
        if any(not self._complete(need) for need in stage.needs):
            self._end(job, at, Outcome.BLOCKED)
        elif stage.id in self.broken and not self.view().is_done(stage.id):
            self._end(job, at, Outcome.ERROR, self.broken[stage.id])
        elif self.chaos.strikes(self.chance, "job_failures", 0.2):
            self._fail(job, at)
        elif stage.kind is Kind.SERVICE:
            consumers = [j for j in self.scheduler.jobs.values() if j.stage.id in stage.serves]
            needed = any(not j.ended for j in consumers) and not self.view().is_done(stage.id)
            served = any("RUNNING" in j.elements for j in consumers)
            if not needed or (not served and self.chaos.strikes(self.chance, "idle_leaves", 0.9)):
                self._end(job, at, Outcome.DONE)
        elif (stage.uses or stage.beside) and not self._is_served(stage):
            if self.chance.random() < 0.2:  # its patience with the service ends
                self._end(job, at, Outcome.BLOCKED)
        elif self._complete(stage.id):
            self._end(job, at, Outcome.DONE)
        else:
            left = set(range(stage.shards)) - self.done.get(stage.id, set())
            self.done.setdefault(stage.id, set()).add(self.chance.choice(sorted(left)))
        return ""

    def _complete(self, id: StageId) -> bool:
        stage = self.graph[id]
        return not stage.has_work or len(self.done.get(id, ())) >= stage.shards

    def _is_served(self, stage: Stage) -> bool:
        up = {job.stage.id for job, _ in self.scheduler.running()} - set(self.broken)
        return bool(up & {*stage.uses, *stage.beside})

    def _fail(self, job: Job, at: int) -> None:
        way = self.chance.choice(["lost", "killed", "left", "error", "requeued"])
        if way == "lost":
            self.scheduler.set_state(job, at, "ENDED")
        elif way == "requeued":
            leader = self.scheduler.jobs[job.leader]
            self.scheduler.set_state(leader, at, "PENDING")
            for component in (leader, *self.scheduler.components(leader)):
                component.restarts += 1
        elif way == "error":
            self._end(job, at, Outcome.ERROR, f"OSError: an accident of the kind {_word(self.clock)}")
        else:
            self._end(job, at, Outcome.KILLED if way == "killed" else Outcome.LEFT)

    def submissions(self, id: StageId) -> Sequence[Attempt]:
        """The attempts at a stage that were handed in and not cancelled again."""
        return [
            a
            for a in self.attempts.values()
            if (a.round, a.stage) == (id.round, id.name) and a.job_ids and not a.cancelled
        ]


def _word(number: int) -> str:
    """A word for each number: numbers alone are left out when errors are compared."""
    return "".join(chr(ord("g") + int(digit)) for digit in str(number))
