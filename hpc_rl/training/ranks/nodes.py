"""Work that one rank of each node does for the others of its node."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hpc_rl.training.ranks.distributed import all_gather_objects

T = TypeVar("T")


def once_per_node(rank: int, work: Callable[[], T]) -> T:
    """What `work` returns on the first rank of this rank's node. All ranks must call it.

    What it raises on any node (OSError, RuntimeError, ValueError) is raised on all ranks, so that each says what is
    wrong and none waits for one that has left. Ranks in containers of their own, which do not see each other's files,
    are nodes of their own.
    """
    here = f"{socket.gethostname()} {Path('/proc/self/ns/mnt').readlink()}"
    nodes = all_gather_objects(here)
    leader = nodes.index(here)
    result: T | Exception | None = None
    if rank == leader:
        try:
            result = work()
        except (OSError, RuntimeError, ValueError) as error:  # raised below, on all ranks
            result = error
    results = all_gather_objects(result)
    for other in results:
        if isinstance(other, Exception):
            raise other
    found = results[leader]
    assert found is not None and not isinstance(found, Exception)
    return found
