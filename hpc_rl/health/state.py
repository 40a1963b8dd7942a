"""What is in the workspace already: nothing, this run and how it stands, or another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.base import Queued
from hpc_rl.health.findings import Finding, Subject
from hpc_rl.orchestrate import overview
from hpc_rl.orchestrate.reconcile import DRIVER_LEASE, Run, look
from hpc_rl.run import atomic
from hpc_rl.run.closed import NotClosed, check_closed
from hpc_rl.run.lease import look as look_at_lease
from hpc_rl.run.workspace import Workspace
from hpc_rl.status import Reader

AREA = "state"


class _NotAsked:
    """Stands for a scheduler that is not asked."""

    name = "any"

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        """See `QueueReader`."""
        return ()


def state(subject: Subject) -> Iterator[Finding]:
    """Whether launching would start a run, go on with one, or be refused."""
    config = subject.config
    ws = Workspace(config.run.workspace)
    if not ws.config_path.exists():
        yield Finding(AREA, "ok", f"{ws.root} holds no run yet: launching starts one")
        return
    another = f"a new run: --workspace {ws.root}-2; or move the folder away"
    try:
        check_closed(ws.root, [ws.root, ws.config_path])
    except NotClosed as error:
        yield Finding(AREA, "problem", str(error), "do what it says")
    try:
        stored = configs.from_json(atomic.read_json(ws.config_path))
    except (atomic.CorruptFile, configs.ConfigError, PermissionError) as error:
        yield Finding(AREA, "problem", f"the run in {ws.root} cannot be read: {error}", another)
        return
    try:
        resolved = recipes.resolve(config)
    except (OSError, ValueError) as error:
        yield Finding(AREA, "problem", f"the run cannot be planned: {error}", "correct what it names")
        return
    if differing := configs.differing_keys(stored, resolved):
        keys = ", ".join(f"{key} ({old!r} there, {new!r} here)" for key, old, new in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        remedy = f"{another}; to go on with it: undo these changes"
        yield Finding(AREA, "problem", f"{ws.root} holds a run with another config: {keys}{more}", remedy)
        return
    yield from _standing(subject, Run(ws, stored, recipes.graph_of(stored)))


def _standing(subject: Subject, run: Run) -> Iterator[Finding]:
    """How the run stands. With `--quick` Slurm is not asked, so nobody knows what is queued there."""
    reader = Reader(run)
    try:
        view = look(run, _NotAsked() if subject.quick else reader)
    except atomic.CorruptFile as error:
        yield Finding(AREA, "problem", str(error), "remove that file: what it says is done again")
        return
    driver = look_at_lease(run.ws.lease_folder, DRIVER_LEASE)
    driven = driver.is_held(run.config.run.lease_ttl_s)
    shown = overview.build(view)
    done = sum(all(view.is_done(s.id) for s in run.graph.of_round(r) if s.has_work) for r in range(1, shown.rounds + 1))
    where = f"{run.ws.root}: {done} of {shown.rounds} rounds are done"
    if driven:
        yield Finding(AREA, "ok", f"{where}; {driver.holder} drives it")
    elif shown.status == "stopped":
        yield Finding(AREA, "problem", f"{where}; it stopped: {shown.reason}", "remove the cause, and launch again")
    elif shown.status in ("finished", "running"):
        yield Finding(AREA, "ok", f"{where}; it is {shown.status}")
    elif shown.status == "idle" and subject.quick and subject.executor == "slurm":
        yield Finding(AREA, "ok", f"{where}; what Slurm has of it is looked at without --quick")
    else:
        reason = f": {shown.reason}" if shown.reason else ""
        yield Finding(AREA, "warning", f"{where}; it is {shown.status}{reason}", "launch again to go on")
    if reader.note:
        yield Finding(AREA, "warning", reader.note, "ask again later")
    errors = [stage for stage in shown.stages if stage.state == "failed"]
    for stage in errors[-3:]:
        what = f"round {stage.round} {stage.stage} failed last: {stage.last_error}"
        yield Finding(AREA, "warning", what, f"see {run.ws.root / stage.log}" if stage.log else "see its logs")
    if view.history.skipped_lines:
        what = f"{view.history.skipped_lines} lines of {run.ws.ledger_path.name} were cut off by a crash"
        yield Finding(AREA, "warning", what, "nothing: they are skipped")
