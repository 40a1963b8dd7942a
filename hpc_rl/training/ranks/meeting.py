"""How the ranks of a job find each other, and who did not come.

Rank 0 binds a port first and publishes it afterwards in the stage's folder; the others read it there. No port is ever
computed from a job id (two jobs on one node would collide), and no port can be lost between choosing and binding it.
Then they take counsel over the store that listens there, which needs neither NCCL nor gloo: all ranks say something,
rank 0 judges, and all hear its verdict, so that all logs say the same.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from hpc_rl.cluster.rendezvous import rank_environment, tasks_by_host
from hpc_rl.run import atomic
from hpc_rl.services.address import Address, UnroutableHost, bind, choose_address
from hpc_rl.training.ranks import versions

if TYPE_CHECKING:
    from hpc_rl.training.ranks.distributed import World

log = logging.getLogger(__name__)

CONNECT_S = 5.0
POLL_S = 0.1
HEARING_S = 10.0
"""How much longer than rank 0 the others wait, and how long it stays for all to hear its verdict."""

_NONCE = "hpc_rl/nonce"


class MeetingFailed(RuntimeError):
    """The ranks did not find each other, or cannot talk; the message names the nodes. It may work on others."""


class VersionsDiffer(RuntimeError):
    """Nodes run different software; the message says which and what."""


@dataclass(frozen=True)
class Met:
    """A meeting to which all ranks have come: its store, and the node of each rank."""

    store: TCPStore
    nodes: tuple[str, ...]


def meet(world: World, path: Path, interface: str | None, within_s: float) -> Met:
    """Bring all ranks together; all must call it.

    Parameters
    ----------
    path
        The file in which rank 0 publishes its address, in a folder that all ranks see.
    interface
        `cluster.network_interface`.
    within_s
        How long ranks wait for each other.

    Raises
    ------
    MeetingFailed
        When a rank does not come, or rank 0's address cannot be reached.
    VersionsDiffer
        When nodes run different software.
    """
    one_host = world.size == world.local_size
    path.parent.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        store = _host(world, path, choose_address(None, interface, in_allocation=not one_host))
    else:
        store = _join(world, path, time.monotonic() + within_s)
    until = time.monotonic() + within_s
    if not one_host and not interface:
        _check_own_address(str(os.environ["MASTER_ADDR"]))

    def judge(said: Sequence[Any]) -> dict[str, Any]:
        nodes = [one and one["node"] for one in said]
        if None in nodes:
            return {"missing": f"{_missing(nodes)} did not come to {path} within {within_s:.0f} s"}
        return {"nodes": nodes, "differences": versions.differences(nodes, [one["versions"] for one in said])}

    verdict = consult(store, world, "came", {"node": node_name(), "versions": versions.here()}, judge, until)
    if "missing" in verdict:
        raise MeetingFailed(f"{verdict['missing']}; see what the logs of these say")
    differ = dict(verdict["differences"])
    for name in versions.MAY_DIFFER:
        if name in differ:
            log.warning("not all nodes are alike: %s", differ.pop(name))
    if differ:
        raise VersionsDiffer(
            f"nodes run different software: {'; '.join(differ.values())}. All need the same: look at the environment "
            "of the training stage (stages.NAME.python, setup, container) on these nodes"
        )
    return Met(store, tuple(verdict["nodes"]))


def consult(
    store: Store, world: World, topic: str, mine: Any, judge: Callable[[Sequence[Any]], Any], until: float
) -> Any:
    """Every rank says what it has to say (`mine`, plain JSON), rank 0 judges, and all ranks get its verdict.

    Parameters
    ----------
    topic
        Used once for each store.
    judge
        Called on rank 0 with what each rank said; None of one that had said nothing by then.
    until
        How long rank 0 waits for the others (`time.monotonic`); these wait `HEARING_S` longer for its verdict.

    Raises
    ------
    MeetingFailed
        When no verdict of rank 0 comes.
    """
    said, verdict, heard = (f"hpc_rl/{topic}/{what}" for what in ("said", "verdict", "heard"))
    try:
        store.set(f"{said}/{world.rank}", json.dumps(mine))
        came = store.add(said, 1)
        if not world.is_main:
            while not store.check([verdict]):
                if time.monotonic() > until + HEARING_S:
                    raise MeetingFailed(f"{_rank_0()} says nothing any more; see its log")
                time.sleep(POLL_S)
            found = json.loads(store.get(verdict))
            store.add(heard, 1)
            return found
        while came < world.size and time.monotonic() < until:
            time.sleep(POLL_S)
            came = store.add(said, 0)
        keys = [f"{said}/{rank}" for rank in range(world.size)]
        there = [came == world.size or store.check([key]) for key in keys]
        found = judge([json.loads(store.get(key)) if one else None for key, one in zip(keys, there, strict=True)])
        store.set(verdict, json.dumps(found))
        leave = time.monotonic() + HEARING_S  # the store goes with this process
        while store.add(heard, 0) < came - 1 and time.monotonic() < leave:
            time.sleep(POLL_S)
        return json.loads(json.dumps(found))
    except DistError as error:
        raise MeetingFailed(f"{_rank_0()} is gone ({str(error).splitlines()[0]}); see its log") from error


def node_name() -> str:
    """This node's name: Slurm's, which lists of nodes have, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _rank_0() -> str:
    head = rank_environment(os.environ)["HPC_RL_NODELIST_HEAD"]
    return f"rank 0 (on {head}, the first node)" if head else "rank 0"


def _missing(nodes: Sequence[str | None]) -> str:
    """Who did not come: nodes where the scheduler has said how many ranks each has, and the ranks."""
    ranks = [rank for rank, node in enumerate(nodes) if node is None]
    came = Counter(nodes)
    short = {node: tasks - came[node] for node, tasks in tasks_by_host(os.environ).items() if tasks > came[node]}
    listed = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:16]))}{', …' * (len(ranks) > 16)}"
    if sum(short.values()) != len(ranks):
        return f"{listed} (of {len(nodes)})"
    return f"{_of_nodes(short)} ({listed} of {len(nodes)})"


def _of_nodes(short: Mapping[str, int]) -> str:
    return ", ".join(f"{count} rank{'s' * (count > 1)} of {node}" for node, count in short.items())


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
    said = {"host": address.published, "port": port, "nonce": nonce, "world_size": world.size}
    atomic.write_json(path, said, private=True)  # who reaches the store can make ranks run code: objects are pickles
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
        f"rank {world.rank} on {node_name()} did not find {_rank_0()}: {problem}. Did it start? If it published an "
        "address that this node cannot reach, set cluster.network_interface (e.g. ib0)."
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
