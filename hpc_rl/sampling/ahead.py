"""Beside the loop: a thread that claims shards and reads their prompts, so that the engine waits for neither."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from hpc_rl.sampling.at_work import AtWork
from hpc_rl.sampling.claiming import Claims, Shard
from hpc_rl.sampling.source import Source

log = logging.getLogger("hpc_rl")


class Ahead:
    """Asks for one shard at a time. Its own methods return at once, `all_done` and `close` excepted.

    Parameters
    ----------
    open_images
        Open the images of prompts too; not for engines in other processes, which get their paths.
    """

    def __init__(self, claims: Claims, source: Source, open_images: bool) -> None:
        self._claims, self._source, self._open_images = claims, source, open_images
        self._thread = ThreadPoolExecutor(1, "claims")
        self._looking: Future[Sequence[Shard]] | None = None
        self._numbers = 0
        self.claiming: Future[AtWork | None] | None = None

    def claim(self, held: int, bored: bool) -> None:
        """Begin to claim a shard, or, if there is none and we are bored, a copy of one that somebody else is at."""
        assert self.claiming is None
        self.claiming = self._thread.submit(self._claim, held, bored)

    def take(self) -> AtWork | None:
        """What was claimed, once `claiming` is done; None when there was nothing for us."""
        assert self.claiming is not None
        future, self.claiming = self.claiming, None
        return future.result()

    def _claim(self, held: int, bored: bool) -> AtWork | None:
        """The last shards are for all tasks that are alive: one that holds its share leaves the rest to the others."""
        free = self._claims.free()
        if held and free and held * self._claims.peers() >= held + free:
            return None
        shard = self._claims.next()
        if shard is None and bored:
            shard = self._claims.duplicate()
            if shard is not None:
                log.info("shard %d is done here too: its holder takes longer than usual", shard.index)
        if shard is None:
            return None
        tasks = self._source.tasks(shard.index)
        if self._open_images:
            tasks = [
                replace(task, prompt=replace(task.prompt, images=tuple(task.prompt.open_images()))) for task in tasks
            ]
        self._numbers += 1
        return AtWork(shard, self._numbers, tasks, self._source.rules, self._source.dropped(shard.index))

    @property
    def pause_s(self) -> float:
        """How long it makes no sense to claim again when there was nothing."""
        return self._claims.pause_s

    def look(self, shards: Sequence[Shard], done: int, total: int) -> None:
        """Begin to say how far these shards are, and to see which of them others have done; nothing while it does."""
        if self._looking is None:
            self._looking = self._thread.submit(self._look, shards, done, total)

    def overtaken(self) -> Sequence[Shard]:
        """What a look has found, once."""
        if self._looking is None or not self._looking.done():
            return ()
        future, self._looking = self._looking, None
        return future.result()

    def _look(self, shards: Sequence[Shard], done: int, total: int) -> Sequence[Shard]:
        self._claims.progress(done, total)
        gone = self._claims.overtaken(shards)
        for shard in gone:
            shard.abandon()
        return gone

    def all_done(self) -> bool:
        """True when every shard of the stage has its manifest."""
        return self._thread.submit(self._claims.all_done).result()

    def close(self) -> None:
        """Wait for the thread. What it has claimed meanwhile is the claims' to give back."""
        self._thread.shutdown(cancel_futures=True)
