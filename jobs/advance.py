"""Job body `advance`: reconcile from inside the cluster. It ends each round and submits what comes next."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_rl import report
from hpc_rl.cluster.choose import make_executor
from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.orchestrate.decide import Policy
from hpc_rl.orchestrate.job import parse_arguments
from hpc_rl.orchestrate.reconcile import Run, RunBusy, reconcile
from hpc_rl.run.code import source_root


def say(line: str) -> None:
    """One line into the job's log."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the queue is in line with what the run needs, 1 when the run had to stop.

    `EXIT_BLOCKED` when another process reconciles it: then that one submits what is missing, or the next launch.
    """
    arguments = parse_arguments("advance", argv)
    run = Run.load(Path(arguments.workspace))
    policy = Policy.of(run.config.run)
    executor, me = make_executor(run.config, "slurm"), os.environ.get("HPC_RL_ATTEMPT", "")
    try:  # new jobs import the code that this one runs on: the snapshot of the last launch
        result = reconcile(run, executor, source_root(), policy, me=me, say=say)
    except RunBusy as error:
        say(str(error))
        return EXIT_BLOCKED
    for note in result.notes:
        say(note)
    say(f"the run is {result.decision.status}. {result.decision.reason}")
    if result.decision.status in ("finished", "stopped"):
        report.write(run)
    return 1 if result.decision.status == "stopped" else 0


if __name__ == "__main__":
    sys.exit(main())
