"""`python -m hpc_rl.cancel WORKSPACE`: cancel exactly this run's jobs and mark the run paused. Nothing done is lost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_rl.cluster.base import ExecutorError
from hpc_rl.cluster.choose import make_executor
from hpc_rl.orchestrate.reconcile import RECONCILE_LEASE, NoRun, Run, look
from hpc_rl.run.closed import keep_closed
from hpc_rl.run.lease import acquire_patiently
from hpc_rl.run.ledger import Ledger

PATIENCE_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 when there is no run or Slurm refuses."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.cancel",
        description="Cancel exactly this run's jobs and mark it paused. Launch again to go on.",
    )
    parser.add_argument("workspace", type=Path)
    arguments = parser.parse_args(argv)
    keep_closed()
    try:
        run = Run.load(arguments.workspace)
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # under the lease: an advance job that is just submitting would otherwise submit behind our back
    lease = acquire_patiently(run.ws.lease_folder, RECONCILE_LEASE, min(30.0, run.config.run.lease_ttl_s), PATIENCE_S)
    if lease is None:
        print(f"error: somebody has been reconciling the run for {PATIENCE_S:.0f} s; try again", file=sys.stderr)
        return 2
    with lease:
        ledger = Ledger(run.ws)
        history = ledger.history()
        if not history.paused:
            ledger.append("paused", why="cancelled by the user")
        if not any(a.executor == "slurm" for a in history.attempts):
            print("the run is paused; a launcher that drives it here leaves within seconds")
            return 0
        try:
            executor = make_executor(run.config, "slurm")
            queue = look(run, executor, history).queue
            queued = {job.name for job in queue}
            executor.cancel([a.name for a in history.attempts if a.name in queued])
        except ExecutorError as error:
            print(f"error: {error}\nThe run is marked paused: its advance jobs will submit nothing.", file=sys.stderr)
            return 2
    ids = sorted({job.job_id.partition("_")[0] for job in queue})
    print(f"cancelled {len(ids)} jobs{': ' + ', '.join(ids) if ids else ''}. The run is paused; launch again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
