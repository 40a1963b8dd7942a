"""Job bodies that die as by `kill -9`, and their launcher with them, where a file says so. Not a test module.

A folder has a file `ROUND-STAGE` for each death: at the worst moment, when a shard's outputs are there and its manifest
is not; of an array not the first shard's, of a training when its first checkpoint has just been sealed. The file is
renamed then, so nobody dies of it again. There are two ways to run:

- `python dying.py PYTHON -P -m MODULE ARGUMENTS` as `cluster.container`, which stands before the interpreter, with the
  folder in the variable `KILLS`: each body is a process of its own
- `python -m tests.jobs.dying CONFIG WORKSPACE FOLDER WORKSPACE FOLDER …`: for each, launch after launch until one ends
  otherwise. They are forks of a process that has imported what takes long; all bodies are in the launcher's own process
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KILLS = "HPC_RL_TEST_KILLS"
DONE = ".done"


ARRAYS = ("collect", "grade", "enhance")


def die(order: Path, *others: int) -> None:
    """Kill other processes and this one; once for each order."""
    try:
        order.rename(order.with_name(order.name + DONE))
    except FileNotFoundError:
        return
    for process in (*others, os.getpid()):
        os.kill(process, signal.SIGKILL)


def obey(kills: Path, *others: int) -> None:
    """Have this process, and others with it, die as the orders in `kills` say."""
    from hpc_rl.run import manifest

    write = manifest.write

    def dying_write(ws: Any, made: Any, *more: Any) -> bool:
        in_the_middle = made.stage not in ARRAYS or manifest.done_shards(ws, made.round, made.stage)
        if made.stage != "train" and in_the_middle:
            die(kills / f"{made.round}-{made.stage}", *others)
        return write(ws, made, *more)

    manifest.write = dying_write
    if "hpc_rl.training.checkpointing.checkpoints" in sys.modules:  # what trains has imported it
        obey_in_training(kills, *others)


def obey_in_training(kills: Path, *others: int) -> None:
    """The same for trainings, whose modules take long to import."""
    from hpc_rl.training.checkpointing.checkpoints import Checkpoints

    seal = Checkpoints.seal

    def dying_seal(self: Checkpoints, folder: Path, *more: Any) -> None:
        seal(self, folder, *more)
        round = next(part for part in folder.parts if part.startswith("round_"))
        die(kills / f"{int(round.removeprefix('round_'))}-train", *others)

    Checkpoints.seal = dying_seal  # type: ignore[method-assign]


def run_body(arguments: Sequence[str]) -> None:
    """`MODULE ARGUMENTS` in this process, which a launcher has started through an entry process."""
    module, *rest = arguments
    entry, kills = os.getppid(), Path(os.environ[KILLS])
    launcher = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    obey(kills, launcher, entry)
    if module == "jobs.train":
        obey_in_training(kills, launcher, entry)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def launch_all(config: str, plans: Sequence[str]) -> int:
    """Launch each of the runs until it ends; 0 when all have ended well."""
    import hpc_rl.engines.transformers_engine
    import hpc_rl.training.algorithms.dpo  # noqa: F401
    import jobs.train  # noqa: F401  all of these once, and not in each fork
    from hpc_rl import launch

    worst = 0
    for workspace, kills in zip(plans[::2], plans[1::2], strict=True):
        launches, code = 0, -signal.SIGKILL
        while code == -signal.SIGKILL:
            launches += 1
            child = os.fork()
            if child == 0:
                obey(Path(kills))
                os._exit(launch.main([config, "--workspace", workspace, "--executor", "debug"]))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"launches: {launches}", flush=True)
        worst = max(worst, abs(code))
    return worst


if __name__ == "__main__":
    if __package__:
        sys.exit(launch_all(sys.argv[1], sys.argv[2:]))
    del sys.path[0]  # as -P does
    run_body(sys.argv[4:])
