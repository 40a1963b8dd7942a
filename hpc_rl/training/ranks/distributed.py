"""Ranks of a training job: who we are, how we find each other, how objects go round. One process is the least."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from hpc_rl.cluster.rendezvous import rank_environment
from hpc_rl.services.address import LOOPBACK
from hpc_rl.training.ranks import preflight
from hpc_rl.training.ranks.leaving import EXIT_GRACE_S, exit_anyway_after
from hpc_rl.training.ranks.meeting import MeetingFailed, meet

log = logging.getLogger(__name__)

T = TypeVar("T")

ASK_EVERY_S = 2.0
_alone = itertools.count()  # the same on all ranks: they enter the blocks in the same order


@dataclass(frozen=True)
class World:
    """A process's place in its job: `rank` of `size` processes in all, `local_rank` of `local_size` on its node.

    `preflight` has what was measured when they met, for the manifest.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    preflight: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_main(self) -> bool:
        """True for the rank that claims, saves and reports."""
        return self.rank == 0


def get_world_info() -> World:
    """This process's place, from RANK, WORLD_SIZE and so on, or Slurm's variables; rank 0 of 1 without any (L14)."""
    found = rank_environment(os.environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(found[name]) for name in names)
    return World(rank, size, local_rank, local_size)


def all_gather_objects(value: T) -> list[T]:
    """Every rank's `value`, by rank; just ours where there is one process (L14). All ranks must call it."""
    if not _together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s `value`, on every rank (L14). All ranks must call it; what the others pass is ignored."""
    if not _together():
        return value
    box: list[Any] = [value if dist.get_rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    received: T = box[0]
    return received


def barrier() -> None:
    """Wait for all ranks."""
    if _together():
        dist.barrier()


@contextmanager
def rank_0_alone(what: str) -> Iterator[None]:
    """Work that rank 0 does in the block, as long as it takes; the other ranks leave the block when it is done.

    They ask rank 0's store again and again: a collective ends after a time, and a model that is written to a slow disk
    may take longer. All ranks must enter it.

    Parameters
    ----------
    what
        What rank 0 does, for the others' message.

    Raises
    ------
    MeetingFailed
        On the other ranks, when rank 0 fails in it, or is gone.
    """
    if not _together():
        yield
        return
    store, key = _get_default_store(), f"hpc_rl/alone/{next(_alone)}"
    if dist.get_rank() == 0:
        said = "failed"
        try:
            yield
            said = "done"
        finally:
            store.set(key, said)
        return
    yield
    pause_s = 0.05
    try:
        while not store.check([key]):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, ASK_EVERY_S)
        said = store.get(key).decode()
    except dist.DistError as error:
        raise MeetingFailed(f"rank 0 is gone while {what} ({str(error).splitlines()[0]}); see its log") from error
    if said != "done":
        raise MeetingFailed(f"rank 0 failed while {what}; see its log")


def _together() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def choose_backend(wanted: str) -> str:
    """`train.backend`, with auto resolved: nccl on GPUs, gloo on CPUs."""
    if wanted != "auto":
        return wanted
    return "nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def process_group(
    folder: Path,
    *,
    backend: str = "auto",
    interface: str | None = None,
    deepspeed: bool = False,
    fsdp: bool = False,
    timeout_s: float = 1800.0,
    preflight_s: float = 60.0,
) -> Iterator[World]:
    """Bring the ranks of this job together, and part at the end.

    Parameters
    ----------
    folder
        The stage's folder, which all ranks see: rank 0 publishes `rendezvous-<job>-<restart>.json` there.
    backend
        `train.backend`.
    interface
        `cluster.network_interface`; gloo and NCCL are told of it.
    deepspeed
        DeepSpeed will be used: it wants a process group even for one rank, and before the model is made.
    fsdp
        FSDP will be used, which also wants one.
    timeout_s
        How long a collective may wait for other ranks.
    preflight_s
        How long ranks wait for each other to start, and as long again until all have talked with each other.

    Raises
    ------
    MeetingFailed
        When a rank does not come, or ranks cannot talk with each other; the message names their nodes.
    VersionsDiffer
        When nodes run different software.
    """
    world = get_world_info()
    _tell_libraries(world, interface, distributed=world.size > 1 or deepspeed or fsdp)
    if world.size == 1 and not deepspeed and not fsdp:
        yield world
        return
    backend = choose_backend(backend)
    if backend == "nccl":
        torch.cuda.set_device(_device_index(world))
    published = None

    def join(store: Store) -> None:
        dist.init_process_group(
            backend,
            store=PrefixStore("hpc_rl", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s),
        )

    if world.size == 1:
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
        join(HashStore())
    else:
        published, began = folder / rendezvous_name(os.environ), time.monotonic()
        met = meet(world, published, interface, preflight_s)
        measured = {"meeting_s": round(time.monotonic() - began, 2)}
        world = replace(world, preflight=measured | preflight.check(world, met, lambda: join(met.store), preflight_s))
    if deepspeed:
        _init_deepspeed(backend)
    log.info("rank %d of %d on %s, %s", world.rank, world.size, socket.gethostname(), backend)
    try:
        yield world
    finally:
        if published is not None and world.is_main:
            published.unlink(missing_ok=True)
    # Only where all went well: a group with a dead member may never come apart, and the process ends anyway.
    with exit_anyway_after(EXIT_GRACE_S):
        barrier()
        dist.destroy_process_group()


def rendezvous_name(environ: dict[str, str] | os._Environ[str]) -> str:
    """Name of the file in which rank 0 publishes its address: unique to a job and to each time it was requeued."""
    found = rank_environment(environ)
    job = found["HPC_RL_JOB_ID"] or environ.get("TORCHELASTIC_RUN_ID", "") or "local"
    return f"rendezvous-{job}-{found['HPC_RL_RESTART']}.json"


def _tell_libraries(world: World, interface: str | None, distributed: bool) -> None:
    """Set the variables that accelerate, DeepSpeed, gloo and NCCL look at."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not distributed:  # else accelerate takes a job of one process for a distributed one
        for name in names[1:]:
            os.environ.pop(name, None)
        return
    values = (world.rank, world.size, _device_index(world), world.local_size)
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = interface


def _device_index(world: World) -> int:
    """Which of the visible GPUs is ours: 0 where Slurm shows each task only its own (--gpus-per-task)."""
    return 0 if torch.cuda.device_count() == 1 else world.local_rank


def _init_deepspeed(backend: str) -> None:
    import deepspeed

    if not torch.cuda.is_available():
        # Its shared-memory all-reduce for CPU inference is compiled for 40 s on first use, needs all ranks on one host,
        # and training never calls it. Set as a whole, since looking it up probes all operators with a compiler.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
