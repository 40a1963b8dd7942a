"""`python -m hpc_rl.status WORKSPACE`: rounds × stages as they stand. It asks Slurm once and changes nothing."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc_rl.cluster.base import ExecutorError, Queued
from hpc_rl.orchestrate import overview
from hpc_rl.orchestrate.overview import Overview, StageOverview
from hpc_rl.orchestrate.reconcile import DRIVER_LEASE, NoRun, Run, look
from hpc_rl.run import atomic
from hpc_rl.run.lease import look as look_at_lease
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.shard_leases import leases_of, progress_path, read_listing
from hpc_rl.run.workspace import Workspace

WATCH_EVERY_S = 5.0


class Reader:
    """What the run has queued, whoever submitted it: asked of Slurm, or read from the local launcher's note."""

    name = "any"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.note = ""

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        """See `Executor.queue`."""
        names = set(names)
        on_slurm = [a.name for a in Ledger(self.run.ws).history().attempts if a.executor == "slurm" and a.name in names]
        found: list[Queued] = []
        if on_slurm and shutil.which("squeue"):
            from hpc_rl.cluster import queries

            try:
                found += queries.queued_jobs(on_slurm, owner=self.run.ws.ledger_path.stat().st_uid)
            except ExecutorError as error:
                self.note = f"Slurm did not answer ({error}); jobs in its queue are not shown"
        if look_at_lease(self.run.ws.lease_folder, DRIVER_LEASE).is_held(self.run.config.run.lease_ttl_s):
            try:
                local = atomic.read_json(self.run.ws.lease_folder / "local_queue.json")
            except FileNotFoundError:
                local = []
            found += [job for job in (Queued(**entry) for entry in local) if job.name in names]
        return found


def table(root: Path, shown: Overview) -> str:
    """The overview as text."""
    lines = [f"{root}: {shown.status}{': ' + shown.reason if shown.reason else ''}", ""]
    lines.append(
        f"{'round':>5}  {'stage':<20} {'state':<11} {'shards':>9} {'running':>8} {'waiting':>8}  {'tries':>5}  jobs"
    )
    for stage in shown.stages:
        if stage.state == "not yet" and stage.kind in ("service", "control"):
            continue
        work = f"{stage.shards_done}/{stage.shards}" if stage.kind not in ("service", "control") else ""
        jobs = ",".join(stage.job_ids[-3:])
        jobs += f" on {','.join(stage.nodes)}" if stage.nodes else ""
        jobs += f" ({stage.reason})" if stage.reason and stage.state == "waiting" else ""
        lines.append(
            f"{stage.round:>5}  {stage.stage:<20} {stage.state:<11} {work:>9} {stage.tasks_running or '':>8}"
            f" {stage.tasks_waiting or '':>8}  {stage.attempts or '':>5}  {jobs}".rstrip()
        )
    lines += [line for stage in shown.stages if stage.state == "running" for line in _in_hand(root, stage)]
    errors = [stage for stage in shown.stages if stage.last_error and stage.state != "done"]
    if errors:
        lines += ["", "last errors:"]
        lines += [_error(root, stage) for stage in errors]
    return "\n".join(lines)


def _in_hand(root: Path, stage: StageOverview) -> list[str]:
    """How far the tasks of a stage are with the shards in their hands, as they said in the last seconds."""
    folder = Workspace(root).stage_dir(stage.round, stage.stage)
    done = total = tasks = 0
    for token in read_listing(leases_of(folder)).holders.values():
        try:
            said = atomic.read_json(progress_path(folder, token))
        except FileNotFoundError:
            continue
        done, total, tasks = done + said["done"], total + said["total"], tasks + 1
    told = f"  round {stage.round} {stage.stage}: {done} of {total} in the shards under way, {tasks} tasks"
    return [told] if tasks else []


def _error(root: Path, stage: StageOverview) -> str:
    log = f"\n      log: {root / stage.log}" if stage.log else ""
    return f"  round {stage.round} {stage.stage}: {stage.last_error}{log}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 when there is no run."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.status", description="Show how a run stands. Changes nothing."
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--json", action="store_true", help="as JSON, for scripts")
    parser.add_argument("--watch", action="store_true", help=f"again every {WATCH_EVERY_S:.0f} s until the run ends")
    arguments = parser.parse_args(argv)
    try:
        run = Run.load(arguments.workspace)
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    while True:
        reader = Reader(run)
        shown = overview.build(look(run, reader))
        if arguments.json:
            print(json.dumps(overview.to_plain(shown), indent=2))
        else:
            if arguments.watch and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")
            print(table(run.ws.root, shown))
            if reader.note:
                print(reader.note)
        if not arguments.watch or shown.status in ("finished", "stopped"):
            return 0
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    sys.exit(main())
