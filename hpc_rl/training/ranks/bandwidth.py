"""How fast ranks add up a tensor: one number that shows a slow network, or one that was not used at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
"""Size of the tensor: what gradients are sent in, and little enough for a CPU."""
TIMES = 3
_LONG = timedelta(hours=1)


def measure(ranks: Sequence[int] | None, timeout_s: float) -> float:
    """Bus bandwidth of an all-reduce among some ranks, in bytes per second; all of these must call it.

    That is 2 (n − 1) / n · bytes / seconds, which does not depend on the number of ranks n where the slowest link is
    what counts (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).

    Parameters
    ----------
    ranks
        None: all of them.
    timeout_s
        For each of two halves: finding each other, and adding up.

    Raises
    ------
    RuntimeError
        When one of them cannot be reached; not for certain when a rank hangs, and then it may never return.
    """
    limit = timedelta(seconds=timeout_s)
    group = None
    if ranks is not None:
        # NCCL would end the whole process at the group's own time limit; `wait` below ends the wait
        creation = limit if dist.get_backend() == "gloo" else _LONG
        group = dist.new_group(list(ranks), timeout=creation, use_local_synchronization=True)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.ones(BYTES[device] // 4, dtype=torch.float32, device=device)
    size = dist.get_world_size(group)
    _add_up(data, group, limit)  # connects
    if float(data[0]) != size or float(data[-1]) != size:
        raise RuntimeError(f"ones added up among {size} ranks gave {float(data[0])} and {float(data[-1])}")
    began = time.perf_counter()
    for _ in range(TIMES):
        _add_up(data, group, limit)
    seconds = (time.perf_counter() - began) / TIMES
    if group is not None:
        dist.destroy_process_group(group)
    return 2 * (size - 1) / size * BYTES[device] / seconds


def _add_up(data: torch.Tensor, group: dist.ProcessGroup | None, limit: timedelta) -> None:
    work = dist.all_reduce(data, group=group, async_op=True)
    assert work is not None
    work.wait(limit)
    if data.is_cuda:
        torch.cuda.synchronize()
