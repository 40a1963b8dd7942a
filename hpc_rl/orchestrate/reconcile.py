"""The one verb: look at the run, decide, submit what is missing. Safe to call twice, from anywhere, at any time.

Launch, resume, retry and "next round" are all this call. It works under the run's lease, so two callers take turns and
the second finds nothing to do. If it dies at any point, the next call goes on from what it finds: an intent in the
ledger without a job id is looked up in the queue by its unique name and either adopted or written off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.base import Executor, JobRequest, Queued, QueueReader
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.cluster.failures import Outcome
from hpc_rl.config.schema import Config
from hpc_rl.engines.memory import notches_of
from hpc_rl.orchestrate import overview
from hpc_rl.orchestrate.decide import Cancel, Decision, GiveUp, Policy, Submit, View, WriteOff, decide
from hpc_rl.orchestrate.giving_up import give_up
from hpc_rl.orchestrate.graph import Graph, Stage, StageId
from hpc_rl.orchestrate.requests import build_request, submission_name, task_count
from hpc_rl.orchestrate.spent import remove_spent
from hpc_rl.run import atomic, manifest
from hpc_rl.run.closed import check_closed
from hpc_rl.run.lease import Lease, acquire_patiently
from hpc_rl.run.ledger import History, Ledger
from hpc_rl.run.workspace import SCHEMA, Workspace

RECONCILE_LEASE = "reconcile"
DRIVER_LEASE = "driver"
"""Held by a launcher that stays with its run: one at a time."""


class NoRun(RuntimeError):
    """A folder without a run, or with one that cannot be read; the message says which."""


class RunBusy(RuntimeError):
    """Another process is reconciling the run and did not finish in time."""


@dataclass(frozen=True)
class Run:
    """A run: its workspace, its config, and the graph that follows from it."""

    ws: Workspace
    config: Config
    graph: Graph

    @classmethod
    def load(cls, root: Path) -> Run:
        """The run in a workspace; `NoRun` when there is none that can be read."""
        ws = Workspace(root)
        try:
            config = configs.from_json(atomic.read_json(ws.config_path))
        except FileNotFoundError:
            raise NoRun(f"{root} holds no run (no {ws.config_path.name})") from None
        except (atomic.CorruptFile, configs.ConfigError, PermissionError) as error:
            raise NoRun(f"the run in {root} cannot be read: {error}. `launch` with its YAML file says more.") from error
        return cls(ws, config, recipes.graph_of(config))


@dataclass
class Report:
    """What a reconcile did."""

    decision: Decision
    submitted: dict[StageId, list[str]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    given_up: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(run: Run, executor: QueueReader, history: History | None = None) -> View:
    """The run as it stands: one folder listing a stage, one question to the scheduler."""
    history = Ledger(run.ws).history() if history is None else history
    done = {stage.id: len(manifest.done_shards(run.ws, stage.round, stage.name)) for stage in run.graph.work}
    incomplete = {stage.id for stage in run.graph.stages if not stage.has_work or done[stage.id] < stage.shards}
    ends: dict[str, list[EndRecord]] = {}
    for stage_id in sorted({StageId(a.round, a.stage) for a in history.attempts} & incomplete):
        for end in end_records(run.ws, stage_id):
            ends.setdefault(end.name, []).append(end)
    queue = executor.queue([a.name for a in history.attempts])
    short = {StageId(a.round, a.stage) for a in history.attempts if any(_is_short(e) for e in ends.get(a.name, ()))}
    notches = {id: notches_of(run.ws, id.round, id.name) for id in sorted(short)}
    return View(run.graph, done, history, queue, ends, notches)


def _is_short(end: EndRecord) -> bool:
    return end.outcome == Outcome.OUT_OF_MEMORY.value


def end_records(ws: Workspace, id: StageId) -> list[EndRecord]:
    """How the jobs of a stage ended so far, oldest first."""
    return sorted((EndRecord.read(path) for path in end_paths(ws, id)), key=lambda end: end.ended)


def end_paths(ws: Workspace, id: StageId) -> list[Path]:
    """The files with a stage's end records, in no particular order."""
    folder = ws.attempts_dir(id.round, id.name)
    if not folder.is_dir():
        return []
    return [folder / name for name in os.listdir(folder) if ".end-" in name and not name.startswith(".")]


