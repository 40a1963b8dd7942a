"""`python -m hpc_rl.report WORKSPACE`: what the run achieved and what it cost, as a page of text or as JSON."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc_rl.orchestrate.reconcile import NoRun, Run
from hpc_rl.reporting.gather import gather
from hpc_rl.reporting.plain import to_plain
from hpc_rl.reporting.text import text
from hpc_rl.run import atomic

NAMES = ("report.json", "report.txt")
"""What a run that has ended has in its workspace."""


def write(run: Run) -> str:
    """Put the report into the run's workspace; returns its text.

    Where the disk is full the run has ended nevertheless: the text says that the files are not there.
    """
    report = gather(run)
    page = text(report)
    try:
        for name, content in zip(NAMES, (atomic.to_json(to_plain(report)), page + "\n"), strict=True):
            atomic.write_text(run.ws.root / name, content)
    except OSError as error:
        return f"{page}\n\n{' and '.join(NAMES)} could not be written to {run.ws.root}: {error}"
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when parts of the run could not be read (the others are reported), 2 when there is no run."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.report",
        description="Numbers of each round, duration, cost by stage, what failed, storage, and what sampling achieved.",
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--json", action="store_true", help="as JSON, for scripts")
    arguments = parser.parse_args(argv)
    try:
        report = gather(Run.load(arguments.workspace))
    except NoRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(to_plain(report), indent=2) if arguments.json else text(report))
    for line in report.damaged:
        print(f"could not be read: {line}", file=sys.stderr)
    return 1 if report.damaged else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    sys.exit(main())
