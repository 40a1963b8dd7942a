"""Before anything heavy is loaded: every rank talks with every other, and where one cannot, its node is named.

Ranks add up a tensor inside each node, then with the next node (first even pairs, then odd ones), then all together. A
node that fails with both of its neighbours is at fault, and so is the first or last one when its only neighbour talks
with another; else, where only one pair fails, it is what lies between. Who hangs inside a library cannot raise
anything: a watch calls the roll after a while and ends the process.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch.distributed import Store  # type: ignore[attr-defined]

from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.training.ranks import bandwidth
from hpc_rl.training.ranks.meeting import HEARING_S, MeetingFailed, Met, consult

if TYPE_CHECKING:
    from hpc_rl.training.ranks.distributed import World

log = logging.getLogger(__name__)

ROLL_CALL_S = 5.0
"""How long a rank may take to say that it is there."""
ALL = "all ranks"
JOINING = "joining"


@dataclass(frozen=True)
class Talk:
    """Ranks that talk with each other alone, and the nodes that they are on."""

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"inside {self.nodes[0]}" if len(self.nodes) == 1 else f"between {' and '.join(self.nodes)}"


def talks(nodes: Sequence[str]) -> list[list[Talk]]:
    """What is talked before all ranks talk together: talks of one list take place at the same time.

    Parameters
    ----------
    nodes
        The node of each rank.
    """
    names = list(dict.fromkeys(nodes))

    def of(*some: str) -> Talk:
        return Talk(tuple(rank for rank, node in enumerate(nodes) if node in some), some)

    pairs = [of(*pair) for pair in pairwise(names)]
    turns = [[of(name) for name in names], pairs[::2], pairs[1::2]]
    return [found for turn in turns if (found := [talk for talk in turn if 1 < len(talk.ranks) < len(nodes)])]


def check(world: World, met: Met, join: Callable[[], None], within_s: float) -> dict[str, Any]:
    """Join the process group and let all ranks talk; numbers for the log and the manifest. All ranks must call it.

    Parameters
    ----------
    join
        Makes the process group.
    within_s
        After this long the process is ended, if need be from outside of the library in which it hangs.

    Raises
    ------
    MeetingFailed
        When ranks cannot talk with each other; the message names the nodes.
    """
    began = time.monotonic()
    turns = talks(met.nodes)
    each_s = within_s / (len(turns) + 2)
    speeds: dict[str, float] = {}
    with _watch(world, met, within_s) as at:
        at(JOINING)
        try:
            join()
        except RuntimeError as error:
            raise MeetingFailed(f"the ranks cannot be joined: {_first_line(error)}") from error
        failed: dict[str, str] = {}
        for talk in (talk for turn in turns for talk in turn if world.rank in talk.ranks):
            at(talk.name)
            try:
                speeds[talk.name] = bandwidth.measure(talk.ranks, each_s)
            except RuntimeError as error:
                failed[talk.name] = _first_line(error)
        at(ALL)
        until = time.monotonic() + within_s
        verdict = consult(met.store, world, "talked", failed, lambda said: fault(met.nodes, said), until)
        if verdict:
            raise MeetingFailed(verdict)
        try:
            speeds[ALL] = bandwidth.measure(None, each_s)
        except RuntimeError as error:
            raise MeetingFailed(f"pairs of nodes can talk, all ranks together cannot: {_first_line(error)}") from error
    for name, speed in speeds.items():
        log.info("bandwidth %s: %.2f GB/s", name, speed / 1e9)
    return {"seconds": round(time.monotonic() - began, 2), "bytes_per_s": {k: round(v) for k, v in speeds.items()}}


def fault(nodes: Sequence[str], said: Sequence[Mapping[str, str] | None]) -> str:
    """Which node is at fault, or what lies between which nodes; "" where every talk went well.

    Parameters
    ----------
    nodes
        The node of each rank.
    said
        By rank the names of talks that failed, and why; None of a rank that says nothing any more.
    """
    silent = [rank for rank, one in enumerate(said) if one is None]
    if silent:
        return f"{_places(nodes, silent)} hang in the preflight"
    failed = {name: why for one in said for name, why in (one or {}).items()}
    if not failed:
        return ""
    all_talks = [talk for turn in talks(nodes) for talk in turn]
    bad = [talk for talk in all_talks if talk.name in failed]
    alone = [talk.nodes[0] for talk in bad if len(talk.nodes) == 1]
    if alone:
        return f"ranks inside {', '.join(alone)} cannot talk: {failed[f'inside {alone[0]}']}"
    pairs = {
        node: [talk for talk in all_talks if node in talk.nodes and len(talk.nodes) == 2]
        for node in dict.fromkeys(nodes)
    }
    well = {node for node, own in pairs.items() if any(talk not in bad for talk in own)}
    guilty = [node for node, own in pairs.items() if len(own) == 2 and node not in well]
    why = failed[bad[0].name]
    if guilty:
        return f"{', '.join(guilty)} cannot talk with either of its neighbours: {why}"
    for node, own in pairs.items():  # the first and the last node have one neighbour only
        if len(own) == 1 and bad == own:
            (other,) = set(own[0].nodes) - {node}
            if other in well:
                return f"{node} cannot talk with {other}, which talks well with its other neighbour: {why}"
    links = ", ".join(f"{talk.nodes[0]} and {talk.nodes[1]}" for talk in bad)
    return f"{links} cannot talk with each other, and no other pair tells which of them is at fault: {why}"


def behind(nodes: Sequence[str], stages: Sequence[str | None], order: Sequence[str]) -> str:
    """Who holds the others up, at the roll call: who does not answer; else who is at the earliest stage.

    Parameters
    ----------
    nodes, stages
        Of each rank its node, and where it is; None of one that did not answer.
    order
        All stages, the earliest first.
    """
    silent = [rank for rank, stage in enumerate(stages) if stage is None]
    if silent:
        return f"{_places(nodes, silent)} hang: they do not answer"
    known = [stage for stage in stages if stage is not None]
    earliest = min(known, key=order.index)
    stuck = [rank for rank, stage in enumerate(known) if stage == earliest]
    return f"{_places(nodes, stuck)} do not get on: {earliest}"


def _places(nodes: Sequence[str], ranks: Sequence[int]) -> str:
    of: dict[str, list[str]] = {}
    for rank in ranks:
        of.setdefault(nodes[rank], []).append(str(rank))
    return ", ".join(f"{node} (rank{'s' * (len(own) > 1)} {', '.join(own)})" for node, own in of.items())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def _watch(world: World, met: Met, within_s: float) -> Iterator[Callable[[str], None]]:
    """End this process, and name the node at fault, when the block lasts longer; gives what notes where it is."""
    stage, over = "", threading.Event()
    order = ["", JOINING, *(talk.name for turn in talks(met.nodes) for talk in turn), ALL]
    # a connection of its own: the main thread may be waiting in the other
    store: Store = met.store.clone()  # type: ignore[attr-defined]
    says: list[str] = []

    def call_the_roll() -> None:
        until = time.monotonic() + ROLL_CALL_S
        try:
            says.append(consult(store, world, "roll", stage, lambda said: behind(met.nodes, said, order), until))
        except MeetingFailed as error:
            says.append(str(error))

    def wait() -> None:
        if over.wait(within_s):
            return
        caller = threading.Thread(target=call_the_roll, daemon=True)
        caller.start()
        caller.join(2 * (ROLL_CALL_S + HEARING_S))
        if over.is_set():
            return
        said = says[0] if says else f"rank 0 on {met.nodes[0]} hangs: its store does not answer"
        log.error("not all ranks could talk within %.0f s: %s", within_s, said)
        logging.shutdown()
        os._exit(EXIT_BLOCKED)

    def at(now: str) -> None:
        nonlocal stage
        stage = now

    threading.Thread(target=wait, name="preflight", daemon=True).start()
    try:
        yield at
    finally:
        over.set()
