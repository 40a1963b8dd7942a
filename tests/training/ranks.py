"""Programs for rank processes: `python -m tests.training.ranks NAME --workspace W --round R`. Not a test module."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hpc_rl.orchestrate.job import parse_arguments


def meet(folder: Path) -> int:
    """Find the others, talk, part."""
    from hpc_rl.training.distributed import all_gather_objects, broadcast_object, process_group

    with process_group(folder, patience_s=40) as world:
        everyone = all_gather_objects({"rank": world.rank, "pid": os.getpid()})
        print("HEARD", [one["rank"] for one in everyone], broadcast_object(f"from {world.rank}"), flush=True)
    return 0


def hang(folder: Path) -> int:
    """Rank 0 waits in a collective for a rank that never comes to it."""
    from hpc_rl.training.distributed import broadcast_object, process_group
    from hpc_rl.training.leaving import Leaving

    with Leaving(grace_s=1.0), process_group(folder, patience_s=40) as world:
        print("TOGETHER", flush=True)
        if world.is_main:
            broadcast_object(None, source=1)
        time.sleep(600)
    return 0


def killed_while_saving(argv: list[str]) -> int:
    """Train, but die as by `kill -9` when the second checkpoint is about to be declared whole."""
    from hpc_rl.training.checkpoints import Checkpoints
    from jobs import train

    seal, count = Checkpoints.seal, 0

    def dying_seal(self: Checkpoints, folder: Path, keep: int) -> None:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(self, folder, keep)

    Checkpoints.seal = dying_seal  # type: ignore[method-assign]
    return train.main(argv)


if __name__ == "__main__":
    name, rest = sys.argv[1], sys.argv[2:]
    if name == "killed_while_saving":
        sys.exit(killed_while_saving(rest))
    sys.exit({"meet": meet, "hang": hang}[name](parse_arguments("train", rest).workspace))
