"""What a task knows of its stage's shards: which are done, which are free, which are in whose hands. It may be old.

Nothing is listed before the task meets another one: what is not done is taken for free until then.
"""

from __future__ import annotations

import os
import random
import time
from bisect import bisect
from collections.abc import Container, Sequence
from pathlib import Path

from hpc_rl.run import manifest
from hpc_rl.run.presence import Presence
from hpc_rl.run.shard_leases import Claimed, Hearts, Listing, read_listing
from hpc_rl.run.workspace import Workspace

ENOUGH = 32
"""When so many other tasks are known to live, the rest is taken for alive: no task looks at all of a thousand."""


class Board:
    """The state of a stage's shards, as of the last looks.

    Parameters
    ----------
    ws, round, stage, shards
        The stage.
    leases
        The folder of its leases.
    presence
        This task, as others see it.
    done
        Shards that were done when the job began, None to look now.

    Attributes
    ----------
    done
        Shards with a manifest.
    listing
        The leases.
    free
        Shards that may be claimed, in order.
    others
        Undone shards in other hands, with the holders' tokens.
    missed
        Shard → a generation that somebody else has, whatever an old listing says.
    looked, took_s
        When the last look ended (`time.monotonic`), and how long it took.
    """

    def __init__(
        self,
        ws: Workspace,
        round: int,
        stage: str,
        shards: int,
        leases: Path,
        presence: Presence,
        done: frozenset[int] | None,
    ) -> None:
        self._ws, self._round, self._stage, self._shards = ws, round, stage, range(shards)
        self._folder, self._presence = leases, presence
        self.hearts = Hearts(leases, presence.ttl_s, presence.now)
        self.done = self._read_done() if done is None else set(done)
        self.listing = Listing()
        self.free: list[int] = []
        self.others: dict[int, str] = {}
        self.missed: dict[int, int] = {}
        self.looked, self.took_s = time.monotonic(), 0.0
        self._place = 0
        self._listed: float | None = None
        self._set_free([index for index in self._shards if index not in self.done])

    @property
    def left(self) -> int:
        """How many shards had no manifest."""
        return len(self._shards) - len(self.done)

    def pick(self, anywhere: bool) -> int:
        """Remove one of `free`: the one after the last picked, or anyone."""
        if anywhere or self._place >= len(self.free):
            self._place = random.randrange(len(self.free))
        return self.free.pop(self._place)  # the next one is at the same place now

    def _set_free(self, free: list[int]) -> None:
        self.free, self._place = free, len(free)

    def holder_of(self, claimed: Claimed) -> str | None:
        """The holder of a lease unless it has left."""
        return self.listing.holders.get(claimed.inode)

    def peers(self) -> int:
        """How many tasks live, ours included. The files of dead ones that are met are removed.

        Every task asks those whose tokens follow its own first, so that a thousand do not all ask the same ones.
        """
        others = sorted(token for token in self.listing.holders.values() if not self._presence.owns(token))
        place = bisect(others, self._presence.token)
        living = 0
        for token in others[place:] + others[:place]:
            living += self._is_alive(token)
            if living == ENOUGH:
                return 1 + sum(not self._presence.owns(token) for token in self.listing.holders.values())
        return 1 + living

    def is_copied(self, claimed: Claimed) -> bool:
        """True when a shard has a copy whose maker has not left."""
        return claimed.copy_inode in self.listing.holders

    def list_leases(self, mine: Container[int]) -> None:
        """List the leases; what may be claimed then is what nobody has ever claimed."""
        self._listed, self.listing = time.monotonic(), read_listing(self._folder)
        claimed: Sequence[Container[int]] = (self.listing.shards, self.missed, self.done, mine)
        self._set_free([index for index in self._shards if not any(index in known for known in claimed)])

    def list_leases_once(self, mine: Container[int]) -> None:
        """List the leases if that was never done."""
        if self._listed is None:
            self.list_leases(mine)

    def look(self, mine: Container[int], fresh_s: float = 0.0) -> None:
        """List manifests and leases: what may be claimed is also what a holder that is gone has left undone.

        While there are shards that nobody ever claimed, holders are taken for alive: else all tasks would ask all.
        A listing of the leases younger than `fresh_s` is not made again.
        """
        began = time.monotonic()
        self.done = self._read_done()
        if self.left and (self._listed is None or began - self._listed > fresh_s):
            self.list_leases(mine)
        asked = set() if self.free else self._holders_of_undone()
        dead = {token for token in asked if not self._is_alive(token)}
        free: list[int] = []
        self.others = {}
        for index in self._shards:
            known = self.listing.shards.get(index)
            seen = 0 if known is None else known.generation
            if index in self.done or index in mine or seen < self.missed.get(index, 0):
                continue
            holder = None if known is None else next((t for t in self._workers(known) if t not in dead), None)
            if holder is None:
                free.append(index)
            else:
                self.others[index] = holder
        self._set_free(free)
        self.looked, self.took_s = time.monotonic(), time.monotonic() - began

    def peek(self) -> None:
        """Whether undone shards in other hands are done by now; one that is not ends it. Cheap with many shards."""
        folder = os.open(self._ws.stage_dir(self._round, self._stage), os.O_RDONLY | os.O_DIRECTORY)
        try:  # opened anew: NFS clients ask the server again then, and do not go on believing that a file is missing
            while self.others:
                index = next(iter(self.others))
                if not manifest.manifest_path(self._ws, self._round, self._stage, index).exists():
                    return
                self.done.add(index)
                del self.others[index]
        finally:
            os.close(folder)

    def _read_done(self) -> set[int]:
        return set(manifest.done_shards(self._ws, self._round, self._stage).intersection(self._shards))

    def _workers(self, claimed: Claimed) -> list[str]:
        """Other tasks that are at a shard: its holder, and who makes a copy."""
        inodes = (claimed.inode, claimed.copy_inode)
        tokens = [self.listing.holders.get(inode) for inode in inodes if inode is not None]
        return [token for token in tokens if token is not None and not self._presence.owns(token)]

    def _holders_of_undone(self) -> set[str]:
        undone = (known for index, known in self.listing.shards.items() if index not in self.done)
        return {token for known in undone for token in self._workers(known)}

    def _is_alive(self, token: str) -> bool:
        """Whether a holder lives. The file of a dead one is removed: everybody sees then that its leases are free."""
        alive = self.hearts.beats(token)
        if not alive:
            self.hearts.bury(token)
            self.listing.holders = {inode: other for inode, other in self.listing.holders.items() if other != token}
        return alive
