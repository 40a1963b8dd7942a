"""Claims of a stage's shards: which are free, which are ours, which are in other hands. Cheap for the file system.

with job.claims() as claims:
    while (shard := claims.next()) is not None:
        ...
        shard.commit([path], made_from={...})

A shard that is done without trouble costs six metadata operations: the claim (one link), the output's creation
(`Shard.create`; a seventh if it is closed and opened again to be committed), and the manifest's creation, link, unlink
and the folder's fsync. Listings are shared by many claims: a task begins at a random free shard and goes on from there,
so that a thousand tasks that start at once go separate ways; where it meets another it jumps; having met as many as a
new listing costs, it lists again.

Two tasks can be at one shard: a copy made on purpose (`duplicate`), or the holder was frozen and taken for dead. The
first manifest stands (`hpc_rl.run.manifest`), the other's files are thrown away.

Safe to use from several threads, with one exception: `close` comes after the last commit.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hpc_rl.orchestrate.board import Board
from hpc_rl.orchestrate.progress_note import ProgressNote
from hpc_rl.orchestrate.shard import Shard, ShardLease
from hpc_rl.run.presence import Presence
from hpc_rl.run.shard_leases import copy_path, is_given_back, leases_of, progress_path, shard_lease_path

if TYPE_CHECKING:
    from hpc_rl.orchestrate.job import Job

POLL_FIRST_S, POLL_MOST_S = 0.1, 5.0
"""Pauses between two looks at shards in other hands, growing from the first to the most."""
POLL_SHARE = 0.1
"""The first pause is this part of what a shard took here, if that is longer: the others need about as long."""
LOOK_EVERY = 16
"""So many claims, times what a listing costs, are followed by a look, so that `left` and `free` do not grow too old."""
SHARE = 20
"""A look is followed by a pause of so many times what it took: a slow file system is asked less often."""
OVERTAKEN_EVERY_S, OVERTAKEN_AT_THE_END_S = 120.0, 5.0
"""Pauses between two looks at whether others have done what is ours. The longer one while shards are free: nobody makes
copies then, and whose heart stood still looks at once. The shorter one when none were free any more."""


class Claims:
    """The claims of this task; `Job.claims` makes them.

    Parameters
    ----------
    job
        The stage's job.
    done
        Shards that were done when the job began, None to look now.
    """

    def __init__(self, job: Job, done: frozenset[int] | None = None) -> None:
        self._job, self._folder = job, leases_of(job.folder)
        self._lock = threading.RLock()
        self._presence = Presence(self._folder, job.config.run.lease_ttl_s)
        self._descriptor: int | None = os.open(job.folder, os.O_RDONLY | os.O_DIRECTORY)
        shards = job.stage.shards
        self._board = Board(job.ws, job.round, job.stage.name, shards, self._folder, self._presence, done)
        self._mine: dict[int, Shard] = {}
        self._linked: set[tuple[int, int]] = set()  # shards and generations
        self._misses = self._claimed = 0  # since the last listing
        self._look_at = self._peek_at = self._pause_s = self._shard_took_s = 0.0
        self._overslept = 0
        self._note = ProgressNote(progress_path(job.folder, self.token))

    @property
    def token(self) -> str:
        """Unique to these claims; it begins the tokens of all of their shards."""
        return self._presence.token

    @property
    def descriptor(self) -> int | None:
        """The stage's folder, open."""
        return self._descriptor

    # taking

    def next(self) -> Shard | None:
        """A free shard, claimed now. None when all that is left is in other hands, or when nothing is left."""
        with self._lock:
            if self._claimed >= LOOK_EVERY * self._board.listing.operations:
                self._look()
            shard = self._claim_one()
            if shard is None and time.monotonic() >= self._look_at:
                self._look(fresh_s=min(POLL_MOST_S, self._shard_took_s))
                shard = self._claim_one()
                first_s = max(POLL_FIRST_S, POLL_SHARE * self._shard_took_s)
                self._pause_s = max(self._pause_s, first_s)
                self._wait(max(self._pause_s, SHARE * self._board.took_s))
            if shard is not None:
                self._pause_s = 0.0
            return shard

    @property
    def pause_s(self) -> float:
        """How long it makes no sense to ask `next` again, after it gave None."""
        return max(0.0, min(self._look_at, self._peek_at) - time.monotonic())

    def _wait(self, until_look_s: float) -> None:
        """Look no sooner than in so many seconds, and sooner at single shards."""
        now, chance = time.monotonic(), random.uniform(0.75, 1.25)  # not all tasks at once
        self._look_at = max(self._look_at, now + until_look_s * chance)
        self._peek_at = now + self._pause_s * chance
        self._pause_s = min(2 * self._pause_s, POLL_MOST_S)

    def _look(self, fresh_s: float = 0.0) -> None:
        self._misses = self._claimed = 0
        self._board.look(self._mine, fresh_s)

    def _claim_one(self) -> Shard | None:
        anywhere = False
        while self._board.free:
            if shard := self._take(self._board.pick(anywhere)):
                self._claimed += 1
                return shard
            anywhere = True
            if self._misses >= self._board.listing.operations:
                self._misses = self._claimed = 0
                self._board.list_leases(self._mine)
        return None

    def _take(self, index: int) -> Shard | None:
        known = self._board.listing.shards.get(index)
        generation = 0 if known is None else known.generation
        if known is not None:
            holder = self._board.holder_of(known)
            if holder is None or not self._presence.owns(holder):
                if not is_given_back(shard_lease_path(self._folder, index, generation), self._board.hearts):
                    return None
            elif (index, generation) not in self._linked:
                # an NFS server made the link that we asked for, and its answer was lost (link(2), BUGS)
                return self._hold(index, generation)
        generation += 1
        if not self._presence.link(shard_lease_path(self._folder, index, generation)):
            self._misses += 1
            self._board.missed[index] = generation
            return None
        shard = self._hold(index, generation)
        # whoever had it may have done it since we looked
        return shard if generation == 1 else self._unless_done(shard)

    def _hold(self, index: int, generation: int, copy: bool = False) -> Shard:
        path = copy_path(self._folder, index, generation) if copy else shard_lease_path(self._folder, index, generation)
        if not copy:
            self._linked.add((index, generation))
        shard = Shard(self._job, index, ShardLease(self, index, generation, copy, path))
        self._mine[index] = shard
        return shard

    def _unless_done(self, shard: Shard) -> Shard | None:
        if not shard.manifest_path.exists():
            return shard
        self._board.done.add(shard.index)
        del self._mine[shard.index]
        return None

    # what others do

    def duplicate(self) -> Shard | None:
        """A copy of a shard that another holder is still at: at most one copy of each. None when there is none.

        The holder with the most shards left is helped first. The copy of a task that is gone does not count; two that
        replace it at once make one too many. For bodies whose outputs have names of their own (`Shard.output`).
        """
        with self._lock:
            if time.monotonic() >= self._look_at:
                self._look()
            shards, others = self._board.listing.shards, self._board.others
            left = Counter(others.values())
            candidates = [i for i in others if i not in self._mine and not self._board.is_copied(shards[i])]
            random.shuffle(candidates)
            for index in sorted(candidates, key=lambda i: -left[others[i]]):
                generation = shards[index].generation
                copy = copy_path(self._folder, index, generation)
                if shards[index].copy_inode is not None:
                    copy.unlink(missing_ok=True)
                made = self._presence.link(copy)
                # whether it was made now or before: there is one from now on
                shards[index] = replace(shards[index], copy_inode=shards[index].inode)
                if made and (shard := self._unless_done(self._hold(index, generation, copy=True))):
                    return shard
            return None

    def all_done(self) -> bool:
        """True when every shard has its manifest. Cheap to poll: it looks now and then."""
        with self._lock:
            now = time.monotonic()
            if self._board.left and now >= self._look_at:
                self._look()
            elif self._board.left and now >= self._peek_at:
                self._board.peek()
                self._wait(0.0)
            return not self._board.left

    def left(self) -> int:
        """How many shards had no manifest at the last look."""
        with self._lock:
            return self._board.left

    def free(self) -> int:
        """How many shards nobody had at the last listing, less those that were claimed here since."""
        with self._lock:
            return len(self._board.free)

    def peers(self) -> int:
        """How many tasks of this stage live, of those at the last listing, ours included."""
        with self._lock:
            self._board.list_leases_once(self._mine)
            return self._board.peers()

    def overtaken(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those of `shards` that somebody else has committed or taken over meanwhile. Cheap to poll."""
        with self._lock:
            pause_s = OVERTAKEN_EVERY_S if self._board.free else OVERTAKEN_AT_THE_END_S
            if self._presence.overslept > self._overslept:
                self._overslept, pause_s = self._presence.overslept, 0.0
            if time.monotonic() - self._board.looked >= max(pause_s, SHARE * self._board.took_s):
                self._look()
            return [shard for shard in shards if self._is_overtaken(shard)]

    def _is_overtaken(self, shard: Shard) -> bool:
        assert shard.lease is not None
        known = self._board.listing.shards.get(shard.index)
        newer = known is not None and known.generation > shard.lease.generation
        return not shard.committed and (newer or shard.index in self._board.done)

    # giving back

    def settled(self, shard: Shard) -> None:
        """The shard has its manifest now, ours or another."""
        with self._lock:
            self._board.done.add(shard.index)
            self._mine.pop(shard.index, None)
            self._shard_took_s = time.time() - shard.started

    def give_back(self, shard: Shard) -> None:
        """The shard is not ours any more; free at once for others unless it is done or taken over."""
        with self._lock:
            if self._mine.get(shard.index) is not shard:
                return
            del self._mine[shard.index]
            if not self._is_overtaken(shard):
                assert shard.lease is not None
                shard.lease.give_back()

    def progress(self, done: int, total: int) -> None:
        """Say how far this task is with the shards in its hands, for `status`."""
        self._note.write(done, total)

    def close(self) -> None:
        """Give everything back."""
        self._presence.close()
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
            self._mine.clear()
        if descriptor is not None:
            os.close(descriptor)
        self._note.remove()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
