"""How all ranks make a checkpoint together: is there room, is every part on disk, is the whole readable.

What is found wrong is raised on all ranks alike, so that none waits for another one.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from hpc_rl.training.checkpointing.checkpoints import Checkpoints, sync_files
from hpc_rl.training.checkpointing.damage import sizes
from hpc_rl.training.errors import CheckpointFailed
from hpc_rl.training.ranks.distributed import all_gather_objects, barrier, broadcast_object

log = logging.getLogger(__name__)


class Sealing:
    """Makes checkpoints count. All ranks must call its methods.

    Parameters
    ----------
    checkpoints
        Where they are.
    is_main
        On rank 0, which declares them whole.
    patience_s
        How late a file of another host may become visible.
    for_host
        On one rank of each host at least, which forces to disk what all of its ranks have written.
    """

    def __init__(self, checkpoints: Checkpoints, is_main: bool, patience_s: float, for_host: bool = True) -> None:
        self._checkpoints, self._is_main, self._patience_s = checkpoints, is_main, patience_s
        self._for_host = for_host
        self._last_bytes = 0

    def expect(self, size: int) -> None:
        """Say how many bytes a checkpoint has, as that one had which was gone on from."""
        self._last_bytes = size

    def check_room(self) -> None:
        """Make sure that one as large as the last one fits before anything is written.

        A disk that is full to the last byte stops more than this training.

        Raises
        ------
        CheckpointFailed
            When it does not fit.
        """
        free = broadcast_object(shutil.disk_usage(self._checkpoints.own).free if self._is_main else 0)
        if free < self._last_bytes:
            raise CheckpointFailed(
                f"no room for a checkpoint of {_gb(self._last_bytes)} at {self._checkpoints.own}: {_gb(free)} are free"
            )

    def __call__(self, folder: Path) -> None:
        """Declare a checkpoint whole that all ranks have written.

        Raises
        ------
        CheckpointFailed
            When a part is not on disk or not readable; those before it are all there.
        """
        barrier()  # the other ranks of this host have written too
        problem = "; ".join(found for found in all_gather_objects(_sync(folder) if self._for_host else "") if found)
        # a host sees its own files at once, and those of others late
        seen = all_gather_objects(sizes(folder) if self._for_host else {})
        together: dict[str, int] = {}
        for listing in seen:
            together |= {name: max(size, together.get(name, 0)) for name, size in listing.items()}
        if self._is_main and not problem:
            try:
                self._checkpoints.seal(folder, together, self._patience_s)
            except (CheckpointFailed, OSError) as error:
                problem = str(error)
        # to be waited for also where all is well: a rank that leaves now would take rank 0 with it (srun
        # --kill-on-bad-exit)
        problem = broadcast_object(problem)
        if problem:
            raise CheckpointFailed(problem)
        self._last_bytes = sum(together.values())
        log.info("%s is whole, %s", folder, _gb(self._last_bytes))


def _sync(folder: Path) -> str:
    """Why what this host wrote is not on disk; '' when it is."""
    try:
        sync_files(folder)
    except OSError as error:
        return f"{folder} cannot be written: {error}"
    return ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