def reconcile(
    run: Run,
    executor: Executor,
    code: Path,
    policy: Policy,
    me: str = "",
    patience_s: float = 120.0,
    resume: bool = False,
    on_work: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Bring the queue in line with what the run still needs.

    Parameters
    ----------
    code
        Snapshot of the code that new submissions import.
    me
        Name of the submission that we run in ourselves, '' outside of jobs.
    patience_s
        How long to wait for another reconcile that is under way.
    resume
        Go on with a run that is paused or stopped, or that would have to stop or to give something up.
    on_work
        Called under the lease before anything is submitted, and only if something is.
    say
        Gets a line for each thing done.

    Raises
    ------
    RunBusy
        When the other one does not end in time.
    ExecutorError
        When the scheduler refuses; what was submitted before is in the ledger.
    NotClosed
        When others may write to what would be run.
    """
    # a reconcile takes seconds; one without a heartbeat for 30 s is dead, and its place is taken
    ttl_s = min(30.0, run.config.run.lease_ttl_s)
    lease = acquire_patiently(run.ws.lease_folder, RECONCILE_LEASE, ttl_s, patience_s)
    if lease is None:
        raise RunBusy(
            f"another process has been reconciling {run.ws.root} for {patience_s:.0f} s; try again, nothing is lost"
        )
    with lease:
        ledger = Ledger(run.ws)
        view = look(run, executor, ledger.history())
        decision = decide(view, policy, me)
        lost = any(isinstance(action, GiveUp) for action in decision.actions)
        if resume and (lost or decision.status in ("paused", "stopped")):
            # a person says so: what was tried before does not count any more
            ledger.append("resumed")
            view = replace(view, history=ledger.history())
            decision = decide(view, policy, me)
        report = Report(decision)
        if view.history.skipped_lines:
            report.notes.append(
                f"{view.history.skipped_lines} lines of {ledger.path.name} were cut off by a crash and are skipped"
            )
        _adopt(ledger, view)
        try:
            if any(isinstance(action, Submit) for action in decision.actions):
                on_work()
            _carry_out(run, executor, code, decision, ledger, view, report, say, lease)
        finally:
            _write_state(run, _view_after(run, view, report), report)
    if decision.status == "finished":
        remove_spent(run.ws, run.graph.work)
    return report


def _adopt(ledger: Ledger, view: View) -> None:
    """Jobs whose sbatch was accepted but whose id nobody lived to write down: the queue knows them by name."""
    for attempt in view.history.attempts:
        ids = sorted({job.job_id.partition("_")[0] for job in view.queue if job.name == attempt.name})
        if attempt.job_ids is None and ids:
            ledger.append("submitted", name=attempt.name, job_ids=ids, adopted=True)


def _carry_out(
    run: Run,
    executor: Executor,
    code: Path,
    decision: Decision,
    ledger: Ledger,
    view: View,
    report: Report,
    say: Callable[[str], None],
    lease: Lease,
) -> None:
    submitter = _Submitter(run, executor, code, ledger, view)
    if decision.status == "stopped" and not view.history.stopped:
        ledger.append("stopped", why=decision.reason)
    for action in decision.actions:
        if lease.lost:  # we were frozen for so long that somebody else goes on in our place: our view is out of date
            raise RunBusy(f"another process has taken over reconciling {run.ws.root}; nothing is lost")
        if isinstance(action, GiveUp):
            give_up(run.ws, run.config, action.stage, action.why)
            report.given_up.append(action.stage)
            say(f"{action.stage.id} is given up: {action.why}")
        elif isinstance(action, WriteOff):
            ledger.append("written_off", name=action.name)
        elif isinstance(action, Cancel):
            executor.cancel([action.name], action.waiting_only)
            started = any(job.name == action.name and not job.is_waiting for job in view.queue)
            if not (action.waiting_only and started):
                ledger.append("cancelled", name=action.name, why=action.why)
            report.cancelled.append(action.name)
            say(f"cancelled {action.name}: {action.why}")
        elif isinstance(action, Submit):
            accepted = report.submitted[action.stage.id] = submitter.submit(action)
            what = " with ".join(str(part.stage.id) for part in (action, *action.beside))
            later = f", to start in {action.delay_s:g} s" if action.delay_s else ""
            say(f"{what}: submitted as {', '.join(accepted)}{later}")


class _Submitter:
    """Hands attempts to the executor, one after the other, and knows by which ids the next ones can wait for them."""

    def __init__(self, run: Run, executor: Executor, code: Path, ledger: Ledger, view: View) -> None:
        self.run, self.executor, self.code, self.ledger = run, executor, code, ledger
        self.names: dict[StageId, str] = {}
        self.ids: dict[str, list[str]] = {a.name: list(a.job_ids or ()) for a in view.history.attempts}
        for job in view.queue:
            self.ids.setdefault(job.name, [])
            if (job_id := job.job_id.partition("_")[0]) not in self.ids[job.name]:
                self.ids[job.name].append(job_id)
        self.running = {job.name for job in view.queue if not job.is_waiting}
        self.arrays = {job.name for job in view.queue if "_" in job.job_id}

    def submit(self, action: Submit) -> list[str]:
        """Submit an attempt with what runs beside it; returns its job ids."""
        request = self._announce(action)
        names = [part.spec.name for part in (request, *request.beside)]

        def on_accepted(job_id: str) -> None:
            for name in names:
                self.ledger.append("submitted", name=name, job_ids=[job_id])
                self.ids[name].append(job_id)

        self.executor.submit(request, on_accepted)
        return self.ids[request.spec.name]

    def _announce(self, action: Submit, companion: bool = False) -> JobRequest:
        """Write down what is about to be submitted: the spec for its job, the intent for whoever reconciles next."""
        run, stage = self.run, action.stage
        name = self.names[stage.id] = submission_name(run.config, stage, action.number)
        after_end, after_start = self._names(action.after_end), self._names(action.after_start)
        request = build_request(
            run.ws,
            run.config,
            stage,
            name,
            self.executor.name,
            self.code,
            after_end=tuple(i for a in after_end for i in self.ids[a]),
            after_start=tuple(self._first(a) for a in after_start if a not in self.running),
            companion=companion,
            delay_s=action.delay_s,
        )
        self.ids[name] = []
        if request.resources.tasks > 1:
            self.arrays.add(name)
        scripts = run.ws.log_dir(stage.round, stage.name)
        scripts.mkdir(parents=True, exist_ok=True)
        check_closed(run.ws.root, [request.spec.save(), run.ws.config_path, scripts])
        self.ledger.append(
            "intent",
            name=name,
            round=stage.round,
            stage=stage.name,
            number=action.number,
            executor=self.executor.name,
            depends_on=[*after_end, *after_start],
        )
        return replace(request, beside=tuple(self._announce(part, companion=True) for part in action.beside))

    def _names(self, after: tuple[str | StageId, ...]) -> list[str]:
        return [self.names[a] if isinstance(a, StageId) else a for a in after]

    def _first(self, name: str) -> str:
        """What to wait for until a service has started: of replicas the first, since `after:ARRAY` waits for all."""
        return f"{self.ids[name][0]}_0" if name in self.arrays else self.ids[name][0]


def _view_after(run: Run, view: View, report: Report) -> View:
    """The view that the actions led to, without asking the scheduler again."""
    history = Ledger(run.ws).history()
    kept = [job for job in view.queue if not (job.name in report.cancelled and job.is_waiting)]
    before = {a.name for a in view.history.attempts}
    new = [
        Queued(a.name, a.job_ids[0], "PENDING", tasks=task_count(run.config, run.graph[StageId(a.round, a.stage)]))
        for a in history.attempts
        if a.name not in before and a.job_ids
    ]
    return replace(view, history=history, queue=[*kept, *new]).with_done(report.given_up)


def _write_state(run: Run, view: View, report: Report) -> None:
    """Write down how the run stands, for people and tools. A file that cannot be read is replaced: it is a view."""
    path, epoch = run.ws.state_path, 0
    try:
        epoch = int(atomic.read_json(path)["epoch"])
    except FileNotFoundError:
        pass
    except (atomic.CorruptFile, KeyError, TypeError, ValueError) as error:
        report.notes.append(f"{path.name} could not be read ({error}); it was rebuilt from manifests and ledger")
    state = {
        "schema": SCHEMA,
        "epoch": epoch + 1,
        "updated": round(time.time(), 3),
        **overview.to_plain(overview.build(view)),
    }
    atomic.write_json(path, state)
