"""Ranks of a training job: who we are, how we find each other, how objects go round. One process is the simplest case.

Rank 0 binds a port first and publishes it afterwards in the stage's folder; the others read it there. No port is ever
computed from a job id (two jobs on one node would collide), and no port can be lost between choosing and binding it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from hpc_rl.cluster.rendezvous import rank_environment
from hpc_rl.run import atomic
from hpc_rl.services.address import LOOPBACK, Address, UnroutableHost, bind, choose_address
from hpc_rl.training.leaving import EXIT_GRACE_S, exit_anyway_after

log = logging.getLogger(__name__)

T = TypeVar("T")

MEETING_PATIENCE_S = 600.0
CONNECT_S = 5.0
POLL_S = 0.1

_NONCE = "hpc_rl/nonce"


class MeetingFailed(RuntimeError):
    """The ranks did not find each other; the message says where they looked."""


@dataclass(frozen=True)
class World:
    """A process's place in its job: `rank` of `size` processes in all, `local_rank` of `local_size` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the rank that claims, saves and reports."""
        return self.rank == 0


def get_world_info() -> World:
    """This process's place, from RANK, WORLD_SIZE and so on, or Slurm's variables; rank 0 of 1 without any (L14)."""
    found = rank_environment(os.environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return World(*(int(found[name]) for name in names))


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
    timeout_s: float = 1800.0,
    patience_s: float = MEETING_PATIENCE_S,
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
    timeout_s
        How long a collective may wait for other ranks.
    patience_s
        How long ranks wait for each other to start.

    Raises
    ------
    MeetingFailed
        When a rank does not come, or rank 0's address cannot be reached.
    """
    world = get_world_info()
    _tell_libraries(world, interface, distributed=world.size > 1 or deepspeed)
    if world.size == 1 and not deepspeed:
        yield world
        return
    backend = choose_backend(backend)
    if backend == "nccl":
        torch.cuda.set_device(_device_index(world))
    published = None
    if world.size == 1:
        store: Store = HashStore()
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT="0")
    else:
        published = folder / rendezvous_name(os.environ)
        store = _meet(world, published, interface, patience_s)
    dist.init_process_group(
        backend,
        store=PrefixStore("hpc_rl", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_s),
    )
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


def _meet(world: World, path: Path, interface: str | None, patience_s: float) -> TCPStore:
    deadline = time.monotonic() + patience_s
    one_host = world.size == world.local_size
    path.parent.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        address = choose_address(None, interface, in_allocation=not one_host)
        store = _host(world, path, address)
    else:
        store = _join(world, path, deadline)
    if not one_host and not interface:
        _check_own_address(str(os.environ["MASTER_ADDR"]))
    store.add("hpc_rl/arrived", 1)
    while (arrived := store.add("hpc_rl/arrived", 0)) < world.size:
        if time.monotonic() > deadline:
            raise MeetingFailed(
                f"only {arrived} of {world.size} ranks came to {path} in {patience_s:.0f} s; see the others' logs"
            )
        time.sleep(POLL_S)
    return store


def _host(world: World, path: Path, address: Address) -> TCPStore:
    listening = bind(address.bind, 0)
    port = listening.getsockname()[1]
    store = TCPStore(
        address.published, port, world.size, True, timedelta(seconds=60), wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip
    nonce = secrets.token_hex(16)
    store.set(_NONCE, nonce)
    os.environ.update(MASTER_ADDR=address.published, MASTER_PORT=str(port))
    atomic.write_json(path, {"host": address.published, "port": port, "nonce": nonce, "world_size": world.size})
    return store


def _join(world: World, path: Path, deadline: float) -> TCPStore:
    """Connect to rank 0's store. A file left by a former rank 0 leads nowhere, or to a store with another nonce."""
    problem = f"{path} did not appear"
    while time.monotonic() < deadline:
        os.listdir(path.parent)  # makes NFS clients ask the server again
        try:
            found = atomic.read_json(path)
            if found["world_size"] != world.size:
                raise MeetingFailed(f"{path} is for {found['world_size']} ranks, but this is one of {world.size}")
            store = TCPStore(
                found["host"], found["port"], world.size, False, timedelta(seconds=CONNECT_S), wait_for_workers=False
            )
            if store.get(_NONCE).decode() == found["nonce"]:
                store.set_timeout(timedelta(seconds=60))
                os.environ.update(MASTER_ADDR=found["host"], MASTER_PORT=str(found["port"]))
                return store
            problem = f"another program answers at {found['host']}:{found['port']}"
        except FileNotFoundError:
            pass
        except DistError as error:
            problem = f"{found['host']}:{found['port']} does not answer ({str(error).splitlines()[0]})"
        time.sleep(POLL_S)
    raise MeetingFailed(
        f"rank {world.rank} did not find rank 0: {problem}. Did it start? If it published an address that this node "
        "cannot reach, set cluster.network_interface (e.g. ib0)."
    )


def _check_own_address(main_host: str) -> None:
    """Gloo gives other ranks the address that this host's name resolves to, which must not be a loopback address."""
    name = socket.gethostname()
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    ours, main = ({info[4][0] for info in socket.getaddrinfo(host, None)} for host in (name, main_host))
    if all(ipaddress.ip_address(a).is_loopback for a in ours) and not any(
        ipaddress.ip_address(a).is_loopback for a in main
    ):
        raise UnroutableHost(
            f"the host name {name!r} resolves to {', '.join(sorted(map(str, ours)))} only, which other nodes cannot "
            "reach; set cluster.network_interface (e.g. eth0 or ib0)"
        )
